"""Backward through relu(norm(x)) and the 3x3 or 3x3x3 convolution that reads it, which is made anew tile by tile.

On a CPU, where it is compiled (see `bn_relu_conv3x3`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from densebench.kernels.bn_relu import reference as bn_relu
from densebench.kernels.bn_relu_backward import reference as bn_relu_backward
from densebench.kernels.bn_relu_conv3x3 import require_compiled
from densebench.kernels.convolutions import Maps, convolve_backward, convolve_backward_bytes
from densebench.kernels.deferred import settle_rows
from densebench.kernels.library import NORM, operator
from densebench.kernels.norm import Norm, Sums, norm_gradients, sum_bytes
from densebench.kernels.rows import as_rows


def reference(
    grad: Tensor, x: Tensor, size: Sequence[int], dilation: int, norm: Norm, by_batch: bool, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(grad_x [M, C], dgamma, dbeta, dW).

    Bytes: relu(norm(x)) is made anew (2 M C), the convolution's backward reads it and grad twice and writes M C
    (3 M C + 2 M N), the norm's reads that and x twice and writes M C (5 M C). In one pass, and one for what comes
    from the statistics, 5 M C + M N.
    """

    def as_maps(rows: Tensor) -> Tensor:
        return rows.view(-1, *size, rows.shape[1]).movedim(-1, 1)

    ones, zeros, apart = ([value] * len(size) for value in (1, 0, dilation))
    a = bn_relu(x, norm).to(weight.dtype)
    grad_a, grad_weight, _ = torch.ops.aten.convolution_backward(
        as_maps(grad.to(weight.dtype)), as_maps(a), weight, None,
        ones, apart, apart, False, zeros, 1, [True, True, False],
    )  # fmt: skip
    return *bn_relu_backward(as_rows(grad_a).to(norm.mean.dtype), x, norm, by_batch), grad_weight


def _cpu(
    grad: Tensor,
    x: Tensor,
    size: Sequence[int],
    dilation: int,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    by_batch: bool,
    weight: Tensor,
    grad_x: Tensor | None,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    require_compiled(weight, grad, x, grad_x)
    norm, sums = Norm(mean, var, gamma, beta, eps).folded(), Sums(x)
    grad_weight = torch.empty_like(weight) if needs_weight else weight.new_empty(0)
    made = grad_weight if needs_weight else None
    convolve_backward(grad, x, Maps(size, dilation), norm, weight, sums, grad_x, made)
    gradients = norm_gradients(sums, norm, x.shape[0])
    if by_batch and grad_x is not None:
        settle_rows(grad_x, x, mean, gradients.terms, grad_x)
    return gradients.gamma, gradients.beta, grad_weight


def _fake(mean: Tensor, weight: Tensor, needs_weight: bool) -> tuple[Tensor, Tensor, Tensor]:
    made = torch.empty_like(weight) if needs_weight else weight.new_empty(0)
    return torch.empty_like(mean), torch.empty_like(mean), made


def _flops(x: Tensor, weight: Tensor, grad_x: Tensor | None, needs_weight: bool) -> int:
    return (int(grad_x is not None) + int(needs_weight)) * 2 * x.shape[0] * weight.numel()


def _workspace(
    x: Tensor, size: Sequence[int], dilation: int, mean: Tensor, weight: Tensor, needs_weight: bool
) -> int:
    scratch = convolve_backward_bytes(x, Maps(size, dilation), weight, needs_weight)
    return 6 * mean.nbytes + scratch + sum_bytes(x)


bn_relu_conv3x3_backward = operator(
    f"bn_relu_conv3x3_backward(Tensor grad, Tensor x, int[] size, int dilation, {NORM}, bool by_batch,"
    " Tensor weight, Tensor(a!)? grad_x, bool needs_weight) -> (Tensor, Tensor, Tensor)",
    """Through relu(norm(x)) and a convolution of it, from the gradient grad [M, N] of what that makes.

    For a norm that is the only reader of x [M, C]: grad_x [M, C] is written whole; None: not needed, nor are
    dgamma and dbeta, which are 0 then. Returns (dgamma, dbeta, dW as `weight`); without `needs_weight` dW is [0].
    """,
    cpu=_cpu,
    cuda=None,
    fake=_fake,
    flops=_flops,
    workspace=_workspace,
)
