"""Backward of relu(norm(x)), in two forms.

In place, with the statistics' terms settled at once, for a norm that is the only reader of its input; and into
a gradient buffer that other readers share, with the terms deferred.
"""

from __future__ import annotations

import torch
from torch import Tensor

from densebench.kernels.deferred import defer, reduce_terms
from densebench.kernels.device import load_norm, relu_backward
from densebench.kernels.language import tl, triton
from densebench.kernels.launch import device_of, launch, loadable
from densebench.kernels.library import NORM, operator
from densebench.kernels.norm import Norm, Sums, norm_gradients
from densebench.kernels.passes import backward_bytes, pass_rows, relu_norm_backward, relu_norm_backward_in_place
from densebench.kernels.rows import tile_bytes
from densebench.kernels.tiling import Share, Tile, cdiv, choice, elementwise_tile, share


def reference(grad: Tensor, x: Tensor, norm: Norm, by_batch: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_x [M, C], dgamma, dbeta), as one reader's own.

    Bytes: the sums read grad and x (2 M C), grad_x reads them again and writes as much (3 M C).
    """
    dtype, inv_std = norm.mean.dtype, (norm.var + norm.eps).rsqrt()
    gamma, beta = norm.affine()
    scale = inv_std if gamma is None else inv_std * gamma
    x_hat = (x.to(dtype) - norm.mean) * inv_std
    z = (x.to(dtype) - norm.mean) * scale + (0 if beta is None else beta)
    dz = torch.where(z <= 0, 0, grad.to(dtype))
    grad_gamma, grad_beta = (dz * x_hat).sum(0), dz.sum(0)
    grad_x = scale * dz
    if by_batch:
        grad_x = grad_x - scale * (grad_beta + x_hat * grad_gamma) / x.shape[0]
    return grad_x.to(grad.dtype), grad_gamma, grad_beta


def _cpu_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    by_batch: bool,
) -> tuple[Tensor, Tensor]:
    norm = Norm(mean, var, gamma, beta, eps).folded()
    sums = Sums(x)
    for rows in pass_rows(grad, x):
        relu_norm_backward(grad[rows], x[rows], norm, sums, None, False)
    gradients = norm_gradients(sums, norm, x.shape[0])
    for rows in pass_rows(grad, x):
        relu_norm_backward_in_place(grad[rows], x[rows], norm, gradients.terms if by_batch else None)
    return gradients.gamma, gradients.beta


def _cpu_backward_into(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    by_batch: bool,
    grad_x: Tensor | None,
    accumulate: bool,
    pending: Tensor,
) -> tuple[Tensor, Tensor]:
    norm = Norm(mean, var, gamma, beta, eps).folded()
    sums = Sums(x)
    for rows in pass_rows(grad, x, grad_x):
        grad_rows = None if grad_x is None else grad_x[rows]
        relu_norm_backward(grad[rows], x[rows], norm, sums, grad_rows, accumulate)
    gradients = norm_gradients(sums, norm, x.shape[0])
    if by_batch and grad_x is not None:
        defer(gradients.terms, pending, grad_x, x, mean)
    return gradients.gamma, gradients.beta


@triton.jit
def _kernel(
    grad_pointer, x_pointer, mean_pointer, var_pointer, gamma_pointer, beta_pointer,
    grad_x_pointer, pending_pointer, partial_pointer,
    rows, columns, width, rows_a_program,
    grad_stride, x_stride, grad_x_stride, pending_stride,
    eps: tl.constexpr, WRITES: tl.constexpr, ACCUMULATES: tl.constexpr, SETTLES: tl.constexpr, SUMS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A range of rows: grad_x (+)= scale * dz - pending terms; partial sums of dz and dz * xhat [parts, 2, C]."""
    part = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    kept = column < columns
    loaded = (column < width)[None, :]
    mean, inv_std, scale, shift = load_norm(
        mean_pointer, var_pointer, gamma_pointer, beta_pointer, eps, column, kept
    )
    if SETTLES:
        constant = tl.load(pending_pointer + column, mask=kept, other=0.0)
        slope = tl.load(pending_pointer + pending_stride + column, mask=kept, other=0.0)
    sum_dz = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), mean.dtype)
    sum_dz_x = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), mean.dtype)
    first = part * rows_a_program
    last = tl.minimum(first + rows_a_program, rows)
    for start in tl.range(first, last, BLOCK_ROWS, num_stages=STAGES):
        row = start + tl.arange(0, BLOCK_ROWS)
        mask = (row < last)[:, None]
        wide = row.to(tl.int64)[:, None]
        x = tl.load(x_pointer + wide * x_stride + column[None, :], mask=mask & loaded, other=0.0)
        grad = tl.load(grad_pointer + wide * grad_stride + column[None, :], mask=mask & kept[None, :], other=0.0)
        centered = x.to(mean.dtype) - mean[None, :]
        dz = relu_backward(grad.to(mean.dtype), centered * scale[None, :] + shift[None, :])
        if SUMS:
            sum_dz += dz
            sum_dz_x += dz * centered
        if WRITES:
            grad_x = grad_x_pointer + wide * grad_x_stride + column[None, :]
            value = scale[None, :] * dz
            if ACCUMULATES:
                value += tl.load(grad_x, mask=mask & kept[None, :], other=0.0).to(mean.dtype)
            if SETTLES:
                value -= constant[None, :] + centered * slope[None, :]
            tl.store(grad_x, value.to(grad_x_pointer.dtype.element_ty), mask=mask & kept[None, :])
    if SUMS:
        partial = partial_pointer + part.to(tl.int64) * 2 * columns + column
        tl.store(partial, tl.sum(sum_dz, axis=0), mask=kept)
        tl.store(partial + columns, tl.sum(sum_dz_x, axis=0) * inv_std, mask=kept)


