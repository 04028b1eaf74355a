"""What a function does on a GPU, as a straight line of steps: without the Python that decided them.

A training step of the fused strategies starts some 700 kernels. Deciding which, and on what - tiles, slices,
dtypes, whose gradient is needed - takes the host many times as long as starting them, and is the same each time. A
recording is what came of it: allocate, start a compiled kernel at addresses, call one of PyTorch's operators on
views. It knows slots, not memory. Where a CUDA graph is bound to its addresses, each playback allocates anew: any
number of forwards may precede a backward, and nothing is held in between.

A recording may be made of segments, with other work between them; what one leaves in slots the next finds there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from densebench.kernels.started import Started

Tensors = list[Any]  # each a tensor or None
ALIGNMENT = 16  # bytes; what a kernel is compiled for depends on its addresses modulo this


class Geometry(NamedTuple):
    """How a tensor lies in memory, in values."""

    size: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Geometry:
        return cls(tuple(tensor.shape), tensor.stride())


class View(NamedTuple):
    """A tensor within a slot, `offset` values from the slot's first; `whole`: all that is in it."""

    slot: int
    geometry: Geometry
    offset: int
    whole: bool


class Allocate(NamedTuple):
    """Uninitialized memory for a slot."""

    slot: int
    geometry: Geometry
    dtype: torch.dtype
    device: torch.device

    def used(self) -> Iterator[int]:
        yield self.slot


class Pointer(NamedTuple):
    """An address: so many bytes from where a slot's memory begins."""

    slot: int
    offset: int


class Start(NamedTuple):
    """A kernel or a compiled loop, with pointers in place of tensors."""

    started: Started

    def used(self) -> Iterator[int]:
        return _slots_in(self.started.arguments)


class Made(NamedTuple):
    """A result of an operator in memory of its own."""

    slot: int
    geometry: Geometry
    dtype: torch.dtype


class Call(NamedTuple):
    """One of PyTorch's operators. Arguments are views where it was given tensors, also in lists.

    Attributes:
        made: for each result where it goes; None for one that is no new memory.
        alone: the result is one tensor, no sequence.
    """

    operator: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    made: tuple[Made | None, ...]
    alone: bool

    def used(self) -> Iterator[int]:
        yield from _slots_in((self.arguments, tuple(self.keywords.values())))
        yield from (made.slot for made in self.made if made is not None)


Step = Allocate | Start | Call


class Input(NamedTuple):
    """Where an input goes, what it is, and how it lies in memory.

    Attributes:
        alignment: its address modulo `ALIGNMENT`.
        written: whether the segment writes into it.
    """

    slot: int
    geometry: Geometry
    dtype: torch.dtype
    device: torch.device
    alignment: int
    written: bool


class Segment(NamedTuple):
    """What is played at a time: its inputs (None for None), steps and outputs (None for None), in order."""

    inputs: tuple[Input | None, ...]
    steps: tuple[Step, ...]
    outputs: tuple[View | None, ...]

    def results(self) -> Iterator[int]:
        """Slots of the outputs."""
        return (view.slot for view in self.outputs if view is not None)


def _slots_in(values: Iterable[Any]) -> Iterator[int]:
    for value in values:
        if type(value) in (View, Pointer):
            yield value.slot
        elif isinstance(value, (list, tuple)):
            yield from _slots_in(value)
