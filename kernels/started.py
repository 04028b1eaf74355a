"""Kernels and compiled loops as they are started, told to whoever records them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

STREAM = object()  # among arguments: the stream that a kernel is started on


class Started(NamedTuple):
    """A function that takes addresses and numbers, and with what it was called.

    Attributes:
        function: good as long as its owner lives.
        name: for people.
        arguments: tensors in the places of their addresses, also within tuples.
    """

    function: Callable[..., object]
    name: str
    arguments: tuple[Any, ...]
    owner: Any


Watcher = Callable[[Started | None], None]
_watching = threading.local()


def watcher() -> Watcher | None:
    """Who is to be told of what this thread starts; `None` in place of what can be started once only."""
    found: Watcher | None = getattr(_watching, "watcher", None)
    return found


@contextlib.contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Tell this watcher, and nobody else, of everything that this thread starts."""
    before, _watching.watcher = getattr(_watching, "watcher", None), watcher
    try:
        yield
    finally:
        _watching.watcher = before
