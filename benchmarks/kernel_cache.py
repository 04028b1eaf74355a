"""Calls that find their operands out of the cache, as those of a network do: there other layers come between."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from benchmarks.kernel_calls import Call
from densebench.measure.ceilings import device_seconds
from densebench.measure.timing import Clock, Step, cpu_seconds
from densebench.records import Case

CPU_CACHE_BYTES = 32 * 2**20  # PyTorch does not say; the last level of common server processors, for one process
CACHES = 2  # operands of so many times the cache go by before the same come again
MOST_COPIES = 48  # where that is too little, something else is written through the cache before each call


class Rotation:
    """A step that runs one call after the other, so that each finds its operands out of the cache.

    Args:
        other: what to write before each call where the calls' own operands fit into the cache; None if not.
    """

    def __init__(self, calls: Sequence[Call], other: torch.Tensor | None = None) -> None:
        self.calls = calls
        self.other = other
        self._next = itertools.cycle(call.run for call in calls)

    def __call__(self) -> object:
        return next(self._next)()

    def clear_cache(self) -> None:
        """To be called before a call is timed."""
        if self.other is not None:
            self.other.zero_()


def copies(case: Case, floor_bytes: int) -> int:
    """How many sets of operands a contender goes through before the first comes again."""
    return max(2, min(MOST_COPIES, -(-_bytes_to_pass(case.device) // floor_bytes)))


def other_operand(case: Case, floor_bytes: int) -> torch.Tensor | None:
    """Memory to write through the cache between calls, where so many copies do not clear it; else None."""
    size = _bytes_to_pass(case.device)
    if copies(case, floor_bytes) * floor_bytes >= size:
        return None
    return torch.empty(size, dtype=torch.uint8, device=case.device)


def _bytes_to_pass(device: str) -> int:
    """Bytes to touch so that nothing of before is left in the cache."""
    cache = CPU_CACHE_BYTES
    if device == "cuda":
        cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return CACHES * cache


def cold_clock(device: torch.device) -> Clock:
    """The device's clock, started with the operands out of the cache."""
    own = device_seconds if device.type == "cuda" else cpu_seconds

    def clock(step: Step) -> float:
        assert isinstance(step, Rotation)
        step.clear_cache()
        return own(step)

    return clock
