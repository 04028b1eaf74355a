"""The fused path as a GPU runs it, where there is none: Triton's kernels in the interpreter, and their replays."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from densebench.execution import (
    feature_gradient,
    fused_stage,
    norm_convolution,
    pixels,
    pooling,
    shared_statistics,
)
from densebench.kernels import compiled
from densebench.kernels import launch as starting
from densebench.kernels.library import IMPLEMENTATIONS, require_dense_rows
from densebench.replay import playback, tracks
from tests.replays import Counts, replay_everywhere


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a GPU runs, in the interpreter."""
    if torch.cuda.is_available():
        pytest.skip("a GPU runs them for real (tests/gpu)")
    call_launchers(monkeypatch)
    with compiled.using(None):  # nor are convolutions those of a CPU
        yield


def call_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The strategy calls the launchers instead of the CPU path; its buffers have the padded rows of a GPU's."""
    launched = {name: one.cuda for name, one in IMPLEMENTATIONS.items() if one.cuda is not None}
    replaced = set()
    for module in (fused_stage, norm_convolution, shared_statistics, feature_gradient, pooling):
        for name in launched.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, _launched(name, launched[name]))
            replaced.add(name)
    assert replaced == launched.keys(), "an operator is called from elsewhere"
    padded = pixels.Pixels.buffer

    def buffer(self: pixels.Pixels, channels: int, like: Tensor) -> Tensor:
        wide = padded(self, -(-channels // 16) * 16, like)
        return wide.fill_(float("nan"))[:, :channels]

    monkeypatch.setattr(pixels.Pixels, "buffer", buffer)


def _launched(name: str, launcher: Callable[..., Any]) -> Callable[..., Any]:
    """With the check that comes before a launch on a GPU."""

    def launched(*arguments: Any) -> Any:
        require_dense_rows(name, arguments)
        return launcher(*arguments)

    return launched


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    """Runs of forwards and backwards, with replays on the CPU path."""
    return replay_everywhere(monkeypatch)


@pytest.fixture
def replayed(as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work on a CPU is recorded, too; an interpreted kernel is found as a compiled one is, and takes addresses."""
    monkeypatch.setattr(tracks, "worthwhile", lambda x, dtype: True)
    monkeypatch.setattr(starting, "_compiled", {})
    monkeypatch.setattr(starting, "_compile", _interpreted)
    for module in (starting, playback):
        monkeypatch.setattr(module, "current_stream", lambda: 0)


def _interpreted(
    key: Any, kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], tile: Any, constants: dict[str, Any]
) -> starting.Found:
    dtypes = [argument.dtype if isinstance(argument, Tensor) else None for argument in arguments]
    values = tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
    found = starting.Found(_at_addresses, (*grid, 1, 1)[:3], (kernel, dtypes), values, (kernel,))
    kernel[grid](*arguments, **constants)
    starting._compiled[key] = found
    return found


def _at_addresses(x: int, y: int, z: int, stream: int, kernel: Any, dtypes: list[Any], *arguments: Any) -> None:
    pairs = zip(arguments, [*dtypes, *[None] * (len(arguments) - len(dtypes))], strict=True)
    with _disable_current_modes():  # of what the interpreter does with tensors a GPU does nothing
        kernel[x, y, z](*[value if dtype is None else _value_at(value, dtype) for value, dtype in pairs])


def _value_at(address: int, dtype: torch.dtype) -> Tensor:
    """A tensor of the one value that stands there: the interpreter asks it for address and dtype only."""
    return torch.frombuffer((ctypes.c_char * dtype.itemsize).from_address(address), dtype=dtype)
