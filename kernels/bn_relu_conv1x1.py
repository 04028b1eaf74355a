"""relu(norm(x)) W^T without the normalized x ever existing, with the product's statistics on the way out.

x is the prefix of a wider buffer, [M, C]; W is [N, C], the bottleneck.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from densebench.kernels.bn_relu import reference as bn_relu
from densebench.kernels.channel_statistics import RunningStatistics, merge_partial_statistics
from densebench.kernels.device import (
    count_in,
    load_norm,
    merge_rows,
    operand,
    read_norm,
    relu,
    rows_of_threads,
    write_norm,
)
from densebench.kernels.language import VERSION, tl, triton
from densebench.kernels.launch import device_of, launch, loadable, matmul_precision
from densebench.kernels.library import NORM, operator
from densebench.kernels.norm import Folded, Norm, sum_bytes
from densebench.kernels.passes import pass_bytes, relu_norm
from densebench.kernels.products import FEW_ROWS, Statistics, library, multiply, multiply_bytes, tile_dtype, wanted
from densebench.kernels.rows import tile_bytes, tile_rows, tiles
from densebench.kernels.tiling import Tile, cdiv, choice, power_of_two, share


def reference(x: Tensor, norm: Norm, weight: Tensor) -> Tensor:
    """relu(norm(x)) W^T [M, N].

    Bytes: relu(norm(x)) reads x and writes as much (2 M C), the product reads that again (M C) and writes M N;
    fused, M C + M N.
    """
    return bn_relu(x, norm).to(weight.dtype) @ weight.t()


def _cpu(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    weight: Tensor,
    out: Tensor,
    out_mean: Tensor | None,
    out_var: Tensor | None,
    next_mean: Tensor | None = None,
    next_var: Tensor | None = None,
    next_gamma: Tensor | None = None,
    next_beta: Tensor | None = None,
    next_eps: float = 0.0,
) -> None:
    norm, following = Norm(mean, var, gamma, beta, eps).folded(), None
    statistics = wanted(out_mean, out_var, weight.shape[0])
    if next_mean is not None and next_var is not None:
        following = Norm(next_mean, next_var, next_gamma, next_beta, next_eps).folded()
    if not _at_once(x, weight, out):
        _by_tiles(x, norm, weight, out, following, statistics)
    else:
        multiply(x, norm, weight, out, following, statistics)


def _at_once(x: Tensor, weight: Tensor, out: Tensor) -> bool:
    """Whether the compiled products take it, and are worth it (CPU)."""
    return x.shape[0] >= FEW_ROWS and library(x, weight, out) is not None


def _by_tiles(
    x: Tensor, norm: Folded, weight: Tensor, out: Tensor, following: Folded | None, places: Statistics | None
) -> None:
    """With PyTorch's products (CPU)."""
    dtype = tile_dtype(x, weight, out)
    transposed = weight.to(dtype).t()
    scratch = None if out.dtype == dtype else x.new_empty(tile_rows(x), weight.shape[0], dtype=dtype)
    statistics: RunningStatistics | None = None
    for rows, tile in tiles(x, dtype):
        relu_norm(x[rows], norm, tile)
        product = out[rows] if scratch is None else scratch[: tile.shape[0]]
        torch.mm(tile, transposed, out=product)
        if following is not None:
            relu_norm(product, following, product)
        if scratch is not None:
            out[rows] = product
        if places is not None:  # of the product as stored, while its tile is in the cache
            statistics = statistics or RunningStatistics(out[rows], norm.table.dtype)
            statistics.add(out[rows])
    if statistics is not None and places is not None:
        statistics.store(*places)


