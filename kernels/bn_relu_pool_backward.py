"""Backward of relu(norm(x)) pooled: through the pooling, the ReLU and the norm in one go.

A transition's passes over x once and defers its statistics' terms (see `deferred`). A stem's norm is the only
reader of its input, so its terms are settled at once: one pass over x for the sums, one for the gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from densebench.kernels import pools
from densebench.kernels.bn_relu_pool import (
    STEM,
    activate,
    image_tiles,
    launch_pool,
    scratch_bytes,
)
from densebench.kernels.deferred import reduce_terms, settle_rows
from densebench.kernels.device import load_norm, relu_backward
from densebench.kernels.language import tl, triton
from densebench.kernels.launch import device_of, launch, pixel_stride
from densebench.kernels.library import NORM, operator
from densebench.kernels.norm import Folded, Norm, Sums, norm_gradients
from densebench.kernels.passes import backward_bytes, relu_norm_backward
from densebench.kernels.pools import pool_backward_bytes, pooled_size
from densebench.kernels.tiling import Share, Tile, cdiv, choice, elementwise_tile, share

aten = torch.ops.aten


def _cpu_max_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    by_batch: bool,
    grad_x: Tensor,
) -> tuple[Tensor, Tensor]:
    norm = Norm(mean, var, gamma, beta, eps)
    if pools.library(grad, x, grad_x) is not None:
        return _largest_backward(grad, x, norm.folded(), by_batch, grad_x)
    pending = mean.new_zeros(2, x.shape[-1])

    def unpool(grad_map: Tensor, images: slice, dz: Tensor) -> None:
        a = activate(x[images], norm.folded(), dz.permute(0, 2, 3, 1))
        _, where = aten.max_pool2d_with_indices(a, *STEM)
        aten.max_pool2d_with_indices_backward(grad_map, a, *STEM, [1, 1], False, where, grad_input=dz)

    sums = _backward(grad, x, norm, by_batch, grad_x, pending, unpool)
    if by_batch:
        rows = grad_x.view(-1, x.shape[-1])
        settle_rows(rows, x.flatten(0, 2), mean, pending, rows)
    return sums


def _largest_backward(
    grad: Tensor, x: Tensor, norm: Folded, by_batch: bool, grad_x: Tensor
) -> tuple[Tensor, Tensor]:
    """Compiled. Finding the maxima a second time costs less than a gradient that waits in memory for its terms."""
    sums = Sums(x)
    pools.largest_backward(grad, x, norm, None, sums, None if by_batch else grad_x)
    gradients = norm_gradients(sums, norm, x.numel() // x.shape[-1])
    if by_batch:
        pools.largest_backward(grad, x, norm, gradients.terms, None, grad_x)
    return gradients.gamma, gradients.beta


def _cpu_avg_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    by_batch: bool,
    grad_x: Tensor,
    pending: Tensor,
) -> tuple[Tensor, Tensor]:
    def unpool(grad_map: Tensor, images: slice, dz: Tensor) -> None:
        aten.avg_pool2d_backward(grad_map, dz, [2, 2], [2, 2], [0, 0], False, True, None, grad_input=dz)

    norm = Norm(mean, var, gamma, beta, eps)
    if pools.library(grad, x, grad_x) is None:
        return _backward(grad, x, norm, by_batch, grad_x, pending, unpool)
    folded, sums = norm.folded(), Sums(x)
    pools.mean_backward(grad, x, folded, sums, grad_x)
    return _deferred(folded, sums, by_batch, x, pending)


def _backward(
    grad: Tensor,
    x: Tensor,
    norm: Norm,
    by_batch: bool,
    grad_x: Tensor,
    pending: Tensor,
    unpool: Callable[[Tensor, slice, Tensor], None],
) -> tuple[Tensor, Tensor]:
    """Through pooling, ReLU and norm: grad_x = scale * dz, and the norm's terms join `pending`.

    `unpool` writes the gradient of some images before the pooling into dense scratch, seen as [N, C, H, W].
    """
    folded, sums = norm.folded(), Sums(x)
    for images, dz in image_tiles(x):
        unpool(grad[images].to(dz.dtype).permute(0, 3, 1, 2), images, dz.permute(0, 3, 1, 2))
        written = grad_x[images].view(-1, x.shape[-1])  # a copy would take the gradient and be lost: view raises
        relu_norm_backward(dz.flatten(0, 2), x[images].flatten(0, 2), folded, sums, written, False)
    return _deferred(folded, sums, by_batch, x, pending)


def _deferred(norm: Folded, sums: Sums, by_batch: bool, x: Tensor, pending: Tensor) -> tuple[Tensor, Tensor]:
    """(dgamma, dbeta); the norm's terms join `pending`."""
    gradients = norm_gradients(sums, norm, x.numel() // x.shape[-1])
    if by_batch:
        pending += gradients.terms
    return gradients.gamma, gradients.beta


@triton.jit
def _gradient_of_largest(grad_pointer, chosen_pointer, image, row, pixel_column, column, mask,
                         columns, out_height, out_width, grad_stride, dtype: tl.constexpr):  # fmt: skip
    """What each pixel gets from the windows that it is the largest of: up to four."""
    total = tl.zeros(mask.shape, dtype)
    for place in tl.static_range(4):
        window_row = row // 2 + place // 2
        window_column = pixel_column // 2 + place % 2
        # Where in that window the pixel lies; an even row or column lies in one window only.
        inner_row = row - 2 * window_row + 1
        inner_column = pixel_column - 2 * window_column + 1
        inside = (inner_row >= 0) & (inner_column >= 0) & (window_row < out_height) & (window_column < out_width)
        window = ((image.to(tl.int64) * out_height + window_row) * out_width + window_column)[:, None]
        here = mask & inside[:, None]
        chosen = tl.load(chosen_pointer + window * columns + column[None, :], mask=here, other=255)
        grad = tl.load(grad_pointer + window * grad_stride + column[None, :], mask=here, other=0.0)
        is_largest = here & (chosen.to(tl.int32) == (3 * inner_row + inner_column)[:, None])
        total += tl.where(is_largest, grad.to(dtype), 0.0)
    return total


@triton.jit
def _gradient_of_mean(grad_pointer, image, row, pixel_column, column, mask,
                      out_height, out_width, grad_stride, dtype: tl.constexpr):  # fmt: skip
    """A quarter of the gradient of the window that the pixel lies in; an odd last row or column lies in none."""
    window_row, window_column = row // 2, pixel_column // 2
    inside = (window_row < out_height) & (window_column < out_width)
    window = ((image.to(tl.int64) * out_height + window_row) * out_width + window_column)[:, None]
    here = mask & inside[:, None]
    return 0.25 * tl.load(grad_pointer + window * grad_stride + column[None, :], mask=here, other=0.0).to(dtype)


@triton.jit
def _kernel(
    grad_pointer, x_pointer, mean_pointer, var_pointer, gamma_pointer, beta_pointer, chosen_pointer,
    grad_x_pointer, terms_pointer, partial_pointer,
    pixels, columns, height, width, out_height, out_width, pixels_a_program,
    grad_stride, x_stride, grad_x_stride,
    eps: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """A range of pixels: grad_x = scale * dz - terms, and the norm's partial sums [parts, 2, C]."""
    part = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    kept = column < columns
    mean, inv_std, scale, shift = load_norm(
        mean_pointer, var_pointer, gamma_pointer, beta_pointer, eps, column, kept
    )
    if terms_pointer is not None:
        constant = tl.load(terms_pointer + column, mask=kept, other=0.0)
        slope = tl.load(terms_pointer + columns + column, mask=kept, other=0.0)
    sum_dz = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), mean.dtype)
    sum_dz_x = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), mean.dtype)
    first = part * pixels_a_program
    last = tl.minimum(first + pixels_a_program, pixels)
    for start in range(first, last, BLOCK_ROWS):
        pixel = start + tl.arange(0, BLOCK_ROWS)
        mask = (pixel < last)[:, None] & kept[None, :]
        image, row, pixel_column = pixel // (height * width), pixel // width % height, pixel % width
        if chosen_pointer is not None:
            grad = _gradient_of_largest(
                grad_pointer, chosen_pointer, image, row, pixel_column, column, mask,
                columns, out_height, out_width, grad_stride, mean.dtype,
            )  # fmt: skip
        else:
            grad = _gradient_of_mean(
                grad_pointer, image, row, pixel_column, column, mask,
                out_height, out_width, grad_stride, mean.dtype,
            )  # fmt: skip
        wide = pixel.to(tl.int64)[:, None]
        x = tl.load(x_pointer + wide * x_stride + column[None, :], mask=mask, other=0.0)
        centered = x.to(mean.dtype) - mean[None, :]
        dz = relu_backward(grad, centered * scale[None, :] + shift[None, :])
        if partial_pointer is not None:
            sum_dz += dz
            sum_dz_x += dz * centered
        if grad_x_pointer is not None:
            value = scale[None, :] * dz
            if terms_pointer is not None:
                value -= constant[None, :] + centered * slope[None, :]
            grad_x = grad_x_pointer + wide * grad_x_stride + column[None, :]
            tl.store(grad_x, value.to(grad_x_pointer.dtype.element_ty), mask=mask)
    if partial_pointer is not None:
        partial = partial_pointer + part.to(tl.int64) * 2 * columns + column
        tl.store(partial, tl.sum(sum_dz, axis=0), mask=kept)
        tl.store(partial + columns, tl.sum(sum_dz_x, axis=0) * inv_std, mask=kept)


