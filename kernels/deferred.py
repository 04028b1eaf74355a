"""The gradient buffer, and the terms of it that are not in it yet.

Every reader of a channel adds to its gradient scale * dz, a map, and subtracts a + (x - mean) * b, which come
from the statistics being functions of x: two numbers a channel that are known only when the reader's whole
map has been seen. All readers of a channel share its mean, so those terms are kept apart, as `pending` [2, C]:

    gradient of channel c = buffer[:, c] - pending[0, c] - (x[:, c] - mean[c]) * pending[1, c]

at all times. A backward that passes over the buffer anyway may subtract what is pending and leave its own, or
add its own to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from densebench.kernels.device import load_norm
from densebench.kernels.language import tl, triton
from densebench.kernels.launch import launch, loadable
from densebench.kernels.library import operator
from densebench.kernels.norm import Norm
from densebench.kernels.passes import pass_bytes, pass_rows, settle
from densebench.kernels.rows import tile_bytes
from densebench.kernels.tiling import Tile, cdiv, choice, elementwise_tile, parts_tile


def reference(grad: Tensor, x: Tensor, mean: Tensor, pending: Tensor) -> Tensor:
    """The gradient that a slice of the buffer stands for; reads buffer and x, writes as much (3 M C)."""
    return (grad.to(mean.dtype) - pending[0] - (x.to(mean.dtype) - mean) * pending[1]).to(grad.dtype)


def settle_rows(grad: Tensor, x: Tensor, mean: Tensor, pending: Tensor, out: Tensor) -> None:
    """Write what a buffer stands for (CPU); `out` may be `grad`."""
    for rows in pass_rows(grad, x, out):
        settle(grad[rows], x[rows], mean, pending, out[rows])


def defer(terms: Tensor, pending: Tensor, grad: Tensor, x: Tensor, mean: Tensor) -> None:
    """Take a reader's terms into `pending` (CPU).

    A buffer of low precision is settled first: what several readers leave pending is a common mean of the
    gradient, beside which the gradient itself would round away.
    """
    if grad.dtype in (torch.float16, torch.bfloat16):
        settle_rows(grad, x, mean, pending, grad)
        pending.copy_(terms)
    else:
        pending += terms


@triton.jit
def _settle_kernel(
    grad_pointer, x_pointer, mean_pointer, pending_pointer, out_pointer,
    rows, columns, width,
    grad_stride, x_stride, pending_stride, out_stride,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    kept = column < columns
    mask = (row < rows)[:, None] & kept[None, :]
    mean = tl.load(mean_pointer + column, mask=kept, other=0.0)
    constant = tl.load(pending_pointer + column, mask=kept, other=0.0)
    slope = tl.load(pending_pointer + pending_stride + column, mask=kept, other=0.0)
    wide = row.to(tl.int64)[:, None]
    loaded = (row < rows)[:, None] & (column < width)[None, :]
    x = tl.load(x_pointer + wide * x_stride + column[None, :], mask=loaded, other=0.0).to(mean.dtype)
    grad = tl.load(grad_pointer + wide * grad_stride + column[None, :], mask=mask, other=0.0).to(mean.dtype)
    settled = grad - (constant[None, :] + (x - mean[None, :]) * slope[None, :])
    out = out_pointer + wide * out_stride + column[None, :]
    tl.store(out, settled.to(out_pointer.dtype.element_ty), mask=mask)


@choice
def _tile(columns: int) -> Tile:
    """32 values a thread: there are no sums to hold."""
    return elementwise_tile(columns)


def _cuda(grad: Tensor, x: Tensor, mean: Tensor, pending: Tensor, out: Tensor) -> None:
    rows, columns = x.shape
    tile = _tile(columns)
    launch(
        _settle_kernel, (cdiv(rows, tile.rows), cdiv(columns, tile.columns)),
        (grad, x, mean, pending, out),
        (rows, columns, loadable(x), grad.stride(0), x.stride(0), pending.stride(0), out.stride(0)),
        tile=tile, BLOCK_ROWS=tile.rows, BLOCK_COLUMNS=tile.columns,
    )  # fmt: skip


@triton.jit
def _terms_kernel(
    partial_pointer, mean_pointer, var_pointer, gamma_pointer, beta_pointer,
    grad_gamma_pointer, grad_beta_pointer, pending_pointer,
    parts, rows, columns, pending_stride,
    eps: tl.constexpr, ADDS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Second step of a reader's sums, in one fixed order, and its terms from them."""
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    kept = column < columns
    _, inv_std, scale, _ = load_norm(mean_pointer, var_pointer, gamma_pointer, beta_pointer, eps, column, kept)
    part = tl.arange(0, BLOCK_PARTS)
    offsets = part[:, None] * 2 * columns + column[None, :]
    mask = (part < parts)[:, None] & kept[None, :]
    grad_beta = tl.sum(tl.load(partial_pointer + offsets, mask=mask, other=0.0), axis=0)
    grad_gamma = tl.sum(tl.load(partial_pointer + offsets + columns, mask=mask, other=0.0), axis=0)
    tl.store(grad_beta_pointer + column, grad_beta, mask=kept)
    tl.store(grad_gamma_pointer + column, grad_gamma, mask=kept)
    if pending_pointer is not None:
        constant = scale * grad_beta / rows
        slope = scale * inv_std * grad_gamma / rows
        pending = pending_pointer + column
        if ADDS:
            constant += tl.load(pending, mask=kept, other=0.0)
            slope += tl.load(pending + pending_stride, mask=kept, other=0.0)
        tl.store(pending, constant, mask=kept)
        tl.store(pending + pending_stride, slope, mask=kept)


def reduce_terms(
    partial: Tensor, norm: Norm, pending: Tensor | None, rows: int, adds: bool = False
) -> tuple[Tensor, Tensor]:
    """(dgamma, dbeta) from the sums of the parts [parts, 2, C] of dz and dz * xhat (GPU).

    Args:
        pending: [2, C], takes the reader's terms in place of what it held, or with `adds` beside it; None for a
            reader that has none (it did not normalize by the batch) or that nobody asks for them.
    """
    parts, _, columns = partial.shape
    grad_gamma, grad_beta = torch.empty_like(norm.mean), torch.empty_like(norm.mean)
    tile = parts_tile(parts)
    launch(
        _terms_kernel, (cdiv(columns, tile.columns),),
        (partial, *norm[:4], grad_gamma, grad_beta, pending),
        (parts, rows, columns, 0 if pending is None else pending.stride(0)),
        tile=tile, eps=norm.eps, ADDS=adds,
        BLOCK_PARTS=tile.rows, BLOCK_COLUMNS=tile.columns,
    )  # fmt: skip
    return grad_gamma, grad_beta


settled_gradient = operator(
    "settled_gradient(Tensor grad, Tensor x, Tensor mean, Tensor pending, Tensor(a!) out) -> ()",
    """out = grad - pending[0] - (x - mean) * pending[1]: what a slice of the buffer stands for; all [M, k].

    mean [k], pending [2, k].
    """,
    cpu=settle_rows,
    cuda=_cuda,
    fake=lambda grad, x, out: torch._check(out.shape == grad.shape == x.shape),
    workspace=lambda grad, x: pass_bytes(tile_bytes(x), grad, x, operator_tiles=1),
)
