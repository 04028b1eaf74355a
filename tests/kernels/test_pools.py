"""The compiled pools against PyTorch's: lines and pixels of every remainder, ties, on every vector width."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from densebench.kernels import compiled, pools
from densebench.kernels.bn_relu_pool import STEM
from densebench.kernels.library import WORKSPACE
from densebench.kernels.norm import Folded, Sums
from densebench.measure.memory import measure_peak
from tests.kernels.other_vectors import NARROWER, compiled_with
from tests.kernels.problems import PROBLEMS, Shape
from tests.kernels.test_operators import Call

pytestmark = pytest.mark.skipif(
    compiled.library(torch.float32, "pools") is None, reason=f"nothing is compiled here: {compiled.reason()}"
)


def map_of(values: Tensor, dtype: torch.dtype, beside: int = 3) -> Tensor:
    """[N, H, W, C] as a slice of wider pixels; what is beside them is NaN."""
    whole = torch.full((*values.shape[:3], values.shape[3] + beside), float("nan"), dtype=dtype)
    whole[..., : values.shape[3]] = values
    return whole[..., : values.shape[3]]


class Drawn:
    """A map, its norm and gradients. Of few whole values, so that many are equal and arithmetic is exact."""

    def __init__(self, shape: tuple[int, int, int, int], pool: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.pool, columns = pool, shape[3]
        self.x = map_of(torch.randint(-3, 4, shape), dtype)
        windows = (shape[0], *pools.pooled_size(*shape[1:3], pool), columns)
        self.grad = map_of(4 * torch.randint(-3, 4, windows), dtype)
        mean, scale = torch.randint(-1, 2, (columns,)), torch.randint(-2, 3, (columns,))
        self.norm = Folded(torch.stack((mean, mean, scale, -mean * scale)).to(dtype))
        self.terms = torch.randint(-3, 4, (2, columns)).to(dtype)

    def z(self) -> Tensor:
        """norm(x) in float64, whose gradient is to be found."""
        return (self.x.double() * self.norm.scale.double() + self.norm.shift.double()).requires_grad_()

    def pooled(self, z: Tensor) -> Tensor:
        """relu(z) pooled by PyTorch, [N, H', W', C]."""
        a = torch.relu(z).permute(0, 3, 1, 2)
        pooled = F.max_pool2d(a, *STEM) if self.pool == "max" else F.avg_pool2d(a, 2)
        return pooled.permute(0, 2, 3, 1)

    def forward(self) -> Tensor:
        out = map_of(torch.full(self.grad.shape, float("nan")), self.x.dtype)
        (pools.largest if self.pool == "max" else pools.mean)(self.x, self.norm, out)
        return out

    def backward(self, terms: Tensor | None) -> list[Tensor]:
        """The gradient of x and the sums; those of maxima are had without it first, as terms are made of them."""
        sums, grad_x = Sums(self.x), map_of(torch.full(self.x.shape, float("nan")), self.x.dtype)
        operands = (self.grad, self.x, self.norm)
        if self.pool == "avg":
            pools.mean_backward(*operands, sums, grad_x)
        elif terms is None:
            pools.largest_backward(*operands, None, sums, grad_x)
        else:
            pools.largest_backward(*operands, None, sums, None)
            pools.largest_backward(*operands, terms, None, grad_x)
        return [grad_x, sums.total()]

    def expected_backward(self, terms: Tensor | None) -> list[Tensor]:
        z, centered = self.z(), self.x.double() - self.norm.mean.double()
        self.pooled(z).backward(self.grad.double())
        dz = z.grad
        assert dz is not None
        grad_x = self.norm.scale.double() * dz
        if terms is not None and self.pool == "max":
            grad_x -= terms[0] + centered * terms[1]
        return [grad_x, torch.stack((dz.sum((0, 1, 2)), (dz * centered).sum((0, 1, 2))))]

    def check(self) -> None:
        """Bit for bit."""
        assert torch.equal(self.forward().double(), self.pooled(self.z()))
        for terms in (None, self.terms):
            for found, expected in zip(self.backward(terms), self.expected_backward(terms), strict=True):
                assert torch.equal(found.double(), expected)


SHAPES = {
    "max": [
        (1, 1, 1, 1),
        (2, 1, 7, 3),
        (3, 2, 1, 5),
        (1, 2, 2, 16),
        (2, 3, 4, 17),
        (3, 8, 5, 33),
        (2, 19, 18, 64),
    ],
    "avg": [
        (1, 2, 2, 1),
        (2, 2, 7, 3),
        (3, 3, 2, 5),
        (1, 4, 4, 16),
        (2, 3, 5, 17),
        (3, 8, 5, 33),
        (2, 19, 18, 64),
    ],
}
CASES = [(pool, shape) for pool, shapes in SHAPES.items() for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threads_in_use", [1, 2, 3, 7])
@pytest.mark.parametrize(("pool", "shape"), CASES)
def test_as_pytorch_does(
    pool: str, shape: tuple[int, int, int, int], threads_in_use: int, dtype: torch.dtype
) -> None:
    torch.set_num_threads(threads_in_use)
    Drawn(shape, pool, dtype).check()


@pytest.mark.parametrize("flags", NARROWER)
def test_with_narrower_vectors(flags: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with compiled_with(flags, tmp_path, monkeypatch):
        for dtype in (torch.float32, torch.float64):
            for pool, shape in CASES:
                Drawn(shape, pool, dtype).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("pool", "shape"), CASES)
def test_values_that_are_not_whole(pool: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """Each to within rounding beside the largest of its kind."""
    drawn = Drawn(shape, pool, dtype)
    for values in (drawn.x, drawn.grad, drawn.norm.table, drawn.terms):
        values.copy_(torch.randn(values.shape, dtype=torch.float64))
    gate = 1e-5 if dtype == torch.float32 else 1e-13
    found, expected = [drawn.forward()], [drawn.pooled(drawn.z()).detach()]
    for terms in (None, drawn.terms):
        found += drawn.backward(terms)
        expected += drawn.expected_backward(terms)
    for value, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(value.double(), truth, rtol=0, atol=gate * (1 + float(truth.abs().max())))


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
@pytest.mark.parametrize("pool", ["max", "avg"])
def test_nan_and_infinity(pool: str, value: float) -> None:
    """At an edge and inside, alone, two in one window, and a window of nothing else in a corner."""
    drawn = Drawn((2, 6, 7, 5), pool, torch.float64)
    drawn.x[0, 0, 0, 1] = drawn.x[1, 3, 4, 2] = drawn.x[1, 5, 6] = value
    drawn.x[0, 2, 3, 3] = drawn.x[0, 3, 2, 3] = value
    drawn.x[1, :2, :2, 4] = value
    exactly = {"rtol": 0, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(drawn.forward(), drawn.pooled(drawn.z()).detach(), **exactly)
    for found, expected in zip(drawn.backward(None), drawn.expected_backward(None), strict=True):
        torch.testing.assert_close(found, expected, **exactly)


def test_as_many_threads_the_same_bits() -> None:
    torch.set_num_threads(3)
    for pool in ("max", "avg"):
        drawn = Drawn((3, 18, 17, 40), pool, torch.float32)
        drawn.x.normal_()
        drawn.grad.normal_()
        first = drawn.backward(drawn.terms)
        for _ in range(20):
            for again, before in zip(drawn.backward(drawn.terms), first, strict=True):
                assert torch.equal(again, before)


def test_as_many_threads_as_there_are_sums_for() -> None:
    for pool in ("max", "avg"):
        drawn = Drawn((3, 18, 17, 40), pool, torch.float32)
        grad_x = torch.empty_like(drawn.x)
        torch.set_num_threads(1)
        sums = Sums(drawn.x)
        torch.set_num_threads(4)
        if pool == "max":
            pools.largest_backward(drawn.grad, drawn.x, drawn.norm, None, sums, grad_x)
        else:
            pools.mean_backward(drawn.grad, drawn.x, drawn.norm, sums, grad_x)
        assert torch.equal(sums.total(), drawn.expected_backward(None)[1])


@pytest.mark.parametrize("threads_in_use", [1, 4])
@pytest.mark.parametrize("name", ["bn_relu_max_pool", "bn_relu_avg_pool"])
@pytest.mark.parametrize("way", ["", "_backward"])
def test_workspace_is_what_the_allocator_saw(name: str, way: str, threads_in_use: int) -> None:
    """Of channels so many that vectors of them are large."""
    torch.set_num_threads(threads_in_use)
    shape = Shape(images=2, height=18, width=18, columns=16_000, extra=0, dtype=torch.float32)
    problem = PROBLEMS[name + way](shape)
    operator = getattr(torch.ops.densebench, name + way)
    declared = WORKSPACE[operator](*problem.arguments)
    returned = sum(t.nbytes for t in operator(*problem.arguments) or ())
    peak = measure_peak(lambda: Call(operator, problem), torch.device("cpu"), repeats=1).peak_allocated_bytes
    assert peak - returned == pytest.approx(declared, rel=0.05)


def test_what_it_does_not_take() -> None:
    """And no map that is there in name only: what a step will need is asked with such."""
    for mode in (contextlib.nullcontext(), FakeTensorMode()):
        with mode:
            x = torch.empty(2, 4, 4, 6)
            assert pools.library(x, torch.empty(2, 2, 2, 6)) is not None
            assert pools.library(x, x.double()) is None
            assert pools.library(x.bfloat16()) is None
            assert pools.library(x[:, :, :3]) is None  # no matrix of pixels
            assert pools.library(x[:, ::2]) is None
            assert pools.library(x.movedim(1, 3)) is None  # values of a pixel apart
            assert pools.library(x[..., :1].expand(x.shape)) is None  # and in one place
            assert pools.library(x[:0]) is None
            assert pools.library(x[0]) is None
            assert pools.library(x[:, :1, :1], x[:1, :, :1], x[:1, :1, :, :2]) is not None
            with compiled.using(None):
                assert pools.library(x) is None


def test_other_shapes_are_refused() -> None:
    """The compiled form is given addresses; what it was not made for it must not be handed."""
    x, norm, sums = torch.ones(2, 4, 4, 6), Folded(torch.ones(4, 6)), Sums(torch.ones(2, 4, 4, 6))
    out, wide = torch.ones(2, 2, 2, 6), torch.ones(2, 2, 3, 6)
    for forward in (pools.largest, pools.mean):
        with pytest.raises(ValueError, match="takes out of"):
            forward(x, norm, wide)
        with pytest.raises(ValueError, match="takes norm of"):
            forward(x, Folded(torch.ones(4, 5)), out)
        with pytest.raises(ValueError, match="in that dtype"):
            forward(x, norm, out.double())
        with pytest.raises(ValueError, match="matrices of pixels"):
            forward(torch.ones(2, 4, 8, 6)[:, :, :4], norm, out)
    with pytest.raises(ValueError, match="takes grad of"):
        pools.mean_backward(wide, x, norm, sums, x)
    with pytest.raises(ValueError, match="takes grad_x of"):
        pools.largest_backward(out, x, norm, None, sums, out)
    with pytest.raises(ValueError, match="takes terms of"):
        pools.largest_backward(out, x, norm, torch.ones(2, 5), None, x)
    with pytest.raises(ValueError, match="do not belong"):
        pools.mean_backward(out, x, norm, Sums(wide[..., :5]), x)