@triton.jit
def _kernel(
    x_pointer, mean_pointer, var_pointer, gamma_pointer, beta_pointer, weight_pointer, out_pointer,
    table_pointer, partial_pointer, next_mean_pointer, next_var_pointer, next_gamma_pointer, next_beta_pointer,
    rows, columns, width, outputs, weight_width, rows_a_program,
    x_stride, weight_stride, out_stride,
    eps: tl.constexpr, next_eps: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_OUTPUTS: tl.constexpr,
    WHOLE: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    """A range of rows, tile by tile: x is normalized in registers, between its load and the tensor core.

    All outputs of a row are computed at once, so x is read once. With `partial` [parts, 2, N] the range's
    statistics of the product as stored are kept; with `next`, a norm of the outputs, that norm and a ReLU are
    applied instead. WHOLE: no tile reaches beyond the last column or output.
    """
    part = tl.program_id(0)
    output = tl.program_id(1) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    made = output < outputs
    dtype = mean_pointer.dtype.element_ty
    table = table_pointer + (part * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * 3 * columns
    write_norm(table, mean_pointer, var_pointer, gamma_pointer, beta_pointer, eps, columns)
    first = part * rows_a_program
    last = tl.minimum(first + rows_a_program, rows)
    out_mean = tl.zeros((BLOCK_ROWS // 16, 8, BLOCK_OUTPUTS), dtype)
    out_squares = tl.zeros((BLOCK_ROWS // 16, 8, BLOCK_OUTPUTS), dtype)
    upper_row = tl.arange(0, BLOCK_ROWS // 16)[:, None] * 16 + tl.arange(0, 8)[None, :]
    for start in range(first, last, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        mask = (row < last)[:, None]
        wide = row.to(tl.int64)[:, None]
        product = tl.zeros((BLOCK_ROWS, BLOCK_OUTPUTS), dtype)
        for first_column in range(0, columns, BLOCK_COLUMNS):
            column = first_column + tl.arange(0, BLOCK_COLUMNS)
            kept = column < columns
            x_at = x_pointer + wide * x_stride + column[None, :]
            weight_at = weight_pointer + output.to(tl.int64)[None, :] * weight_stride + column[:, None]
            if WHOLE:
                x = tl.load(x_at, mask=mask, other=0.0)
                weight = tl.load(weight_at)
            else:
                x = tl.load(x_at, mask=mask & (column < width)[None, :], other=0.0)
                weight = tl.load(weight_at, mask=(column < weight_width)[:, None] & made[None, :], other=0.0)
            mean, scale, shift = read_norm(table, columns, column, WHOLE)
            a = relu((x.to(dtype) - mean[None, :]) * scale[None, :] + shift[None, :])
            if not WHOLE:
                a = tl.where(kept[None, :], a, 0.0)
            a = operand(a.to(weight.dtype), PRECISION)
            weight = operand(weight, PRECISION)
            product = tl.dot(a, weight, product, input_precision=PRECISION, out_dtype=dtype)
            if WAITS:  # no instruction, but who reads a product waits for it
                product = tl.inline_asm_elementwise("", "=f,0", [product], dtype, is_pure=False, pack=1)
        if next_mean_pointer is not None:
            mean, _, scale, shift = load_norm(
                next_mean_pointer, next_var_pointer, next_gamma_pointer, next_beta_pointer, next_eps, output, made
            )
            product = relu((product - mean[None, :]) * scale[None, :] + shift[None, :])
        stored = product.to(out_pointer.dtype.element_ty)
        tl.store(out_pointer + wide * out_stride + output[None, :], stored, mask=mask & made[None, :])
        if partial_pointer is not None:
            upper, lower = rows_of_threads(stored.to(dtype), BLOCK_ROWS, BLOCK_OUTPUTS)
            left = (last - start - upper_row)[:, :, None]
            counted = (start - first) // BLOCK_ROWS * 2
            out_mean, out_squares = count_in(upper, left > 0, counted, out_mean, out_squares)
            out_mean, out_squares = count_in(lower, left > 8, counted + 1, out_mean, out_squares)
    if partial_pointer is not None:
        rest = (last - first) % BLOCK_ROWS
        counts = (last - first) // BLOCK_ROWS * 2 + (upper_row < rest).to(tl.int32) + (upper_row + 8 < rest)
        counts = tl.reshape(counts, (BLOCK_ROWS // 2, 1)).to(dtype)
        out_mean = tl.reshape(out_mean, (BLOCK_ROWS // 2, BLOCK_OUTPUTS))
        out_squares = tl.reshape(out_squares, (BLOCK_ROWS // 2, BLOCK_OUTPUTS))
        mean, squares = merge_rows(counts, out_mean, out_squares, (last - first).to(dtype))
        partial = partial_pointer + part.to(tl.int64) * 2 * outputs + output
        tl.store(partial, mean, mask=made)
        tl.store(partial + outputs, squares, mask=made)


@choice
def _tile(x: Tensor, weight: Tensor, normalizes: bool = False) -> Tile:
    """All outputs at once (up to 256), so that x is read once.

    What bounds it beside the memory is how many instructions a multiprocessor can start. On Hopper 4 warps
    multiply 64 rows by all outputs; of 8, each half would normalize all of x for itself. Two such programs run
    side by side, one loads while the other stores. Many channels: one program of 128 rows, or reloading the weight
    for every 64 rows would take more of the L2 cache's bandwidth than x takes of the memory's.
    Elsewhere a feature map of few pixels gets shorter tiles, or most multiprocessors would have none. Values of 4
    and 8 bytes take as many times the shared memory.
    """
    device, columns = device_of(x), x.shape[1]
    outputs = power_of_two(weight.shape[0], 16, 64 if x.element_size() == 8 else 256)
    if x.element_size() == 8:
        return Tile(32, 16, outputs, warps=4, stages=2, programs=2)
    if x.element_size() == 4:
        return Tile(32, 16, outputs, warps=8, stages=3, programs=2)
    block, stages = (64, 3) if columns % 64 == 0 else (32, 6)
    if device.is_hopper and outputs <= 128:
        if columns >= 192 and cdiv(x.shape[0], 128) >= device.multiprocessors:
            if normalizes:  # beside 64 channels its vectors do not fit
                block, stages = 32, 6
            return Tile(128, block, outputs, warps=8, stages=stages)
        return Tile(64, block, outputs, warps=4, stages=stages, programs=2)
    if cdiv(x.shape[0], 64) >= device.multiprocessors:
        return Tile(64, 32, outputs, warps=8, stages=4)
    return Tile(32, 32, outputs, warps=8, stages=4, programs=1 if outputs > 128 else 2)


def _waits(x: Tensor, tile: Tile, version: tuple[int, ...] = VERSION) -> bool:
    """Whether to wait for a product before the next one's operand is made.

    Hopper multiplies 64 rows or more asynchronously and reads `a` from registers. Before 3.9, Triton's loop may
    write them again while a product is still under way (triton-lang/triton#9433; seen in the machine code of 3.6,
    3.7 and 3.8 for sm_90, also with newer assemblers, and not in that of 3.9).
    """
    compiles = x.is_cuda or x.is_meta  # the interpreter has nothing to wait for, and no assembly
    return compiles and device_of(x).is_hopper and x.element_size() <= 4 and tile.rows >= 64 and version < (3, 9)


def _cuda(
    x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float,
    weight: Tensor, out: Tensor,
    out_mean: Tensor | None, out_var: Tensor | None,
    next_mean: Tensor | None = None, next_var: Tensor | None = None,
    next_gamma: Tensor | None = None, next_beta: Tensor | None = None, next_eps: float = 0.0,
) -> None:  # fmt: skip
    (rows, columns), outputs = x.shape, weight.shape[0]
    weight = packed(weight)
    tile = _tile(x, weight, normalizes=next_mean is not None)
    shared = share(rows, tile.rows, tile.programs * device_of(x).multiprocessors)
    partial = None if out_mean is None else mean.new_empty(shared.parts, 2, outputs)
    slices = cdiv(outputs, tile.outputs)
    table = mean.new_empty(shared.parts * slices, 3, columns)
    launch(
        _kernel, (shared.parts, slices),
        (x, mean, var, gamma, beta, weight, out, table, partial, next_mean, next_var, next_gamma, next_beta),
        (
            rows, columns, loadable(x), outputs, weight.shape[1], shared.rows,
            x.stride(0), weight.stride(0), out.stride(0),
        ),
        tile=tile, eps=eps, next_eps=next_eps, PRECISION=matmul_precision(weight.dtype),
        BLOCK_ROWS=tile.rows, BLOCK_COLUMNS=tile.columns, BLOCK_OUTPUTS=tile.outputs,
        WHOLE=columns % tile.columns == 0 and outputs % tile.outputs == 0,
        WAITS=_waits(x, tile),
    )  # fmt: skip
    if partial is not None and out_mean is not None and out_var is not None:
        merge_partial_statistics(partial, rows, shared, out_mean, out_var)


def packed(weight: Tensor) -> Tensor:
    """The weight with rows of a multiple of 16 values, so that 16-byte loads are possible; zeros at their ends."""
    missing = -weight.shape[1] % 16
    return F.pad(weight, (0, missing)) if missing else weight.contiguous()


def _fake(x: Tensor, weight: Tensor, out: Tensor) -> None:
    torch._check(weight.shape[1] == x.shape[1])
    torch._check(out.shape == (x.shape[0], weight.shape[0]))


def _flops(x: Tensor, weight: Tensor) -> int:
    return 2 * x.shape[0] * weight.numel()


def _workspace(x: Tensor, mean: Tensor, weight: Tensor, out: Tensor, out_mean: Tensor | None) -> int:
    """Compiled, its scratch; else one tile of x, and tiles of the product and the weight if they are converted."""
    if _at_once(x, weight, out):
        tables = 4 * (x.shape[1] + weight.shape[0]) * mean.element_size()
        return tables + multiply_bytes(x, weight) + (0 if out_mean is None else sum_bytes(out))
    dtype = tile_dtype(x, weight, out)
    product = tile_rows(x) * weight.shape[0] * mean.element_size()
    converted = 0 if out.dtype == dtype else product + weight.numel() * mean.element_size()
    statistics = 0 if out_mean is None else pass_bytes(product, out, operator_tiles=1) + sum_bytes(out)
    return tile_bytes(x, dtype) + converted + statistics


bn_relu_conv1x1 = operator(
    f"bn_relu_conv1x1(Tensor x, {NORM}, Tensor weight, Tensor(a!) out, Tensor(b!)? out_mean, Tensor(c!)? out_var,"
    " Tensor? next_mean=None, Tensor? next_var=None, Tensor? next_gamma=None, Tensor? next_beta=None,"
    " float next_eps=0.0) -> ()",
    """out [M, N] = relu(norm(x)) W^T of x [M, C] and weight [N, C].

    out_mean, out_var [N] take the statistics of out as stored. Given a `next` norm of N channels instead, out is
    relu(next(relu(norm(x)) W^T)).
    """,
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
    flops=_flops,
    workspace=_workspace,
)
