"""relu(norm(x)), and its backward.

Forward is the operand of the 3x3 convolution: written, used, and computed again in backward instead of kept.
Backward comes in two forms: in place, with the statistics' terms settled at once (for a norm that is the only
reader of its input), and into a gradient buffer that other readers share, with the terms deferred.
"""

from __future__ import annotations

import torch
from torch import Tensor

from densebench.kernels.deferred import defer, settle_rows, terms_of
from densebench.kernels.library import operator
from densebench.kernels.rows import Norm, norm_backward, relu_norm, row_slices, tile_bytes, tiles

threshold_backward = torch.ops.aten.threshold_backward


def reference(x: Tensor, norm: Norm) -> Tensor:
    """relu(norm(x)) [M, C]; reads x, writes as much (2 M C)."""
    gamma, beta = norm.affine()
    z = (x.to(norm.mean.dtype) - norm.mean) * (norm.var + norm.eps).rsqrt()
    z = z if gamma is None else z * gamma
    return torch.relu(z if beta is None else z + beta).to(x.dtype)


def _cpu(
    x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, out: Tensor
) -> None:
    scale, shift = Norm(mean, var, gamma, beta, eps).folded()
    if out.dtype == scale.dtype:
        for rows in row_slices(x):
            relu_norm(x[rows], scale, shift, out[rows])
    else:
        for rows, (tile,) in tiles(x, 1):
            out[rows] = relu_norm(x[rows], scale, shift, tile)


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
    pending = mean.new_zeros(2, x.shape[1])
    sums = _cpu_backward_into(grad, x, mean, var, gamma, beta, eps, by_batch, grad, False, pending)
    if by_batch:
        settle_rows(grad, x, mean, pending)
    return sums


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
    norm = Norm(mean, var, gamma, beta, eps)
    scale, shift = norm.folded()
    grad_gamma, grad_beta = torch.zeros_like(mean), torch.zeros_like(mean)
    for rows, (x_tile, z, dz) in tiles(x, 3):
        torch.addcmul(shift, x_tile.copy_(x[rows]), scale, out=z)
        threshold_backward(dz.copy_(grad[rows]), z, 0, grad_input=dz)
        scaled, more_gamma, more_beta = norm_backward(dz, x_tile, norm, needs_x=grad_x is not None)
        grad_gamma += more_gamma
        grad_beta += more_beta
        if grad_x is not None and scaled is not None:
            store(scaled, grad_x[rows], accumulate)
    if by_batch and grad_x is not None:
        terms = terms_of(norm, grad_gamma, grad_beta, x.shape[0])
        defer(terms, pending, grad_x, x, mean)
    return grad_gamma, grad_beta


def store(values: Tensor, out: Tensor, accumulate: bool) -> None:
    """out = values, or out += values, rounded to out's dtype once."""
    if not accumulate:
        out.copy_(values)
    elif out.dtype == values.dtype:
        out += values
    else:
        out.copy_(values.add_(out))


def _cuda(*arguments: object) -> None:
    raise NotImplementedError


def _fake_sums(grad: Tensor, x: Tensor, mean: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(mean), torch.empty_like(mean)


NORM = "Tensor mean, Tensor var, Tensor? gamma, Tensor? beta, float eps"

bn_relu = operator(
    f"bn_relu(Tensor x, {NORM}, Tensor(a!) out) -> ()",
    cpu=_cpu,
    cuda=_cuda,
    fake=lambda x, mean, var, gamma, beta, eps, out: torch._check(out.shape == x.shape),
    workspace=lambda x, mean, var, gamma, beta, eps, out: 0 if out.dtype == mean.dtype else tile_bytes(x),
)

bn_relu_backward = operator(
    f"bn_relu_backward(Tensor(a!) grad, Tensor x, {NORM}, bool by_batch) -> (Tensor, Tensor)",
    cpu=_cpu_backward,
    cuda=_cuda,
    fake=_fake_sums,
    workspace=lambda grad, x, *_: 5 * tile_bytes(x),
)

bn_relu_backward_into = operator(
    f"bn_relu_backward_into(Tensor grad, Tensor x, {NORM}, bool by_batch, Tensor(a!)? grad_x, bool accumulate,"
    " Tensor(b!) pending) -> (Tensor, Tensor)",
    cpu=_cpu_backward_into,
    cuda=_cuda,
    fake=_fake_sums,
    workspace=lambda grad, x, *_: 5 * tile_bytes(x),
)
