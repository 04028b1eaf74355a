"""A dense layer's convolution and its backward, for strategies that call no modules."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from densebench.kernels.rows import as_rows
from densebench.models.dimensions import Conv

_CONVOLUTION = {4: F.conv2d, 5: F.conv3d}  # by the number of dimensions of the weight


class ConvOptions(NamedTuple):
    """What a convolution of stride 1 without bias says beside its weight."""

    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @classmethod
    def of(cls, conv: Conv) -> ConvOptions:
        return cls(cast("tuple[int, ...]", conv.padding), conv.dilation)


_ONE_BY_ONE = ConvOptions((0, 0), (1, 1))


def convolve(a: Tensor, options: ConvOptions, weight: Tensor) -> Tensor:
    """The convolution of a with a weight in the dtype that it is to compute in; for code without autocast."""
    return convolve_as_given(a.to(weight.dtype), options, weight)


def convolve_as_given(a: Tensor, options: ConvOptions, weight: Tensor) -> Tensor:
    """The convolution as its module calls it."""
    return _CONVOLUTION[weight.dim()](a, weight, None, 1, options.padding, options.dilation)


def product(a: Tensor, weight: Tensor) -> Tensor:
    """a W^T [M, N] of a [M, C] and W [N, C], computed as precisely as the 1x1 convolution that it stands for."""
    if not _is_left_to_convolutions(a):
        return a @ weight.t()
    return as_rows(F.conv2d(_as_images(a), weight.contiguous()[:, :, None, None]))


def product_weight_gradient(grad: Tensor, a: Tensor) -> Tensor:
    """The gradient [N, C] of the product's weight, from that of the product [M, N]."""
    if not _is_left_to_convolutions(a):
        return grad.t() @ a
    weight = a.new_empty(grad.shape[1], a.shape[1], 1, 1)
    _, grad_weight = convolution_backward(_as_images(grad), _as_images(a), _ONE_BY_ONE, weight, False, True)
    return grad_weight.flatten(1)


def _is_left_to_convolutions(a: Tensor) -> bool:
    """On CUDA a matrix product of float32 obeys another switch (TF32) than a convolution does.

    On CPUs PyTorch's matrix products are MKL's, which on AMD's processors leave wide vectors unused; its
    convolutions are oneDNN's, which do not.
    """
    return a.dtype == torch.float32 and (a.is_cuda or torch.backends.mkldnn.is_available())


def _as_images(rows: Tensor) -> Tensor:
    """Rows [M, C] as the pixels of some images, which a 1x1 does not tell apart.

    One image, or a few on one thread, PyTorch keeps from oneDNN; 16 it never does.
    """
    count = next((n for n in range(16, 65) if rows.shape[0] % n == 0), 1)
    return rows.reshape(count, rows.shape[0] // count, 1, rows.shape[1]).permute(0, 3, 1, 2)


def convolution_backward(
    grad: Tensor, a: Tensor, options: ConvOptions, weight: Tensor, needs_a: bool, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of a and of the weight; one that is not needed is not computed and must not be read."""
    padding, dilation = map(list, options)
    ones, zeros = [1] * len(padding), [0] * len(padding)
    grad_a, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad.to(weight.dtype), a.to(weight.dtype), weight, None,
        ones, padding, dilation, False, zeros, 1, [needs_a, needs_weight, False],
    )  # fmt: skip
    return grad_a, grad_weight
