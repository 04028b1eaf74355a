"""relu(norm(x)) pooled, as a stem (maximum, 3x3 stride 2) or a transition (average, 2x2) does.

The maps are channels-last [N, H, W, C]; only the pooled one is written. A transition pools before its 1x1
convolution instead of after: both are linear, and on a quarter of the pixels the product costs a quarter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from densebench.kernels import pools
from densebench.kernels.bn_relu import reference as bn_relu
from densebench.kernels.device import load_norm, relu
from densebench.kernels.language import tl, triton
from densebench.kernels.launch import launch, pixel_stride
from densebench.kernels.library import NORM, operator
from densebench.kernels.norm import Folded, Norm
from densebench.kernels.passes import relu_norm
from densebench.kernels.pools import pool_bytes, pooled_size
from densebench.kernels.rows import TILE_BYTES, accumulate_dtype
from densebench.kernels.tiling import Tile, cdiv, choice, elementwise_tile

STEM = ([3, 3], [2, 2], [1, 1])  # kernel, stride, padding


def reference(x: Tensor, norm: Norm, pool: str) -> Tensor:
    """relu(norm(x)) pooled, [N, H, W, C] -> [N, H', W', C]; 3 N H W C of traffic."""
    a = bn_relu(x.reshape(-1, x.shape[-1]), norm).view_as(x).permute(0, 3, 1, 2)
    pooled = F.max_pool2d(a, *STEM) if pool == "max" else F.avg_pool2d(a, 2)
    return pooled.permute(0, 2, 3, 1)


def image_tiles(x: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """A few images at a time, with scratch for them [n, H, W, C], dense and reused."""
    step = _images_a_tile(x)
    scratch = x.new_empty(min(step, x.shape[0]), *x.shape[1:], dtype=accumulate_dtype(x))
    for start in range(0, x.shape[0], step):
        images = slice(start, min(start + step, x.shape[0]))
        yield images, scratch[: images.stop - images.start]


def _images_a_tile(x: Tensor) -> int:
    image_bytes = x[0].numel() * accumulate_dtype(x).itemsize
    return max(1, TILE_BYTES // image_bytes)


def scratch_bytes(x: Tensor) -> int:
    return min(_images_a_tile(x), x.shape[0]) * x[0].numel() * accumulate_dtype(x).itemsize


def activate(x: Tensor, norm: Folded, a: Tensor) -> Tensor:
    """relu(norm(x)) into dense scratch, seen as [N, C, H, W]."""
    relu_norm(x.flatten(0, 2), norm, a.flatten(0, 2))
    return a.permute(0, 3, 1, 2)


def _by_images(x: Tensor, norm: Folded, out: Tensor, pool: Callable[[Tensor], Tensor]) -> None:
    """With PyTorch's pool (CPU)."""
    for images, scratch in image_tiles(x):
        pooled = pool(activate(x[images], norm, scratch))
        out[images] = pooled.permute(0, 2, 3, 1)
        del pooled  # before the next is made


def _cpu_max(
    x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, out: Tensor
) -> None:
    norm = Norm(mean, var, gamma, beta, eps).folded()
    if pools.library(x, out) is None:
        _by_images(x, norm, out, lambda a: F.max_pool2d(a, *STEM))
    else:
        pools.largest(x, norm, out)


def _cpu_avg(
    x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, out: Tensor
) -> None:
    norm = Norm(mean, var, gamma, beta, eps).folded()
    if pools.library(x, out) is None:
        _by_images(x, norm, out, lambda a: F.avg_pool2d(a, 2))
    else:
        pools.mean(x, norm, out)


@triton.jit
def largest_of_window(
    x_pointer, mean, scale, shift, image, window_row, window_column, column, mask,
    height, width, x_stride,
):  # fmt: skip
    """The largest relu(norm(x)) of each 3x3 window, and which of the nine it is (the first, at a tie).

    NaN wins over everything, as in PyTorch.
    """
    best = tl.full(mask.shape, -float("inf"), mean.dtype)
    chosen = tl.zeros(mask.shape, tl.int32)
    for place in tl.static_range(9):
        row = 2 * window_row - 1 + place // 3
        pixel_column = 2 * window_column - 1 + place % 3
        inside = (row >= 0) & (row < height) & (pixel_column >= 0) & (pixel_column < width)
        pixel = (image.to(tl.int64) * height + row) * width + pixel_column
        here = mask & inside[:, None]
        x = tl.load(x_pointer + pixel[:, None] * x_stride + column[None, :], mask=here, other=0.0)
        a = relu((x.to(mean.dtype) - mean[None, :]) * scale[None, :] + shift[None, :])
        better = here & ((a > best) | (a != a))
        best = tl.where(better, a, best)
        chosen = tl.where(better, place, chosen)
    return best, chosen


