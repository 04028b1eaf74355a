"""Mean and biased variance of each column of a matrix: the statistics of a batch norm.

In a dense block a channel's statistics do not depend on who reads it, so they are computed once, when the
channel has been written, from the values as stored; or while it is written into the feature buffer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from densebench.kernels.device import count_in, merge_rows
from densebench.kernels.language import tl, triton
from densebench.kernels.launch import device_of, launch
from densebench.kernels.library import operator
from densebench.kernels.norm import Sums, pivot_of, store_statistics, sum_bytes
from densebench.kernels.passes import add_column_sums, pass_bytes, pass_rows
from densebench.kernels.rows import accumulate_dtype, tile_bytes
from densebench.kernels.tiling import Share, Tile, cdiv, choice, parts_tile, power_of_two, share


def reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance over rows; reads x twice (2 M C), writes 2 C."""
    var, mean = torch.var_mean(x.to(accumulate_dtype(x)), dim=0, correction=0)
    return mean, var


class RunningStatistics:
    """Mean and biased variance [C] of all rows seen so far (CPU).

    Sums are taken relative to the mean of some of the first rows, in float64: E[x^2] - E[x]^2 cancels only if that
    mean is far from the whole's, by many times the spread.
    """

    def __init__(self, some: Tensor, dtype: torch.dtype) -> None:
        self.pivot = pivot_of(some, dtype)
        self.sums = Sums(some)
        self.rows = 0

    def add(self, rows: Tensor, out: Tensor | None = None) -> None:
        """Take in rows [R, C], and copy them to `out`."""
        add_column_sums(rows, self.pivot, self.sums, out)
        self.rows += rows.shape[0]

    def store(self, mean: Tensor, var: Tensor) -> None:
        """Write the statistics into [C] each."""
        store_statistics(self.sums, self.pivot, self.rows, mean, var)


def _cpu(x: Tensor, mean: Tensor, var: Tensor, out: Tensor | None = None) -> None:
    statistics = RunningStatistics(x, mean.dtype)
    for rows in pass_rows(x, out):
        statistics.add(x[rows], None if out is None else out[rows])
    statistics.store(mean, var)