@choice
def _tile(columns: int) -> Tile:
    """16 values a thread: of each, two to three operands and two sums are held at a time.

    Programs enough to fill the device four times: more would lengthen the second step of the sums.
    """
    return elementwise_tile(columns, values=16, stages=3, programs=4)


def _launch(
    grad: Tensor, x: Tensor, norm: Norm, grad_x: Tensor | None, pending: Tensor | None,
    partial: Tensor | None, shared: Share, accumulates: bool = False,
) -> None:  # fmt: skip
    """One pass; without `grad_x` for the sums alone, without `partial` for grad_x alone."""
    rows, columns = x.shape
    tile = _tile(columns)
    launch(
        _kernel, (shared.parts, cdiv(columns, tile.columns)),
        (grad, x, *norm[:4], grad_x, pending, partial),
        (
            rows, columns, loadable(x), shared.rows,
            grad.stride(0), x.stride(0), 0 if grad_x is None else grad_x.stride(0),
            0 if pending is None else pending.stride(0),
        ),
        tile=tile, eps=norm.eps, WRITES=grad_x is not None, ACCUMULATES=accumulates,
        SETTLES=pending is not None, SUMS=partial is not None,
        BLOCK_ROWS=tile.rows, BLOCK_COLUMNS=tile.columns, STAGES=tile.stages,
    )  # fmt: skip


def _shared(x: Tensor) -> Share:
    tile = _tile(x.shape[1])
    programs = tile.programs * device_of(x).multiprocessors
    return share(x.shape[0], tile.rows, cdiv(programs, cdiv(x.shape[1], tile.columns)))


def _cuda_backward(
    grad: Tensor, x: Tensor,
    mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, by_batch: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    norm, shared = Norm(mean, var, gamma, beta, eps), _shared(x)
    partial = mean.new_empty(shared.parts, 2, x.shape[1])
    if not by_batch:
        _launch(grad, x, norm, grad, None, partial, shared)
        return reduce_terms(partial, norm, None, x.shape[0])
    terms = mean.new_empty(2, x.shape[1])
    _launch(grad, x, norm, None, None, partial, shared)
    sums = reduce_terms(partial, norm, terms, x.shape[0])
    _launch(grad, x, norm, grad, terms, None, shared)
    return sums


def _cuda_backward_into(
    grad: Tensor, x: Tensor,
    mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, by_batch: bool,
    grad_x: Tensor | None, accumulate: bool, pending: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What is pending is settled in the same pass; then the reader's own terms take its place.

    A reader without terms leaves what is pending to the next.
    """
    norm, shared = Norm(mean, var, gamma, beta, eps), _shared(x)
    partial = mean.new_empty(shared.parts, 2, x.shape[1])
    deferred = pending if by_batch and grad_x is not None else None
    settled = deferred if accumulate else None
    _launch(grad, x, norm, grad_x, settled, partial, shared, accumulate)
    return reduce_terms(partial, norm, deferred, x.shape[0])


def _fake_sums(mean: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(mean), torch.empty_like(mean)


bn_relu_backward = operator(
    f"bn_relu_backward(Tensor(a!) grad, Tensor x, {NORM}, bool by_batch) -> (Tensor, Tensor)",
    """Through relu(norm(x)), in place: grad [M, C] becomes the gradient of x [M, C].

    For a norm that is the only reader of x. Returns (dgamma, dbeta).
    """,
    cpu=_cpu_backward,
    cuda=_cuda_backward,
    fake=_fake_sums,
    workspace=lambda grad, x: backward_bytes(tile_bytes(x), grad, x, None),
)

bn_relu_backward_into = operator(
    f"bn_relu_backward_into(Tensor grad, Tensor x, {NORM}, bool by_batch, Tensor(a!)? grad_x, bool accumulate,"
    " Tensor(b!) pending) -> (Tensor, Tensor)",
    """Through relu(norm(x)) from grad [M, C] into a buffer that other readers share.

    grad_x [M, C] is written, or with `accumulate` added to; None: not needed. The norm's own terms join `pending`.
    Returns (dgamma, dbeta).
    """,
    cpu=_cpu_backward_into,
    cuda=_cuda_backward_into,
    fake=_fake_sums,
    workspace=lambda grad, x, grad_x: backward_bytes(tile_bytes(x), grad, x, grad_x),
)
