"""Backward of relu(norm(x)) W^T in one pass over x and its gradient buffer.

Separate kernels write the gradient of relu(norm(x)) and read it twice; the norm's own backward passes over x
twice, for its sums and for the gradient. Here each tile of x is loaded once: the product's gradients, the
norm's sums and the buffer's update come from it, and what the sums decide is deferred (see `deferred`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from densebench.kernels.bn_relu import reference as bn_relu
from densebench.kernels.bn_relu_backward import reference as bn_relu_backward
from densebench.kernels.bn_relu_conv1x1 import packed
from densebench.kernels.deferred import defer, reduce_terms
from densebench.kernels.device import load_norm, operand, relu, relu_backward, rows_of_threads
from densebench.kernels.language import tl, triton
from densebench.kernels.launch import device_of, launch, loadable, matmul_precision
from densebench.kernels.library import NORM, operator
from densebench.kernels.norm import Folded, Norm, Sums, norm_gradients, sum_bytes
from densebench.kernels.passes import backward_bytes, relu_norm, relu_norm_backward
from densebench.kernels.products import library, multiply_backward, multiply_backward_bytes, tile_dtype
from densebench.kernels.rows import tile_bytes, tile_rows, tiles
from densebench.kernels.tiling import Share, Tile, cdiv, choice, power_of_two, share


def reference(
    grad: Tensor, x: Tensor, norm: Norm, by_batch: bool, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(grad_x [M, C], dgamma, dbeta, dW [N, C]), as one reader's own.

    Bytes: da = grad W reads grad and writes M C; dW reads grad and relu(norm(x)), which reading x makes anew
    (3 M C); the norm's backward 5 M C; adding to what other readers left, 3 M C more. In one pass, 3 M C + M N.
    """
    a = bn_relu(x, norm).to(weight.dtype)
    grads = bn_relu_backward((grad.to(weight.dtype) @ weight).to(norm.mean.dtype), x, norm, by_batch)
    return *grads, grad.t().to(weight.dtype) @ a


def _cpu_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    by_batch: bool,
    weight: Tensor,
    grad_x: Tensor | None,
    accumulate: bool,
    pending: Tensor,
    needs_affine: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    norm, sums = Norm(mean, var, gamma, beta, eps).folded(), Sums(x)
    wanted = sums if grad_x is not None or needs_affine else None
    if library(grad, x, weight, grad_x) is None:
        grad_weight = _by_tiles(grad, x, norm, weight, wanted, grad_x, accumulate, needs_weight)
    else:
        grad_weight = x.new_empty(grad.shape[1] if needs_weight else 0, x.shape[1])
        made = grad_weight if needs_weight else None
        multiply_backward(grad, x, norm, weight, wanted, grad_x, accumulate, made)
    gradients = norm_gradients(sums, norm, x.shape[0])
    if by_batch and grad_x is not None:
        defer(gradients.terms, pending, grad_x, x, mean)
    return gradients.gamma, gradients.beta, grad_weight


def _by_tiles(
    grad: Tensor,
    x: Tensor,
    norm: Folded,
    weight: Tensor,
    sums: Sums | None,
    grad_x: Tensor | None,
    accumulate: bool,
    needs_weight: bool,
) -> Tensor:
    """The same as `multiply_backward` with PyTorch's products (CPU); returns dW [N, C]."""
    dtype = tile_dtype(grad, x, weight, grad_x)
    weight, outputs = weight.to(dtype), grad.shape[1] if needs_weight else 0
    grad_weight = norm.table.new_zeros(x.shape[1], outputs)  # transposed: the faster product
    for rows, tile in tiles(x, dtype):
        grad_rows = grad[rows].to(dtype)
        if needs_weight:
            relu_norm(x[rows], norm, tile)
            if dtype == grad_weight.dtype:
                grad_weight.addmm_(tile.t(), grad_rows)
            else:  # a tile's part is rounded once; what they come to is not
                grad_weight += tile.t() @ grad_rows
        if sums is not None:
            torch.mm(grad_rows, weight, out=tile)
        del grad_rows  # before what the pass converts, and before the next is made
        if sums is not None:
            relu_norm_backward(tile, x[rows], norm, sums, None if grad_x is None else grad_x[rows], accumulate)
    return grad_weight.t().contiguous()


