"""Calls of every operator on drawn data, and what each must produce by the references in float64.

A gradient buffer is compared as the gradient that it stands for, so implementations may defer what they like.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import densebench.kernels.bn_relu_pool_backward  # noqa: F401  (registers its operators)
from densebench.kernels import (
    bn_relu,
    bn_relu_backward,
    bn_relu_conv1x1,
    bn_relu_conv1x1_backward,
    bn_relu_pool,
    channel_statistics,
    compiled,
    deferred,
)
from densebench.kernels.library import IMPLEMENTATIONS
from densebench.kernels.norm import Norm
from densebench.kernels.rows import accumulate_dtype

Values = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """What a problem is drawn for.

    Attributes:
        rows, columns, outputs: M, C, N; maps are [images, height, width, C] with M = images x height x width.
        extra: columns that the buffer of x has beside its own, `before` of them before.
        affine: whether the norm has gamma and beta.
        integers: small integers and powers of two, on which every order of summation is exact.
        depth, dilation: for convolutions; with a depth images are volumes.
    """

    images: int = 2
    height: int = 5
    width: int = 7
    columns: int = 20
    outputs: int = 12
    extra: int = 9
    before: int = 0
    dtype: torch.dtype = torch.float64
    affine: bool = True
    by_batch: bool = True
    accumulate: bool = True
    integers: bool = False
    mean_over_std: float = 0.5
    seed: int = 0
    depth: int | None = None
    dilation: int = 1

    @property
    def size(self) -> tuple[int, ...]:
        """Of an image, or of a volume."""
        image = self.height, self.width
        return image if self.depth is None else (self.depth, *image)

    @property
    def rows(self) -> int:
        return self.images * math.prod(self.size)


@dataclass(frozen=True)
class Problem:
    """Arguments of an operator; `expected` in float64; `produced` reads the same from a call's outcome."""

    operator: str
    arguments: list[Any]
    expected: Values
    produced: Callable[[list[Any], Any], Values]

    def solve(self, implementation: str) -> Values:
        """Run on copies of the arguments, buffers around slices included."""
        arguments = [_copy(a) for a in self.arguments]
        return self.produced(arguments, call(self.operator, implementation, arguments))


def call(operator: str, implementation: str, arguments: list[Any]) -> Any:
    """One of an operator's implementations: "cpu", "cpu uncompiled" (as without a C compiler) or "cuda"."""
    function = getattr(IMPLEMENTATIONS[operator], implementation.split()[0])
    with compiled.using(None) if "uncompiled" in implementation else contextlib.nullcontext():
        return function(*arguments)


def _copy(argument: Any) -> Any:
    if not isinstance(argument, Tensor):
        return argument
    whole = torch.empty(0, dtype=argument.dtype).set_(argument.untyped_storage().clone())
    return whole.as_strided(argument.shape, argument.stride(), argument.storage_offset())


class Draw:
    """Random operands of one shape."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.generator = torch.Generator().manual_seed(shape.seed)

    def values(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal, or small integers."""
        dtype = dtype or self.shape.dtype
        if self.shape.integers:
            return torch.randint(-3, 4, size, generator=self.generator).to(dtype)
        return torch.randn(*size, generator=self.generator, dtype=torch.float64).to(dtype)

    def slice(self, rows: int, columns: int) -> Tensor:
        """[M, C] in a wider buffer; what is beside it is NaN, and must neither be read into a result nor
        written."""
        whole = torch.full((rows, columns + self.shape.extra), float("nan"), dtype=self.shape.dtype)
        part = whole[:, self.shape.before : self.shape.before + columns]
        part.copy_(self.values(rows, columns))
        if not self.shape.integers:
            part += self.shape.mean_over_std
        return part

    def norm(self, x: Tensor) -> Norm:
        """The norm of x's columns; by integers, one whose results are integers too."""
        dtype, columns = accumulate_dtype(x), x.shape[-1]
        if self.shape.integers:
            mean = torch.randint(-1, 2, (columns,), generator=self.generator).to(dtype)
            var = torch.full((columns,), 0.25, dtype=dtype)
            eps = 0.0
        else:
            rows = x.reshape(-1, columns).to(dtype)
            mean, var, eps = rows.mean(0), rows.var(0, correction=0), 1e-3
        if not self.shape.affine:
            return Norm(mean, var, None, None, eps)
        gamma, beta = self.values(columns, dtype=dtype), self.values(columns, dtype=dtype)
        return Norm(mean, var, gamma, beta, eps)


