"""The CPU path's 3x3 and 3x3x3 convolutions, of rows that are normalized on the way (`convolutions.c`).

They serve where everything has the dtype that is computed in. Elsewhere a dense layer's convolution is the
library's, which reads its operand from memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from densebench.formats import CHANNELS_LAST
from densebench.kernels import compiled
from densebench.kernels.norm import Folded, Sums, store_statistics, threads_for
from densebench.kernels.products import Statistics, require, rows_apart


class Maps(NamedTuple):
    """What the rows of a matrix are the pixels of, and what of them a filter sees.

    Attributes:
        size: (H, W) of images, (D, H, W) of volumes.
        dilation: pixels from tap to tap.
    """

    size: Sequence[int]
    dilation: int

    @property
    def given(self) -> tuple[int, ...]:
        """As the compiled form takes them: planes of the filter, depth, height, width, dilation.

        A tap farther away than the longest side meets nothing, however far that is; the tile need not reach there.
        """
        image = (1, 1, *self.size) if len(self.size) == 2 else (3, *self.size)
        return (*image, min(self.dilation, max(self.size)))


def library(weight: Tensor, *matrices: Tensor | None) -> SimpleNamespace | None:
    """The compiled convolutions, if they take these: on a CPU, a dense weight [N, C, 3, 3] or [N, C, 3, 3, 3], and
    matrices of its dtype with the values of a row side by side.
    """
    found = compiled.library(weight.dtype, "convolutions") if weight.is_cpu else None
    last = CHANNELS_LAST.get(weight.dim())
    if found is None or last is None or set(weight.shape[2:]) != {3} or weight.numel() == 0:
        return None
    dense = weight.is_contiguous() or weight.is_contiguous(memory_format=last)
    given = [matrix for matrix in matrices if matrix is not None]
    alike = all(matrix.dtype == weight.dtype and rows_apart(matrix) for matrix in given)
    return found if dense and alike else None


def not_compiled(dtype: torch.dtype) -> str | None:
    """Why there are no compiled convolutions of a dtype here; None if there are."""
    if compiled.library(dtype, "convolutions") is not None:
        return None
    return f"fused convolutions are compiled C, and nothing is compiled here ({compiled.reason() or dtype})"


def convolve(
    x: Tensor, maps: Maps, norm: Folded, weight: Tensor, out: Tensor, statistics: Statistics | None
) -> None:
    """out [M, N] = relu(norm(x)) of x [M, C] through a weight that `library` takes, padded with zeros.

    `statistics` are those of `out`. Of matrices that `library` takes.

    Raises:
        ValueError: if shapes do not belong together.
    """
    form = library(weight, x, out)
    assert form is not None
    (rows, columns), outputs = x.shape, weight.shape[0]
    _require(x, maps, norm, weight, {"out": (out, (rows, outputs))})
    threads = threads_for(x)
    scratch = x.new_empty(form.relu_norm_convolution_scratch(*maps.given, columns, outputs, threads))
    pivot, sums = (None, None) if statistics is None else (x.new_empty(outputs), Sums(out))
    form.relu_norm_convolution(
        x, x.stride(0), _images(x, maps), *maps.given, columns, norm.table,
        *_strided(weight), outputs, out, out.stride(0),
        pivot, *((None, 0) if sums is None else sums.given[:2]), scratch, threads,
    )  # fmt: skip
    if statistics is not None and sums is not None and pivot is not None:
        store_statistics(sums, pivot, rows, *statistics)


def convolve_backward(
    grad: Tensor,
    x: Tensor,
    maps: Maps,
    norm: Folded,
    weight: Tensor,
    sums: Sums,
    grad_x: Tensor | None,
    grad_weight: Tensor | None,
) -> None:
    """From grad [M, N], that of relu(norm(x)) through the weight, all but what comes from the statistics being
    functions of x. Of matrices that `library` takes.

    Args:
        sums: with `grad_x`, take the column sums of dz and dz * (x - mean), with dz the gradient of norm(x).
        grad_x: [M, C], takes scale * dz; None: not needed.
        grad_weight: strided as the weight is; None: not needed.

    Raises:
        ValueError: if shapes or strides do not belong together.
    """
    form = library(weight, x, grad, grad_x)
    assert form is not None
    (rows, columns), outputs = x.shape, weight.shape[0]
    _require(x, maps, norm, weight, {"grad": (grad, (rows, outputs)), "grad_x": (grad_x, (rows, columns))})
    if grad_weight is not None and (grad_weight.shape, grad_weight.stride()) != (weight.shape, weight.stride()):
        raise ValueError(
            f"the gradient of a weight {list(weight.shape)} with strides {weight.stride()} lies as it does, "
            f"got {list(grad_weight.shape)} with strides {grad_weight.stride()}"
        )
    sums.require(columns)
    threads = min(threads_for(x), sums.parts.shape[0])
    given = (*maps.given, columns)
    size = form.relu_norm_convolution_backward_scratch(*given, outputs, grad_weight is not None, threads)
    scratch = x.new_empty(size)
    form.relu_norm_convolution_backward(
        grad, grad.stride(0), x, x.stride(0), _images(x, maps), *given,
        norm.table, *_strided(weight), outputs,
        grad_x, 0 if grad_x is None else grad_x.stride(0), *sums.given[:2], grad_weight,
        scratch, threads,
    )  # fmt: skip


def convolve_bytes(x: Tensor, maps: Maps, weight: Tensor) -> int:
    """Scratch of `convolve`, without statistics' sums."""
    return _bytes(x, maps, weight, "relu_norm_convolution_scratch", threads_for(x))


def convolve_backward_bytes(x: Tensor, maps: Maps, weight: Tensor, needs_weight: bool) -> int:
    """Scratch of `convolve_backward`."""
    return _bytes(x, maps, weight, "relu_norm_convolution_backward_scratch", needs_weight, threads_for(x))


def _bytes(x: Tensor, maps: Maps, weight: Tensor, name: str, *arguments: int) -> int:
    form = compiled.library(x.dtype, "convolutions")
    values: int = getattr(form, name)(*maps.given, x.shape[1], weight.shape[0], *arguments)
    return values * x.element_size()


def _images(x: Tensor, maps: Maps) -> int:
    return x.shape[0] // math.prod(maps.size)


def _strided(weight: Tensor) -> tuple[Tensor, int, int, int]:
    """With strides from output to output, channel to channel, tap to tap."""
    return weight, weight.stride(0), weight.stride(1), weight.stride(-1)


def _require(
    x: Tensor,
    maps: Maps,
    norm: Folded,
    weight: Tensor,
    matrices: dict[str, tuple[Tensor | None, tuple[int, int]]],
) -> None:
    sides = "x".join(map(str, maps.size))
    if len(maps.size) != weight.dim() - 2:
        raise ValueError(f"a weight {list(weight.shape)} is not for images of {sides}")
    if min(maps.size) < 1 or x.shape[0] % math.prod(maps.size) != 0:
        raise ValueError(f"{x.shape[0]} rows are not the pixels of whole images of {sides}")
    if maps.dilation < 1:
        raise ValueError(f"a dilation of {maps.dilation} is none; 1 is that of a filter without gaps")
    if weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"a convolution of {x.shape[1]} channels takes a weight of as many, got {list(weight.shape)}"
        )
    require("a convolution", x, {**matrices, "norm": (norm.table, (4, x.shape[1]))})