@triton.jit
def _kernel(
    grad_pointer, x_pointer, mean_pointer, var_pointer, gamma_pointer, beta_pointer, weight_pointer,
    grad_x_pointer, pending_pointer, partial_pointer, partial_weight_pointer,
    rows, columns, width, outputs, weight_width, rows_a_program,
    grad_stride, x_stride, weight_stride, grad_x_stride, pending_stride,
    eps: tl.constexpr, PRECISION: tl.constexpr, ACCUMULATES: tl.constexpr, SETTLES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_OUTPUTS: tl.constexpr, WHOLE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """A range of rows of a few channels, tile by tile.

    The weight's columns stay loaded and their gradient stays in registers for the whole range; programs of one
    range run side by side, so that the rows of `grad` that they share come from the cache. WHOLE: no tile reaches
    beyond the last column or output.
    """
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    part = tl.program_id(1)
    kept = column < columns
    loaded = (column < width)[None, :]
    output = tl.arange(0, BLOCK_OUTPUTS)
    made = output < outputs
    mean, inv_std, scale, shift = load_norm(
        mean_pointer, var_pointer, gamma_pointer, beta_pointer, eps, column, kept
    )
    dtype = mean.dtype
    weight = tl.load(
        weight_pointer + output.to(tl.int64)[:, None] * weight_stride + column[None, :],
        mask=made[:, None] & (column < weight_width)[None, :],
        other=0.0,
    )  # [outputs, columns]
    weight = operand(weight, PRECISION)
    if SETTLES:
        constant = tl.load(pending_pointer + column, mask=kept, other=0.0)
        slope = tl.load(pending_pointer + pending_stride + column, mask=kept, other=0.0)
    sum_dz = tl.zeros((BLOCK_ROWS // 16, 8, BLOCK_COLUMNS), dtype)
    sum_dz_x = tl.zeros((BLOCK_ROWS // 16, 8, BLOCK_COLUMNS), dtype)
    grad_weight = tl.zeros((BLOCK_OUTPUTS, BLOCK_COLUMNS), dtype)
    first = part * rows_a_program
    last = tl.minimum(first + rows_a_program, rows)
    # Said of the loop, not of the launch alone: else only what products read would be loaded ahead, not `before`.
    for start in tl.range(first, last, BLOCK_ROWS, num_stages=STAGES):
        row = start + tl.arange(0, BLOCK_ROWS)
        mask = (row < last)[:, None]
        wide = row.to(tl.int64)[:, None]
        loads = mask if WHOLE else mask & loaded
        grad = tl.load(
            grad_pointer + wide * grad_stride + output[None, :],
            mask=mask if WHOLE else mask & made[None, :],
            other=0.0,
        )  # [rows, outputs]
        grad = operand(grad, PRECISION)
        x = tl.load(x_pointer + wide * x_stride + column[None, :], mask=loads, other=0.0)
        centered = x.to(dtype) - mean[None, :]
        z = centered * scale[None, :] + shift[None, :]
        if partial_weight_pointer is not None:
            a = relu(z)
            if grad.dtype == tl.float16:
                # Rows beyond the last have no gradient, but 0 * inf would be one: the norm of 0 may leave float16.
                a = tl.where(mask, a, 0.0)
            grad_weight = tl.dot(
                tl.trans(grad), operand(a.to(grad.dtype), PRECISION), grad_weight,
                input_precision=PRECISION, out_dtype=dtype,
            )  # fmt: skip
        if ACCUMULATES:
            grad_x = grad_x_pointer + wide * grad_x_stride + column[None, :]
            before = tl.load(grad_x, mask=loads, other=0.0)
        if partial_pointer is not None:
            dz = relu_backward(tl.dot(grad, weight, input_precision=PRECISION, out_dtype=dtype), z)
            upper, lower = rows_of_threads(dz, BLOCK_ROWS, BLOCK_COLUMNS)
            sum_dz += upper + lower
            upper, lower = rows_of_threads(dz * centered, BLOCK_ROWS, BLOCK_COLUMNS)
            sum_dz_x += upper + lower
            if grad_x_pointer is not None:
                grad_x = grad_x_pointer + wide * grad_x_stride + column[None, :]
                value = scale[None, :] * dz
                if SETTLES:
                    value -= constant[None, :] + centered * slope[None, :]
                if ACCUMULATES:
                    # As many columns as are loaded are stored, so that both are 16 bytes wide; those beyond
                    # this reader's channels get back what they held.
                    value = before.to(dtype) + (value if WHOLE else tl.where(kept[None, :], value, 0.0))
                    tl.store(grad_x, value.to(grad_x_pointer.dtype.element_ty), mask=loads)
                else:
                    tl.store(grad_x, value.to(grad_x_pointer.dtype.element_ty), mask=mask & kept[None, :])
    if partial_pointer is not None:
        partial = partial_pointer + part.to(tl.int64) * 2 * columns + column
        sum_dz = tl.sum(tl.reshape(sum_dz, (BLOCK_ROWS // 2, BLOCK_COLUMNS)), axis=0)
        sum_dz_x = tl.sum(tl.reshape(sum_dz_x, (BLOCK_ROWS // 2, BLOCK_COLUMNS)), axis=0)
        tl.store(partial, sum_dz, mask=kept)
        tl.store(partial + columns, sum_dz_x * inv_std, mask=kept)
    if partial_weight_pointer is not None:
        place = (part.to(tl.int64) * outputs + output.to(tl.int64))[:, None] * columns + column[None, :]
        tl.store(partial_weight_pointer + place, grad_weight, mask=made[:, None] & kept[None, :])


@choice
def _tile(x: Tensor, outputs: int) -> Tile:
    """The wider the tile, the less often `grad` is read.

    64 rows x 64 channels where 128 outputs' sums then still fit into the registers of eight warps: on Hopper,
    whose tensor cores read their operands from shared memory. There is one program a multiprocessor then, and
    nobody else to work while it waits: the next tiles are on their way. (With two stages a tile is asked for when
    the one before is done; AMD's shared memory holds no more.) Without tensor cores the operands of a product are
    in registers, too: small ones.
    """
    device = device_of(x)
    if x.element_size() == 8:
        return Tile(16, 16, power_of_two(outputs, 16, 64), warps=4, stages=1)
    if x.element_size() == 4:
        if matmul_precision(x.dtype) == "ieee":
            return Tile(16, 16, power_of_two(outputs, 16, 64), warps=8, stages=3)
        return Tile(32, 32, power_of_two(outputs, 16, 128), warps=8, stages=3)
    block = power_of_two(outputs, 16, 256)
    if device.is_hopper and block <= 128:
        return Tile(64, 64, block, warps=8, stages=4)
    return Tile(64, 32, block, warps=8, stages=2 if device.is_amd else 3)


def _shared(x: Tensor, tile: Tile) -> Share:
    """One program a multiprocessor: its registers are all taken by one."""
    programs = tile.programs * device_of(x).multiprocessors
    return share(x.shape[0], tile.rows, programs // cdiv(x.shape[1], tile.columns))


def _pass(
    grad: Tensor, x: Tensor, norm: Norm, weight: Tensor, grad_x: Tensor | None, pending: Tensor | None,
    partial: Tensor | None, partial_weight: Tensor | None, shared: Share, tile: Tile, accumulates: bool,
) -> None:  # fmt: skip
    """One pass for as many outputs as a tile takes."""
    rows, columns = x.shape
    width = loadable(x) if grad_x is None else min(loadable(x), loadable(grad_x))
    launch(
        _kernel, (cdiv(columns, tile.columns), shared.parts),
        (grad, x, *norm[:4], weight, grad_x, pending, partial, partial_weight),
        (
            rows, columns, width, grad.shape[1], weight.shape[1], shared.rows,
            grad.stride(0), x.stride(0), weight.stride(0), 0 if grad_x is None else grad_x.stride(0),
            0 if pending is None else pending.stride(0),
        ),
        tile=tile, eps=norm.eps, PRECISION=matmul_precision(weight.dtype), ACCUMULATES=accumulates,
        SETTLES=pending is not None,
        BLOCK_ROWS=tile.rows, BLOCK_COLUMNS=tile.columns, BLOCK_OUTPUTS=tile.outputs,
        WHOLE=columns % tile.columns == 0 and grad.shape[1] == tile.outputs, STAGES=tile.stages,
    )  # fmt: skip


def _cuda_backward(
    grad: Tensor, x: Tensor,
    mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, by_batch: bool,
    weight: Tensor, grad_x: Tensor | None, accumulate: bool, pending: Tensor,
    needs_affine: bool, needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What is pending is settled in the same pass; then the reader's own terms take its place. A reader without
    terms leaves what is pending to the next.

    More outputs than a tile takes are worked through in slices: the ReLU's mask is the same for all, so their
    gradients of x add up, and so do their sums.
    """
    norm = Norm(mean, var, gamma, beta, eps)
    (rows, columns), outputs = x.shape, grad.shape[1]
    weight, grad = packed(weight), grad.to(weight.dtype)
    tile = _tile(x, outputs)
    shared = _shared(x, tile)
    slices = [slice(start, start + tile.outputs) for start in range(0, outputs, tile.outputs)]
    deferred = pending if by_batch and grad_x is not None else None
    needs_sums = grad_x is not None or needs_affine
    partial = mean.new_empty(len(slices), shared.parts, 2, columns) if needs_sums else None
    grad_weight = mean.new_empty(outputs if needs_weight else 0, columns)
    for at, chosen in enumerate(slices):
        count = min(tile.outputs, outputs - chosen.start)
        weights = mean.new_empty(shared.parts, count, columns) if needs_weight else None
        accumulates = grad_x is not None and (accumulate or at > 0)
        settled = deferred if accumulates and at == 0 else None
        sums = None if partial is None else partial[at]
        _pass(grad[:, chosen], x, norm, weight[chosen], grad_x, settled, sums, weights, shared, tile, accumulates)
        if weights is not None:
            torch.sum(weights, 0, out=grad_weight[chosen])
            del weights  # megabytes, before the next are made
    if partial is None:
        return torch.zeros_like(mean), torch.zeros_like(mean), grad_weight
    joined = partial.flatten(0, 1)
    return *reduce_terms(joined, norm, deferred, rows), grad_weight


def _fake(grad: Tensor, x: Tensor, mean: Tensor, needs_weight: bool) -> tuple[Tensor, Tensor, Tensor]:
    grad_weight = mean.new_empty(grad.shape[1] if needs_weight else 0, x.shape[1])
    return torch.empty_like(mean), torch.empty_like(mean), grad_weight


def _workspace(
    grad: Tensor, x: Tensor, mean: Tensor, weight: Tensor, grad_x: Tensor | None, needs_weight: bool
) -> int:
    """Compiled, its scratch; else one tile of x's columns, the weight's gradient once more, and what the norm's
    backward takes; where they have to be converted, the weight, too, and a tile of the outputs before that.
    """
    if library(grad, x, weight, grad_x) is not None:
        table = 4 * x.shape[1] * mean.element_size()
        return table + multiply_backward_bytes(x, weight, needs_weight) + sum_bytes(x)
    dtype = tile_dtype(grad, x, weight, grad_x)
    tile, gradient = tile_bytes(x, dtype), weight.numel() * mean.element_size()
    if grad.dtype == dtype:
        return tile + gradient + backward_bytes(tile, grad, x, grad_x)
    outputs = tile_rows(x) * grad.shape[1] * mean.element_size()
    return tile + 2 * gradient + max(outputs + sum_bytes(x), backward_bytes(tile, None, x, grad_x))


def _flops(x: Tensor, weight: Tensor, grad_x: Tensor | None, needs_affine: bool, needs_weight: bool) -> int:
    products = int(grad_x is not None or needs_affine) + int(needs_weight)
    return products * 2 * x.shape[0] * weight.numel()


bn_relu_conv1x1_backward = operator(
    f"bn_relu_conv1x1_backward(Tensor grad, Tensor x, {NORM}, bool by_batch, Tensor weight,"
    " Tensor(a!)? grad_x, bool accumulate, Tensor(b!) pending, bool needs_affine, bool needs_weight)"
    " -> (Tensor, Tensor, Tensor)",
    """Through relu(norm(x)) W^T, from the product's gradient grad [M, N].

    grad_x [M, C] is written, or with `accumulate` added to; None: not needed. The norm's own terms join `pending`.
    Returns (dgamma, dbeta, dW [N, C]); without `needs_weight` dW is [0, C], without `needs_affine` and grad_x
    the sums are not computed.
    """,
    cpu=_cpu_backward,
    cuda=_cuda_backward,
    fake=_fake,
    flops=_flops,
    workspace=_workspace,
)