def doubled(norm: Norm) -> Norm:
    return Norm(*(None if t is None else t.double() for t in norm[:4]), norm.eps)  # type: ignore[arg-type]


def _channel_statistics(shape: Shape) -> Problem:
    x = Draw(shape).slice(shape.rows, shape.columns)
    empty = torch.full((2, shape.columns), float("nan"), dtype=accumulate_dtype(x)).unbind()
    mean, var = channel_statistics.reference(x.double())
    return Problem(
        "channel_statistics", [x, *empty], {"mean": mean, "var": var}, lambda a, _: {"mean": a[1], "var": a[2]}
    )


def _channel_statistics_storing(shape: Shape) -> Problem:
    draw = Draw(shape)
    x, empty = draw.values(shape.rows, shape.columns), _channel_statistics(shape).arguments[1:]
    out = draw.slice(shape.rows, shape.columns).fill_(float("nan"))
    mean, var = channel_statistics.reference(x.double())
    return Problem(
        "channel_statistics",
        [x, *empty, out],
        {"mean": mean, "var": var, "out": x.double()},
        lambda a, _: {"mean": a[1], "var": a[2], "out": a[3]},
    )


def _bn_relu(shape: Shape) -> Problem:
    draw = Draw(shape)
    x = draw.slice(shape.rows, shape.columns)
    norm = draw.norm(x)
    out = torch.full_like(x, float("nan"))
    expected = bn_relu.reference(x.double(), doubled(norm))
    return Problem("bn_relu", [x, *norm, out], {"out": expected}, lambda a, _: {"out": a[-1]})


def _bn_relu_backward(shape: Shape) -> Problem:
    draw = Draw(shape)
    x = draw.slice(shape.rows, shape.columns)
    norm, grad = draw.norm(x), draw.values(shape.rows, shape.columns)
    names = ("grad_x", "grad_gamma", "grad_beta")
    truth = bn_relu_backward.reference(grad.double(), x.double(), doubled(norm), shape.by_batch)
    return Problem(
        "bn_relu_backward",
        [grad, x, *norm, shape.by_batch],
        dict(zip(names, truth, strict=True)),
        lambda a, sums: dict(zip(names, (a[0], *sums), strict=True)),
    )


class Buffer:
    """A gradient buffer with terms pending in it, and the gradient that it stands for."""

    def __init__(self, draw: Draw, x: Tensor, norm: Norm) -> None:
        shape = draw.shape
        self.x, self.norm = x, norm
        self.grad = draw.slice(shape.rows, shape.columns)
        pending = draw.values(2, shape.columns + shape.extra, dtype=norm.mean.dtype)
        self.pending = pending[:, : shape.columns]
        if not shape.accumulate:
            self.grad.fill_(float("nan"))
            self.pending.zero_()
        self.before = self.meant(self.grad, self.pending) if shape.accumulate else torch.zeros_like(x).double()

    def meant(self, grad: Tensor, pending: Tensor) -> Tensor:
        centered = self.x.double() - self.norm.mean.double()
        slope = pending[1].double()
        return grad.double() - pending[0].double() - torch.where(slope == 0, 0, centered * slope)