@triton.jit
def _partial_statistics_kernel(
    x_pointer, partial_pointer, out_pointer,
    rows, columns, rows_a_program,
    x_stride, out_stride,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared differences over a range of rows: partial [parts, 2, C]; with `out`, a copy of them.

    Means are kept relative to the first row of all: where they are large beside the differences between parts,
    these would drown in their rounding.
    """
    part = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    kept = column < columns
    dtype = partial_pointer.dtype.element_ty
    pivot = tl.load(x_pointer + column, mask=kept, other=0.0).to(dtype)
    first = part * rows_a_program
    last = tl.minimum(first + rows_a_program, rows)
    mean = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype)
    squares = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype)
    for start in tl.range(first, last, BLOCK_ROWS, num_stages=STAGES):
        row = start + tl.arange(0, BLOCK_ROWS)
        mask = (row < last)[:, None]
        wide = row.to(tl.int64)[:, None]
        x = tl.load(x_pointer + wide * x_stride + column[None, :], mask=mask & kept[None, :], other=0.0)
        if out_pointer is not None:
            out = out_pointer + wide * out_stride + column[None, :]
            tl.store(out, x.to(out_pointer.dtype.element_ty), mask=mask & kept[None, :])
        mean, squares = count_in(x.to(dtype) - pivot[None, :], mask, (start - first) // BLOCK_ROWS, mean, squares)
    rest = (last - first) % BLOCK_ROWS
    counts = (last - first) // BLOCK_ROWS + (tl.arange(0, BLOCK_ROWS) < rest).to(tl.int32)
    mean, squares = merge_rows(counts.to(dtype)[:, None], mean, squares, (last - first).to(dtype))
    partial = partial_pointer + part.to(tl.int64) * 2 * columns + column
    tl.store(partial, mean, mask=kept)
    tl.store(partial + columns, squares, mask=kept)


@triton.jit
def _merge_statistics_kernel(
    partial_pointer, pivot_pointer, mean_pointer, var_pointer,
    parts, rows, columns, rows_a_part,
    BLOCK_PARTS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """The parts' statistics as one, all parts at once: between means, then within parts."""
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    kept = column < columns
    dtype = partial_pointer.dtype.element_ty
    part = tl.arange(0, BLOCK_PARTS)
    mask = (part < parts)[:, None] & kept[None, :]
    offsets = part[:, None] * 2 * columns + column[None, :]
    mean = tl.load(partial_pointer + offsets, mask=mask, other=0.0)
    squares = tl.load(partial_pointer + offsets + columns, mask=mask, other=0.0)
    counts = tl.maximum(tl.minimum(rows - part * rows_a_part, rows_a_part), 0).to(dtype)[:, None]
    # Relative to the first part's mean: the parts' means may be large beside their differences.
    first = tl.load(partial_pointer + column, mask=kept, other=0.0)
    shifted = tl.where(mask, mean - first[None, :], 0.0)
    total_shift = tl.sum(shifted * counts, axis=0) / rows
    between = tl.where(mask, shifted - total_shift[None, :], 0.0)
    total = tl.sum(squares + between * between * counts, axis=0)
    mean = first + total_shift
    if pivot_pointer is not None:
        mean += tl.load(pivot_pointer + column, mask=kept, other=0.0).to(dtype)
    tl.store(mean_pointer + column, mean, mask=kept)
    tl.store(var_pointer + column, total / rows, mask=kept)


def merge_partial_statistics(
    partial: Tensor, rows: int, shared: Share, mean: Tensor, var: Tensor, pivot: Tensor | None = None
) -> None:
    """Mean and biased variance [C] over all rows from those of the parts, [parts, 2, C].

    Args:
        pivot: what the parts' means are relative to, [C] or the first row of [M, C]; None for 0.
    """
    parts, _, columns = partial.shape
    tile = parts_tile(parts)
    launch(
        _merge_statistics_kernel, (cdiv(columns, tile.columns),),
        (partial, pivot, mean, var), (parts, rows, columns, shared.rows),
        tile=tile, BLOCK_PARTS=tile.rows, BLOCK_COLUMNS=tile.columns,
    )  # fmt: skip


@choice
def _tile(columns: int) -> Tile:
    """Programs enough to fill the device four times over; more would only lengthen the merge."""
    return Tile(64, power_of_two(columns, 16, 64), warps=4, stages=2, programs=4)


def _cuda(x: Tensor, mean: Tensor, var: Tensor, out: Tensor | None = None) -> None:
    rows, columns = x.shape
    tile = _tile(columns)
    column_tiles = cdiv(columns, tile.columns)
    shared = share(rows, tile.rows, cdiv(tile.programs * device_of(x).multiprocessors, column_tiles))
    partial = mean.new_empty(shared.parts, 2, columns)
    launch(
        _partial_statistics_kernel, (shared.parts, column_tiles),
        (x, partial, out), (rows, columns, shared.rows, x.stride(0), 0 if out is None else out.stride(0)),
        tile=tile, BLOCK_ROWS=tile.rows, BLOCK_COLUMNS=tile.columns, STAGES=tile.stages,
    )  # fmt: skip
    merge_partial_statistics(partial, rows, shared, mean, var, pivot=x)


def _fake(x: Tensor, mean: Tensor, var: Tensor, out: Tensor | None) -> None:
    torch._check(mean.shape == var.shape == x.shape[1:])
    torch._check(out is None or out.shape == x.shape)


channel_statistics = operator(
    "channel_statistics(Tensor x, Tensor(a!) mean, Tensor(b!) var, Tensor(c!)? out=None) -> ()",
    """mean and var [C] of the rows of x [M, C]; var is biased.

    With `out` [M, C], of a dtype that holds x exactly, x is copied there in the same pass.
    """,
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
    workspace=lambda x, mean: pass_bytes(tile_bytes(x), x, operator_tiles=1) + sum_bytes(x) + 8 * mean.nbytes,
)
