"""A dense layer's convolution and its backward, for strategies that call no modules."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def convolve(a: Tensor, conv: nn.Conv2d, weight: Tensor) -> Tensor:
    """conv(a) with another weight (the module's, in the dtype that it is to compute in); no bias, stride 1."""
    return F.conv2d(a.to(weight.dtype), weight, None, 1, conv.padding, conv.dilation)


def convolution_backward(
    grad: Tensor, a: Tensor, conv: nn.Conv2d, weight: Tensor, needs_a: bool, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of a and of the weight; one that is not needed is not computed and must not be read."""
    padding, dilation = list(conv.padding), list(conv.dilation)
    grad_a, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad.to(weight.dtype), a.to(weight.dtype), weight, None,
        [1, 1], padding, dilation, False, [0, 0], 1, [needs_a, needs_weight, False],
    )  # fmt: skip
    return grad_a, grad_weight