def _bn_relu_backward_into(shape: Shape) -> Problem:
    draw = Draw(shape)
    x = draw.slice(shape.rows, shape.columns)
    norm, grad = draw.norm(x), draw.values(shape.rows, shape.columns)
    buffer = Buffer(draw, x, norm)
    grad_x, *sums = bn_relu_backward.reference(grad.double(), x.double(), doubled(norm), shape.by_batch)
    expected = {"grad_x": buffer.before + grad_x, "grad_gamma": sums[0], "grad_beta": sums[1]}
    return Problem(
        "bn_relu_backward_into",
        [grad, x, *norm, shape.by_batch, buffer.grad, shape.accumulate, buffer.pending],
        expected,
        lambda a, sums: {
            "grad_x": buffer.meant(a[8], a[10]), "grad_gamma": sums[0], "grad_beta": sums[1]
        },
    )  # fmt: skip


def _bn_relu_conv1x1(shape: Shape) -> Problem:
    draw = Draw(shape)
    x = draw.slice(shape.rows, shape.columns)
    norm, weight = draw.norm(x), draw.values(shape.outputs, shape.columns)
    out = torch.full((shape.rows, shape.outputs), float("nan"), dtype=shape.dtype)
    statistics = torch.full((2, shape.outputs), float("nan"), dtype=norm.mean.dtype).unbind()
    truth = bn_relu_conv1x1.reference(x.double(), doubled(norm), weight.double())

    def produced(a: list[Any], _: Any) -> Values:
        # The statistics are those of the product as stored: held against the product itself, which may be 0.
        mean, var = channel_statistics.reference(a[7].double())
        return {"out": a[7], "mean": a[8] - mean, "var": (a[9] - var) / var.clamp_min(1e-30)}

    zero = torch.zeros(shape.outputs, dtype=torch.float64)
    return Problem(
        "bn_relu_conv1x1",
        [x, *norm, weight, out, *statistics],
        {"out": truth, "mean": zero, "var": zero},
        produced,
    )


def _bn_relu_conv1x1_epilogue(shape: Shape) -> Problem:
    draw = Draw(shape)
    x = draw.slice(shape.rows, shape.columns)
    norm, weight = draw.norm(x), draw.values(shape.outputs, shape.columns)
    out = torch.full((shape.rows, shape.outputs), float("nan"), dtype=shape.dtype)
    truth = bn_relu_conv1x1.reference(x.double(), doubled(norm), weight.double())
    following = draw.norm(truth.to(shape.dtype))
    return Problem(
        "bn_relu_conv1x1",
        [x, *norm, weight, out, None, None, *following],
        {"out": bn_relu.reference(truth, doubled(following))},
        lambda a, _: {"out": a[7]},
    )


def _bn_relu_conv1x1_backward(shape: Shape) -> Problem:
    draw = Draw(shape)
    x = draw.slice(shape.rows, shape.columns)
    norm, weight = draw.norm(x), draw.values(shape.outputs, shape.columns)
    grad, buffer = draw.values(shape.rows, shape.outputs), Buffer(draw, x, norm)
    names = ("grad_gamma", "grad_beta", "grad_weight")
    grad_x, *rest = bn_relu_conv1x1_backward.reference(
        grad.double(), x.double(), doubled(norm), shape.by_batch, weight.double()
    )
    return Problem(
        "bn_relu_conv1x1_backward",
        [grad, x, *norm, shape.by_batch, weight, buffer.grad, shape.accumulate, buffer.pending, True, True],
        {"grad_x": buffer.before + grad_x, **dict(zip(names, rest, strict=True))},
        lambda a, out: {"grad_x": buffer.meant(a[9], a[11]), **dict(zip(names, out, strict=True))},
    )