@choice
def _tile(columns: int) -> Tile:
    """8 values a thread: with 16 of them registers halve the warps beside it."""
    return elementwise_tile(columns, values=8, programs=4)


def _launch(
    grad: Tensor, x: Tensor, norm: Norm, chosen: Tensor | None,
    grad_x: Tensor | None, terms: Tensor | None, partial: Tensor | None, shared: Share,
) -> None:  # fmt: skip
    """One pass; without `grad_x` for the sums alone, without `partial` for grad_x alone."""
    images, height, width, columns = x.shape
    tile = _tile(columns)
    launch(
        _kernel, (shared.parts, cdiv(columns, tile.columns)),
        (grad, x, *norm[:4], chosen, grad_x, terms, partial),
        (
            images * height * width, columns, height, width, grad.shape[1], grad.shape[2], shared.rows,
            pixel_stride(grad), pixel_stride(x), 0 if grad_x is None else pixel_stride(grad_x),
        ),
        tile=tile, eps=norm.eps, BLOCK_ROWS=tile.rows, BLOCK_COLUMNS=tile.columns,
    )  # fmt: skip


def _shared(x: Tensor) -> Share:
    columns = x.shape[-1]
    tile = _tile(columns)
    programs = tile.programs * device_of(x).multiprocessors
    return share(x.numel() // columns, tile.rows, cdiv(programs, cdiv(columns, tile.columns)))


def _cuda_max_backward(
    grad: Tensor, x: Tensor,
    mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, by_batch: bool,
    grad_x: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Where each maximum lay is found again, a byte each, instead of kept since forward (8 bytes each)."""
    norm, shared = Norm(mean, var, gamma, beta, eps), _shared(x)
    pixels, columns = x.numel() // x.shape[-1], x.shape[-1]
    chosen = x.new_empty(x.shape[0], *pooled_size(x.shape[1], x.shape[2], "max"), columns, dtype=torch.uint8)
    launch_pool(x, norm, "max", None, chosen)
    partial = mean.new_empty(shared.parts, 2, columns)
    if not by_batch:
        _launch(grad, x, norm, chosen, grad_x, None, partial, shared)
        return reduce_terms(partial, norm, None, pixels)
    terms = mean.new_empty(2, columns)
    _launch(grad, x, norm, chosen, None, None, partial, shared)
    sums = reduce_terms(partial, norm, terms, pixels)
    _launch(grad, x, norm, chosen, grad_x, terms, None, shared)
    return sums


def _cuda_avg_backward(
    grad: Tensor, x: Tensor,
    mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, by_batch: bool,
    grad_x: Tensor, pending: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    norm, shared = Norm(mean, var, gamma, beta, eps), _shared(x)
    partial = mean.new_empty(shared.parts, 2, x.shape[-1])
    _launch(grad, x, norm, None, grad_x, None, partial, shared)
    return reduce_terms(partial, norm, pending if by_batch else None, x.numel() // x.shape[-1], adds=True)


def _fake_backward(mean: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(mean), torch.empty_like(mean)


def _workspace(grad: Tensor, x: Tensor, grad_x: Tensor) -> int:
    """Compiled, little; else the gradient before the pooling, and what the norm's backward takes."""
    if pools.library(grad, x, grad_x) is not None:
        return pool_backward_bytes(x, "avg")
    return scratch_bytes(x) + backward_bytes(scratch_bytes(x), None, x, grad_x)


def _max_workspace(grad: Tensor, x: Tensor, mean: Tensor, grad_x: Tensor) -> int:
    """Before the norm's backward, the maxima with their places, 8 bytes each; their gradient, if converted."""
    if pools.library(grad, x, grad_x) is not None:
        return pool_backward_bytes(x, "max")
    windows = scratch_bytes(x) // mean.element_size() // 4
    converted = 0 if grad.dtype == mean.dtype else mean.element_size()
    unpooling = scratch_bytes(x) + windows * (mean.element_size() + 8 + converted)
    return max(unpooling, _workspace(grad, x, grad_x))


bn_relu_max_pool_backward = operator(
    f"bn_relu_max_pool_backward(Tensor grad, Tensor x, {NORM}, bool by_batch, Tensor(a!) grad_x)"
    " -> (Tensor, Tensor)",
    """Through a stem's pool(relu(norm(x))), from grad [N, H', W', C] to grad_x [N, H, W, C].

    Returns (dgamma, dbeta).
    """,
    cpu=_cpu_max_backward,
    cuda=_cuda_max_backward,
    fake=_fake_backward,
    workspace=_max_workspace,
)

bn_relu_avg_pool_backward = operator(
    f"bn_relu_avg_pool_backward(Tensor grad, Tensor x, {NORM}, bool by_batch, Tensor(a!) grad_x,"
    " Tensor(b!) pending) -> (Tensor, Tensor)",
    """Through a transition's pool(relu(norm(x))), from grad [N, H // 2, W // 2, C].

    grad_x [N, H, W, C] is written; the norm's own terms join `pending`. Returns (dgamma, dbeta).
    """,
    cpu=_cpu_avg_backward,
    cuda=_cuda_avg_backward,
    fake=_fake_backward,
    workspace=_workspace,
)
