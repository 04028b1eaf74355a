"""relu(norm(x)) pooled, as a stem (maximum, 3x3 stride 2) or a transition (average, 2x2) does; and the backwards.

The maps are channels-last [N, H, W, C]; nothing of their size is written but the gradient. A transition pools
before its 1x1 convolution instead of after: both are linear, and on a quarter of the pixels the product costs a
quarter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from densebench.kernels.bn_relu import NORM, threshold_backward
from densebench.kernels.bn_relu import reference as bn_relu
from densebench.kernels.deferred import settle_rows, terms_of
from densebench.kernels.library import operator
from densebench.kernels.rows import TILE_BYTES, Norm, accumulate_dtype, as_rows, norm_backward, relu_norm

aten = torch.ops.aten
STEM = ([3, 3], [2, 2], [1, 1])  # kernel, stride, padding


def reference(x: Tensor, norm: Norm, pool: str) -> Tensor:
    """relu(norm(x)) pooled, [N, H, W, C] -> [N, H', W', C]; 3 N H W C of traffic."""
    a = bn_relu(x.reshape(-1, x.shape[-1]), norm).view_as(x).permute(0, 3, 1, 2)
    pooled = F.max_pool2d(a, *STEM) if pool == "max" else F.avg_pool2d(a, 2)
    return pooled.permute(0, 2, 3, 1)


def _images(x: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """A few images at a time, with two pieces of dense scratch for them."""
    step, dtype = _images_a_tile(x), accumulate_dtype(x)
    scratch = x.new_empty(2, min(step, x.shape[0]), *x.shape[1:], dtype=dtype)
    for start in range(0, x.shape[0], step):
        count = min(step, x.shape[0] - start)
        yield slice(start, start + count), scratch[0, :count], scratch[1, :count]


def _images_a_tile(x: Tensor) -> int:
    image_bytes = x[0].numel() * accumulate_dtype(x).itemsize
    return max(1, TILE_BYTES // image_bytes)


def _scratch_bytes(x: Tensor) -> int:
    return min(_images_a_tile(x), x.shape[0]) * x[0].numel() * accumulate_dtype(x).itemsize


def _activate(x: Tensor, norm: Norm, a: Tensor) -> Tensor:
    """relu(norm(x)) into dense scratch, seen as [N, C, H, W]."""
    relu_norm(x, *norm.folded(), a)
    return a.permute(0, 3, 1, 2)


def _cpu_max(
    x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, out: Tensor
) -> None:
    norm = Norm(mean, var, gamma, beta, eps)
    for images, scratch, _ in _images(x):
        pooled = F.max_pool2d(_activate(x[images], norm, scratch), *STEM)
        out[images] = pooled.permute(0, 2, 3, 1)


def _cpu_avg(
    x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, out: Tensor
) -> None:
    norm = Norm(mean, var, gamma, beta, eps)
    for images, scratch, _ in _images(x):
        pooled = F.avg_pool2d(_activate(x[images], norm, scratch), 2)
        out[images] = pooled.permute(0, 2, 3, 1)


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
    pending = mean.new_zeros(2, x.shape[-1])

    def unpool(grad_map: Tensor, a: Tensor) -> Tensor:
        _, where = aten.max_pool2d_with_indices(a, *STEM)
        return aten.max_pool2d_with_indices_backward(grad_map, a, *STEM, [1, 1], False, where)

    sums = _backward(grad, x, norm, by_batch, grad_x, pending, unpool)
    if by_batch:
        settle_rows(grad_x.view(-1, x.shape[-1]), x.reshape(-1, x.shape[-1]), mean, pending)
    return sums


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
    def unpool(grad_map: Tensor, a: Tensor) -> Tensor:
        return aten.avg_pool2d_backward(grad_map, a, [2, 2], [2, 2], [0, 0], False, True, None)

    return _backward(grad, x, Norm(mean, var, gamma, beta, eps), by_batch, grad_x, pending, unpool)


def _backward(
    grad: Tensor,
    x: Tensor,
    norm: Norm,
    by_batch: bool,
    grad_x: Tensor,
    pending: Tensor,
    unpool: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Through pooling, ReLU and norm: grad_x = scale * dz, and the norm's terms join `pending`."""
    grad_gamma, grad_beta = torch.zeros_like(norm.mean), torch.zeros_like(norm.mean)
    for images, scratch, x_tile in _images(x):
        a = _activate(x_tile.copy_(x[images]), norm, scratch)
        dz = unpool(grad[images].to(a.dtype).permute(0, 3, 1, 2), a)
        dz = threshold_backward(dz, a, 0, grad_input=dz)
        rows = x_tile.view(-1, x.shape[-1])
        scaled, more_gamma, more_beta = norm_backward(as_rows(dz), rows, norm)
        grad_gamma += more_gamma
        grad_beta += more_beta
        assert scaled is not None
        grad_x[images] = scaled.view(x_tile.shape)
    if by_batch:
        pending += terms_of(norm, grad_gamma, grad_beta, x[..., 0].numel())
    return grad_gamma, grad_beta


def _cuda(*arguments: object) -> None:
    raise NotImplementedError


def _fake(x: Tensor, *arguments: Tensor) -> None:
    torch._check(arguments[5].shape[-1] == x.shape[-1])


def _fake_backward(grad: Tensor, x: Tensor, mean: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(mean), torch.empty_like(mean)


bn_relu_max_pool = operator(
    f"bn_relu_max_pool(Tensor x, {NORM}, Tensor(a!) out) -> ()",
    cpu=_cpu_max,
    cuda=_cuda,
    fake=_fake,
    workspace=lambda x, *_: 4 * _scratch_bytes(x),
)

bn_relu_max_pool_backward = operator(
    f"bn_relu_max_pool_backward(Tensor grad, Tensor x, {NORM}, bool by_batch, Tensor(a!) grad_x)"
    " -> (Tensor, Tensor)",
    cpu=_cpu_max_backward,
    cuda=_cuda,
    fake=_fake_backward,
    workspace=lambda grad, x, *_: 6 * _scratch_bytes(x),
)

bn_relu_avg_pool = operator(
    f"bn_relu_avg_pool(Tensor x, {NORM}, Tensor(a!) out) -> ()",
    cpu=_cpu_avg,
    cuda=_cuda,
    fake=_fake,
    workspace=lambda x, *_: 3 * _scratch_bytes(x),
)

bn_relu_avg_pool_backward = operator(
    f"bn_relu_avg_pool_backward(Tensor grad, Tensor x, {NORM}, bool by_batch, Tensor(a!) grad_x,"
    " Tensor(b!) pending) -> (Tensor, Tensor)",
    cpu=_cpu_avg_backward,
    cuda=_cuda,
    fake=_fake_backward,
    workspace=lambda grad, x, *_: 5 * _scratch_bytes(x),
)