def _settled_gradient(shape: Shape) -> Problem:
    draw = Draw(shape)
    x = draw.slice(shape.rows, shape.columns)
    norm = draw.norm(x)
    buffer = Buffer(draw, x, norm)
    out = torch.full((shape.rows, shape.columns), float("nan"), dtype=shape.dtype)
    grad = buffer.grad if shape.accumulate else torch.zeros_like(x)
    truth = deferred.reference(grad.double(), x.double(), norm.mean.double(), buffer.pending.double())
    return Problem(
        "settled_gradient",
        [grad, x, norm.mean, buffer.pending, out],
        {"out": truth},
        lambda a, _: {"out": a[4]},
    )


def _grid(rows: Tensor, shape: Shape) -> Tensor:
    return rows.view(shape.images, shape.height, shape.width, rows.shape[1])


def _pool(pool: str) -> Callable[[Shape], Problem]:
    def build(shape: Shape) -> Problem:
        draw = Draw(shape)
        x = _grid(draw.slice(shape.rows, shape.columns), shape)
        norm = draw.norm(x)
        truth = bn_relu_pool.reference(x.double(), doubled(norm), pool)
        wide = torch.full((*truth.shape[:3], shape.columns + shape.extra), float("nan"), dtype=shape.dtype)
        return Problem(
            f"bn_relu_{pool}_pool",
            [x, *norm, wide[..., : shape.columns]],
            {"out": truth},
            lambda a, _: {"out": a[-1]},
        )

    return build


def _pool_backward(pool: str) -> Callable[[Shape], Problem]:
    def build(shape: Shape) -> Problem:
        draw = Draw(shape)
        rows = draw.slice(shape.rows, shape.columns)
        x, norm = _grid(rows, shape), draw.norm(rows)
        exact = x.to(torch.float64, copy=True).requires_grad_()
        pooled = bn_relu_pool.reference(exact, doubled(norm), pool)
        grad = draw.values(*pooled.shape)
        # Through ReLU and pooling by autograd; through the norm by the reference.
        a = bn_relu.reference(rows.double(), doubled(norm)).requires_grad_()
        identity = Norm(torch.zeros(1), torch.ones(1), None, None, 0.0)
        unit = Norm(*(t.double().expand(shape.columns) for t in identity[:2]), None, None, 0.0)
        bn_relu_pool.reference(_grid(a, shape), unit, pool).backward(grad.double())
        assert a.grad is not None
        grad_x, *sums = bn_relu_backward.reference(a.grad, rows.double(), doubled(norm), shape.by_batch)
        buffer = Buffer(draw, rows, norm)
        pending = [] if pool == "max" else [torch.zeros(2, shape.columns, dtype=norm.mean.dtype)]
        out = _grid(torch.full_like(rows, float("nan")), shape)

        def produced(arguments: list[Any], sums: Any) -> Values:
            written = arguments[8].reshape(shape.rows, shape.columns)
            value = buffer.meant(written, arguments[9]) if pending else written
            return {"grad_x": value, "grad_gamma": sums[0], "grad_beta": sums[1]}

        return Problem(
            f"bn_relu_{pool}_pool_backward",
            [grad, x, *norm, shape.by_batch, out, *pending],
            {"grad_x": grad_x, "grad_gamma": sums[0], "grad_beta": sums[1]},
            produced,
        )

    return build


PROBLEMS: dict[str, Callable[[Shape], Problem]] = {
    "channel_statistics": _channel_statistics,
    "channel_statistics_storing": _channel_statistics_storing,
    "bn_relu": _bn_relu,
    "bn_relu_backward": _bn_relu_backward,
    "bn_relu_backward_into": _bn_relu_backward_into,
    "bn_relu_conv1x1": _bn_relu_conv1x1,
    "bn_relu_conv1x1_epilogue": _bn_relu_conv1x1_epilogue,
    "bn_relu_conv1x1_backward": _bn_relu_conv1x1_backward,
    "settled_gradient": _settled_gradient,
    "bn_relu_max_pool": _pool("max"),
    "bn_relu_avg_pool": _pool("avg"),
    "bn_relu_max_pool_backward": _pool_backward("max"),
    "bn_relu_avg_pool_backward": _pool_backward("avg"),
}
