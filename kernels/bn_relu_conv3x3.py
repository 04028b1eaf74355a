"""relu(norm(x)) through a 3x3 or 3x3x3 convolution, without the normalized x ever existing.

x is a bottleneck's output [M, C], out the channels that a layer adds to the feature buffer, whose statistics are
taken on the way. On a CPU, where it is compiled; on CUDA the operand goes through memory (`bn_relu`) to cuDNN's
convolution.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from densebench.kernels import compiled
from densebench.kernels.bn_relu import reference as bn_relu
from densebench.kernels.convolutions import Maps, convolve, convolve_bytes, library
from densebench.kernels.library import NORM, operator
from densebench.kernels.norm import Norm, sum_bytes
from densebench.kernels.products import wanted
from densebench.kernels.rows import as_rows

_CONVOLUTION = {2: F.conv2d, 3: F.conv3d}  # by the number of sides of an image


def reference(x: Tensor, size: Sequence[int], dilation: int, norm: Norm, weight: Tensor) -> Tensor:
    """The convolution of relu(norm(x)), [M, N].

    Bytes: relu(norm(x)) reads x and writes as much (2 M C), the convolution reads that again (M C) and writes M N,
    which is read for its statistics and copied to its place (3 M N); fused, M C + M N.
    """
    a = bn_relu(x, norm).to(weight.dtype).view(-1, *size, x.shape[1]).movedim(-1, 1)
    return as_rows(_CONVOLUTION[len(size)](a, weight, padding=dilation, dilation=dilation))


def require_compiled(weight: Tensor, *matrices: Tensor | None) -> None:
    """Raises ValueError, with what to use instead, unless the compiled form takes them."""
    if library(weight, *matrices) is None:
        given = ", ".join(f"{list(m.shape)} of {m.dtype}" for m in matrices if m is not None)
        raise ValueError(
            "a fused convolution takes a dense 3x3 or 3x3x3 weight and rows in one dtype, float32 or float64, "
            f"got {list(weight.shape)} of {weight.dtype} and {given}"
            + (f"; nothing is compiled here ({compiled.reason()})" if compiled.reason() else "")
            + "; use bn_relu and torch.nn.functional.conv2d or conv3d"
        )


def _cpu(
    x: Tensor,
    size: Sequence[int],
    dilation: int,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    weight: Tensor,
    out: Tensor,
    out_mean: Tensor | None,
    out_var: Tensor | None,
) -> None:
    require_compiled(weight, x, out)
    statistics = wanted(out_mean, out_var, weight.shape[0])
    convolve(x, Maps(size, dilation), Norm(mean, var, gamma, beta, eps).folded(), weight, out, statistics)


def _fake(x: Tensor, weight: Tensor, out: Tensor) -> None:
    torch._check(weight.shape[1] == x.shape[1])
    torch._check(out.shape == (x.shape[0], weight.shape[0]))


def _flops(x: Tensor, weight: Tensor) -> int:
    return 2 * x.shape[0] * weight.numel()


def _workspace(
    x: Tensor,
    size: Sequence[int],
    dilation: int,
    mean: Tensor,
    weight: Tensor,
    out: Tensor,
    out_mean: Tensor | None,
) -> int:
    statistics = 0 if out_mean is None else sum_bytes(out) + out_mean.nbytes
    return 4 * mean.nbytes + convolve_bytes(x, Maps(size, dilation), weight) + statistics


bn_relu_conv3x3 = operator(
    f"bn_relu_conv3x3(Tensor x, int[] size, int dilation, {NORM}, Tensor weight, Tensor(a!) out,"
    " Tensor(b!)? out_mean, Tensor(c!)? out_var) -> ()",
    """out [M, N] = relu(norm(x)) through the weight, padded with zeros to keep the size.

    x is [M, C], the pixels of images of `size` [H, W] for a weight [N, C, 3, 3], of volumes of [D, H, W] for one
    of [N, C, 3, 3, 3]. out_mean, out_var [N] take the statistics of out.
    """,
    cpu=_cpu,
    cuda=None,
    fake=_fake,
    flops=_flops,
    workspace=_workspace,
)
