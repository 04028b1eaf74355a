"""How a kernel is launched: rows shared out among programs, columns that may be loaded, one way to start it."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

# A GPU's multiprocessors are asked for; the interpreter has none, and works through as many programs as this
# to exercise the merging of their partial results.
INTERPRETED_MULTIPROCESSORS = 3


class Tile(NamedTuple):
    """Sizes of a program's tile and how it is compiled."""

    rows: int
    columns: int
    outputs: int = 0
    warps: int = 4
    stages: int = 3


class Share(NamedTuple):
    """Rows [0, M) in `parts` consecutive ranges of `rows` each (the last may be shorter)."""

    parts: int
    rows: int


def elementwise_tile(columns: int) -> Tile:
    """32 values a thread: four 16-byte loads of 2-byte values in flight from each operand."""
    block = power_of_two(columns, 16, 64)
    return Tile(4096 // block, block, warps=4, stages=2)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, tile: Tile, **constants: Any) -> None:
    """Start a kernel on the current stream; the only place where one is started."""
    kernel[grid](*arguments, **constants, num_warps=tile.warps, num_stages=tile.stages)


def share(rows: int, tile_rows: int, programs: int) -> Share:
    """Share rows out among at most so many programs, in whole tiles. It depends on nothing but its arguments,
    so the order of every sum does not either."""
    a_program = cdiv(cdiv(rows, tile_rows), max(1, programs)) * tile_rows
    return Share(cdiv(rows, a_program), a_program)


def multiprocessors(x: Tensor) -> int:
    """How many programs of x's device run at once."""
    return _multiprocessors(x.device.index) if x.is_cuda else INTERPRETED_MULTIPROCESSORS


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def loadable(x: Tensor) -> int:
    """How many columns of each row of a slice [M, C] may be loaded: C, or more where C would keep loads narrow.

    A mask at column C allows 16-byte loads only if C is a multiple of 16. The first columns of a wider buffer
    whose row stride is such a multiple may be loaded whole, and masked in registers.
    """
    columns, stride = x.shape[1], x.stride(0)
    if columns % 16 == 0 or stride % 16 != 0 or x.storage_offset() % stride != 0:
        return columns
    rows_end = (x.storage_offset() + x.shape[0] * stride) * x.element_size()
    return stride if rows_end <= x.untyped_storage().nbytes() else columns


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(value: int, least: int, most: int) -> int:
    """The next power of two, within limits that are powers of two."""
    return min(most, max(least, 1 << (value - 1).bit_length()))


def matmul_precision(dtype: torch.dtype) -> str:
    """How products of float32 are computed: as PyTorch is told to compute convolutions."""
    return "tf32" if dtype == torch.float32 and torch.backends.cudnn.allow_tf32 else "ieee"
