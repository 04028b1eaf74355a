"""Calls of the operators that only a compiler makes, the fused convolutions, and what each must produce."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from densebench.formats import CHANNELS_LAST
from densebench.kernels import bn_relu_conv3x3, bn_relu_conv3x3_backward, channel_statistics
from tests.kernels.problems import Draw, Problem, Shape, Values, doubled


def _weight(draw: Draw) -> Tensor:
    weight = draw.values(draw.shape.outputs, draw.shape.columns, *[3] * len(draw.shape.size))
    return weight.contiguous(memory_format=CHANNELS_LAST[weight.dim()]) if draw.shape.seed % 2 else weight


def _forward(shape: Shape) -> Problem:
    draw = Draw(shape)
    x = draw.slice(shape.rows, shape.columns)
    norm, weight = draw.norm(x), _weight(draw)
    out = draw.slice(shape.rows, shape.outputs).fill_(float("nan"))
    statistics = torch.full((2, shape.outputs), float("nan"), dtype=norm.mean.dtype).unbind()
    maps = (shape.size, shape.dilation)
    truth = bn_relu_conv3x3.reference(x.double(), *maps, doubled(norm), weight.double())

    def produced(a: list[Any], _: Any) -> Values:
        # The statistics are those of what was stored: held against that, which may be 0.
        mean, var = channel_statistics.reference(a[9].double())
        return {"out": a[9], "mean": a[10] - mean, "var": (a[11] - var) / var.clamp_min(1e-30)}

    zero = torch.zeros(shape.outputs, dtype=torch.float64)
    expected = {"out": truth, "mean": zero, "var": zero}
    return Problem("bn_relu_conv3x3", [x, *maps, *norm, weight, out, *statistics], expected, produced)


def _backward(shape: Shape) -> Problem:
    draw = Draw(shape)
    x = draw.slice(shape.rows, shape.columns)
    norm, weight, grad = draw.norm(x), _weight(draw), draw.slice(shape.rows, shape.outputs)
    grad_x = draw.slice(shape.rows, shape.columns).fill_(float("nan"))
    maps, names = (shape.size, shape.dilation), ("grad_x", "grad_gamma", "grad_beta", "grad_weight")
    truth = bn_relu_conv3x3_backward.reference(
        grad.double(), x.double(), *maps, doubled(norm), shape.by_batch, weight.double()
    )
    return Problem(
        "bn_relu_conv3x3_backward",
        [grad, x, *maps, *norm, shape.by_batch, weight, grad_x, True],
        dict(zip(names, truth, strict=True)),
        lambda a, out: dict(zip(names, (a[11], *out), strict=True)),
    )


CONVOLUTIONS: dict[str, Callable[[Shape], Problem]] = {
    "bn_relu_conv3x3": _forward,
    "bn_relu_conv3x3_backward": _backward,
}
