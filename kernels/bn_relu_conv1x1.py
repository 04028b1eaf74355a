"""relu(norm(x)) W^T without the normalized x ever existing, and its backward in one pass.

x is the prefix of a wider buffer, [M, C]; W is [N, C], the bottleneck. Separate kernels write relu(norm(x)) and
read it again, and backward needs a second pass for the norm's sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from densebench.kernels.bn_relu import NORM, store, threshold_backward
from densebench.kernels.bn_relu import reference as bn_relu
from densebench.kernels.channel_statistics import channel_statistics
from densebench.kernels.deferred import defer, terms_of
from densebench.kernels.library import operator
from densebench.kernels.rows import Norm, norm_backward, relu_norm, tile_bytes, tiles


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
    out_scale: Tensor | None,
    out_shift: Tensor | None,
) -> None:
    scale, shift = Norm(mean, var, gamma, beta, eps).folded()
    transposed = weight.to(scale.dtype).t()
    direct = out.dtype == scale.dtype
    if out_scale is not None and out_shift is not None:
        transposed, bias = transposed * out_scale, out_shift.to(scale.dtype)
    for rows, (tile,) in tiles(x, 1):
        a = relu_norm(x[rows], scale, shift, tile)
        if out_scale is not None:
            product = torch.addmm(bias, a, transposed, out=out[rows] if direct else None).relu_()
        else:
            product = torch.mm(a, transposed, out=out[rows] if direct else None)
        if not direct:
            out[rows] = product
    if out_mean is not None and out_var is not None:
        channel_statistics(out, out_mean, out_var)


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
    norm = Norm(mean, var, gamma, beta, eps)
    scale, shift = norm.folded()
    weight = weight.to(scale.dtype)
    grad_gamma, grad_beta = torch.zeros_like(mean), torch.zeros_like(mean)
    grad_weight = scale.new_zeros(weight.shape[1], weight.shape[0])  # transposed: the faster product
    for rows, (x_tile, a, dz) in tiles(x, 3):
        relu_norm(x_tile.copy_(x[rows]), scale, shift, a)
        grad_tile = grad[rows].to(scale.dtype)
        if needs_weight:
            grad_weight.addmm_(a.t(), grad_tile)
        if grad_x is None and not needs_affine:
            continue
        torch.mm(grad_tile, weight, out=dz)
        threshold_backward(dz, a, 0, grad_input=dz)
        scaled, more_gamma, more_beta = norm_backward(dz, x_tile, norm, needs_x=grad_x is not None)
        grad_gamma += more_gamma
        grad_beta += more_beta
        if grad_x is not None and scaled is not None:
            store(scaled, grad_x[rows], accumulate)
    if by_batch and grad_x is not None:
        terms = terms_of(norm, grad_gamma, grad_beta, x.shape[0])
        defer(terms, pending, grad_x, x, mean)
    return grad_gamma, grad_beta, grad_weight.t()


def _cuda(*arguments: object) -> None:
    raise NotImplementedError


def _fake(x: Tensor, *arguments: Tensor) -> None:
    weight, out = arguments[5:7]
    torch._check(weight.shape[1] == x.shape[1])
    torch._check(out.shape == (x.shape[0], weight.shape[0]))


def _fake_backward(grad: Tensor, x: Tensor, mean: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    weight = mean.new_empty(x.shape[1], grad.shape[1]).t()
    return torch.empty_like(mean), torch.empty_like(mean), weight


def _flops(x: Tensor, *arguments: Tensor, out_val: object = None) -> int:
    return 2 * x.shape[0] * x.shape[1] * arguments[5].shape[0]


def _flops_backward(grad: Tensor, x: Tensor, *arguments: object, out_val: object = None) -> int:
    grad_x, needs_affine, needs_weight = arguments[7], arguments[10], arguments[11]
    products = int(grad_x is not None or bool(needs_affine)) + int(bool(needs_weight))
    return products * 2 * x.shape[0] * x.shape[1] * grad.shape[1]


bn_relu_conv1x1 = operator(
    f"bn_relu_conv1x1(Tensor x, {NORM}, Tensor weight, Tensor(a!) out, Tensor(b!)? out_mean,"
    " Tensor(c!)? out_var, Tensor? out_scale, Tensor? out_shift) -> ()",
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
    flops=_flops,
    workspace=lambda x, *_: 2 * tile_bytes(x),
)

bn_relu_conv1x1_backward = operator(
    f"bn_relu_conv1x1_backward(Tensor grad, Tensor x, {NORM}, bool by_batch, Tensor weight,"
    " Tensor(a!)? grad_x, bool accumulate, Tensor(b!) pending, bool needs_affine, bool needs_weight)"
    " -> (Tensor, Tensor, Tensor)",
    cpu=_cpu_backward,
    cuda=_cuda,
    fake=_fake_backward,
    flops=_flops_backward,
    workspace=lambda grad, x, *_: 5 * tile_bytes(x),
)