@triton.jit
def mean_of_window(
    x_pointer, mean, scale, shift, image, window_row, window_column, column, mask,
    height, width, x_stride,
):  # fmt: skip
    """The mean relu(norm(x)) of each 2x2 window."""
    total = tl.zeros(mask.shape, mean.dtype)
    for place in tl.static_range(4):
        row = 2 * window_row + place // 2
        pixel = (image.to(tl.int64) * height + row) * width + 2 * window_column + place % 2
        x = tl.load(x_pointer + pixel[:, None] * x_stride + column[None, :], mask=mask, other=0.0)
        total += relu((x.to(mean.dtype) - mean[None, :]) * scale[None, :] + shift[None, :])
    return total * 0.25


@triton.jit
def _kernel(
    x_pointer, mean_pointer, var_pointer, gamma_pointer, beta_pointer, out_pointer, chosen_pointer,
    windows, columns, height, width, out_height, out_width,
    x_stride, out_stride,
    eps: tl.constexpr, POOL: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Pooled values, or (with `chosen`, uint8 [windows, C]) the place of each maximum in its window."""
    window = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    kept = column < columns
    mask = (window < windows)[:, None] & kept[None, :]
    mean, _, scale, shift = load_norm(mean_pointer, var_pointer, gamma_pointer, beta_pointer, eps, column, kept)
    image = window // (out_height * out_width)
    row = window // out_width % out_height
    wide = window.to(tl.int64)[:, None]
    if POOL == "max":
        pooled, chosen = largest_of_window(
            x_pointer, mean, scale, shift, image, row, window % out_width, column, mask, height, width, x_stride
        )
        if chosen_pointer is not None:
            tl.store(chosen_pointer + wide * columns + column[None, :], chosen.to(tl.uint8), mask=mask)
    else:
        pooled = mean_of_window(
            x_pointer, mean, scale, shift, image, row, window % out_width, column, mask, height, width, x_stride
        )
    if out_pointer is not None:
        out = out_pointer + wide * out_stride + column[None, :]
        tl.store(out, pooled.to(out_pointer.dtype.element_ty), mask=mask)


@choice
def _tile(columns: int) -> Tile:
    """16 values a thread, of four or nine pixels each."""
    return elementwise_tile(columns, values=16)


def launch_pool(x: Tensor, norm: Norm, pool: str, out: Tensor | None, chosen: Tensor | None) -> None:
    """Write the pooled map [N, H', W', C], or the places of the maxima."""
    images, height, width, columns = x.shape
    out_height, out_width = pooled_size(height, width, pool)
    windows, tile = images * out_height * out_width, _tile(columns)
    launch(
        _kernel, (cdiv(windows, tile.rows), cdiv(columns, tile.columns)),
        (x, *norm[:4], out, chosen),
        (
            windows, columns, height, width, out_height, out_width,
            pixel_stride(x), 0 if out is None else pixel_stride(out),
        ),
        tile=tile, eps=norm.eps, POOL=pool, BLOCK_ROWS=tile.rows, BLOCK_COLUMNS=tile.columns,
    )  # fmt: skip


def _cuda_max(
    x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, out: Tensor
) -> None:
    launch_pool(x, Norm(mean, var, gamma, beta, eps), "max", out, None)


def _cuda_avg(
    x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, out: Tensor
) -> None:
    launch_pool(x, Norm(mean, var, gamma, beta, eps), "avg", out, None)


def _fake(x: Tensor, out: Tensor) -> None:
    torch._check(out.shape[-1] == x.shape[-1])


def _workspace(x: Tensor, out: Tensor) -> int:
    """Compiled, a norm; else the activations, and a quarter of them pooled, in the accumulating dtype."""
    return pool_bytes(x) if pools.library(x, out) is not None else scratch_bytes(x) * 5 // 4


def _max_workspace(x: Tensor, mean: Tensor, out: Tensor) -> int:
    """The same, and of what is pooled the places in 8 bytes each."""
    compiled_form = pools.library(x, out) is not None
    return _workspace(x, out) + (0 if compiled_form else scratch_bytes(x) * 2 // mean.element_size())


bn_relu_max_pool = operator(
    f"bn_relu_max_pool(Tensor x, {NORM}, Tensor(a!) out) -> ()",
    "out [N, H', W', C] = maximum of relu(norm(x)) over 3x3 windows, stride 2, padding 1; x [N, H, W, C].",
    cpu=_cpu_max,
    cuda=_cuda_max,
    fake=_fake,
    workspace=_max_workspace,
)

bn_relu_avg_pool = operator(
    f"bn_relu_avg_pool(Tensor x, {NORM}, Tensor(a!) out) -> ()",
    "out [N, H // 2, W // 2, C] = mean of relu(norm(x)) over 2x2 windows; x [N, H, W, C].",
    cpu=_cpu_avg,
    cuda=_cuda_avg,
    fake=_fake,
    workspace=_workspace,
)
