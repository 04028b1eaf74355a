"""The compiled products against PyTorch's: blocks, tiles and threads of every remainder, on every vector width."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from densebench.kernels import compiled, products
from densebench.kernels.bn_relu_conv1x1 import bn_relu_conv1x1
from densebench.kernels.bn_relu_conv1x1_backward import bn_relu_conv1x1_backward
from densebench.kernels.norm import Folded, Norm, Sums
from tests.kernels.other_vectors import NARROWER, compiled_with

pytestmark = pytest.mark.skipif(
    compiled.library(torch.float32, "products") is None, reason=f"nothing is compiled here: {compiled.reason()}"
)


def drawn(rows: int, columns: int, dtype: torch.dtype, beside: int = 3) -> Tensor:
    """The first columns of a wider matrix; what is beside them is NaN."""
    whole = torch.full((rows, columns + beside), float("nan"), dtype=dtype)
    whole[:, :columns] = torch.randn(rows, columns, dtype=torch.float64)
    return whole[:, :columns]


def norm_of(columns: int, dtype: torch.dtype) -> Folded:
    mean, var, gamma, beta = torch.randn(4, columns, dtype=torch.float64).to(dtype)
    return Norm(mean, var.square() + 0.1, gamma, beta, 1e-5).folded()


class Drawn:
    """Operands of one shape, and what the products make of them."""

    def __init__(self, rows: int, columns: int, outputs: int, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.x, self.grad = drawn(rows, columns, dtype), drawn(rows, outputs, dtype)
        self.norm, self.following = norm_of(columns, dtype), norm_of(outputs, dtype)
        self.weight = drawn(outputs, columns, dtype)
        self.buffer = drawn(rows, columns, dtype)

    def a(self) -> Tensor:
        """relu(norm(x)) in float64."""
        return torch.relu(self.x.double() * self.norm.scale.double() + self.norm.shift.double())

    def forward(self, following: bool) -> list[Tensor]:
        out = drawn(*self.grad.shape, self.x.dtype).fill_(float("nan"))
        statistics = products.Statistics(*torch.full((2, out.shape[1]), float("nan"), dtype=out.dtype))
        norm = self.following if following else None
        products.multiply(self.x, self.norm, self.weight, out, norm, statistics)
        without = torch.full_like(out, float("nan"))
        products.multiply(self.x, self.norm, self.weight, without, norm, None)
        assert torch.equal(out.nan_to_num(7.0), without.nan_to_num(7.0))
        return [out, *statistics]

    def expected_forward(self, following: bool) -> list[Tensor]:
        y = self.a() @ self.weight.double().t()
        if following:
            y = torch.relu(y * self.following.scale.double() + self.following.shift.double())
        return [y, y.mean(0), y.var(0, correction=0)]

    def backward(self, accumulate: bool) -> list[Tensor]:
        sums = Sums(self.x)
        whole = self.buffer._base.clone() if self.buffer._base is not None else self.buffer.clone()
        grad_x = whole[:, : self.x.shape[1]]
        if not accumulate:
            grad_x.fill_(float("nan"))
        grad_weight = torch.full(self.weight.shape, float("nan"), dtype=self.x.dtype)
        operands = (self.grad, self.x, self.norm, self.weight)
        products.multiply_backward(*operands, sums, grad_x, accumulate, grad_weight)
        assert bool(whole[:, self.x.shape[1] :].isnan().all())
        return [grad_x, grad_weight, sums.total()]

    def expected_backward(self, accumulate: bool) -> list[Tensor]:
        grad, x = self.grad.double(), self.x.double()
        dz = torch.where(self.a() > 0, grad @ self.weight.double(), 0)
        before = self.buffer.double() if accumulate else 0
        sums = torch.stack((dz.sum(0), (dz * (x - self.norm.mean.double())).sum(0)))
        return [before + self.norm.scale.double() * dz, grad.t() @ self.a(), sums]

    def check(self) -> None:
        """Each value to within rounding beside the largest of its kind."""
        for flag in (False, True):
            self._compare(self.forward(flag), self.expected_forward(flag))
            self._compare(self.backward(flag), self.expected_backward(flag))

    def _compare(self, found: list[Tensor], expected: list[Tensor]) -> None:
        gate = 2e-5 if self.x.dtype == torch.float32 else 1e-13
        for value, truth in zip(found, expected, strict=True):
            assert value.shape == truth.shape
            torch.testing.assert_close(value.double(), truth, rtol=0, atol=gate * (1 + float(truth.abs().max())))


SHAPES = [
    (1, 1, 1),
    (7, 3, 5),
    (8, 32, 32),
    (33, 31, 33),
    (65, 64, 128),
    (129, 70, 48),
    (300, 17, 12),
    (900, 40, 9),
    (40, 1100, 8),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threads_in_use", [1, 2, 3, 7])
@pytest.mark.parametrize(("rows", "columns", "outputs"), SHAPES)
def test_as_pytorch_does(rows: int, columns: int, outputs: int, threads_in_use: int, dtype: torch.dtype) -> None:
    torch.set_num_threads(threads_in_use)
    Drawn(rows, columns, outputs, dtype).check()


@pytest.mark.parametrize("flags", NARROWER)
def test_with_narrower_vectors(flags: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with compiled_with(flags, tmp_path, monkeypatch):
        for dtype in (torch.float32, torch.float64):
            for shape in SHAPES:
                Drawn(*shape, dtype).check()
        check_statistics_beside_outliers()


def test_as_many_threads_the_same_bits() -> None:
    torch.set_num_threads(3)
    operands = Drawn(999, 40, 48, torch.float32)
    first = operands.forward(False) + operands.backward(True)
    for _ in range(20):
        for again, before in zip(operands.forward(False) + operands.backward(True), first, strict=True):
            assert torch.equal(again, before)


def test_a_row_does_not_depend_on_the_others() -> None:
    """An image's prediction is the same in every batch."""
    torch.set_num_threads(2)
    operands = Drawn(300, 40, 48, torch.float32)
    (whole, *_) = operands.forward(True)
    for rows in (slice(0, 1), slice(17, 90), slice(290, 300)):
        part = torch.empty(rows.stop - rows.start, 48)
        products.multiply(operands.x[rows], operands.norm, operands.weight, part, operands.following, None)
        assert torch.equal(part, whole[rows])


def passed_through(x: Tensor) -> tuple[Tensor, products.Statistics]:
    """x [M, 1] as a product with 1, 40 times: more than a block has columns; and the statistics. x >= 0."""
    unit = Norm(torch.zeros(1), torch.ones(1), None, None, 0.0).folded()
    out, statistics = x.new_empty(len(x), 40), products.Statistics(*torch.empty(2, 40))
    products.multiply(x, unit, torch.ones(40, 1), out, None, statistics)
    return out, statistics


def check_statistics(x: Tensor) -> None:
    """Against those of what was stored, in float64."""
    out, statistics = passed_through(x)
    exact = out.double()
    torch.testing.assert_close(statistics.mean.double(), exact.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(statistics.var.double(), exact.var(0, correction=0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("mean", [0.0, 1e4, 1e6])
def test_statistics_beside_a_large_mean(mean: float) -> None:
    """The variance of what is stored, where the square of its mean is 10^12 times as large."""
    torch.manual_seed(0)
    check_statistics((torch.rand(5000, 1, dtype=torch.float64) + mean).float())


def check_statistics_beside_outliers() -> None:
    """Some rows lie 10^6 spreads from the rest: those that values are taken relative to, with blocks of 8, 6 or 4
    rows, or the first of each third, fourth or sixth block, which its others are taken relative to."""
    apart = torch.full((100_000, 1), 0.1)
    apart[[100_000 * at // places for places in (17, 13, 9) for at in range(places)]] = 1000.3
    first = torch.full((100_000, 1), 0.1)
    first[::24] = 1000.3
    for x in (apart, first):
        check_statistics(x)


def test_statistics_beside_outliers() -> None:
    check_statistics_beside_outliers()


def test_the_mean_beside_an_infinity() -> None:
    """Infinite, not NaN, whichever row holds it: what values are taken relative to is finite."""
    for row in range(100):
        x = torch.ones(100, 1)
        x[row] = float("inf")
        assert bool((passed_through(x)[1].mean == float("inf")).all())


def test_rounding_does_not_grow_with_depth() -> None:
    """Chains of multiply-adds are short: 2,208 channels in a row would be off by 5 times as much."""
    torch.manual_seed(0)
    x, weight = torch.rand(200, 2208), torch.rand(32, 2208)
    unit = Norm(torch.zeros(2208), torch.ones(2208), None, None, 0.0).folded()
    out = torch.empty(200, 32)
    products.multiply(x, unit, weight, out, None, None)
    exact = x.double() @ weight.double().t()
    assert float(((out - exact) / exact).abs().max()) < 8e-7


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_stay_in_their_row(value: float) -> None:
    """Rows beyond a tile's last are scratch: nothing of them may show; nor of a row in its neighbours."""
    operands = Drawn(131, 40, 48, torch.float32)
    clean, *_ = operands.forward(False)
    operands.x[130, 7] = value
    touched, *_ = operands.forward(False)
    assert torch.equal(touched[:130], clean[:130])
    expected = operands.expected_forward(False)[0][130]
    assert torch.equal(touched[130].isnan(), expected.isnan())
    assert torch.equal(touched[130].isinf(), expected.isinf())


@pytest.mark.parametrize(("columns", "outputs"), [(64, 32), (65, 32), (64, 33), (34, 12), (160, 128)])
def test_nan_stays_in_its_row_in_bfloat16(columns: int, outputs: int) -> None:
    """What lies beside a slice, or another row, is not multiplied by 0: AMX reads whole tiles of 32 channels."""
    x, grad, weight = (
        drawn(*size, torch.bfloat16) for size in ((257, columns), (257, outputs), (outputs, columns))
    )
    x[128], grad[128] = float("nan"), float("nan")
    vectors, out = torch.ones(4, columns), drawn(257, outputs, torch.bfloat16)
    bn_relu_conv1x1(x, *vectors, 0.0, weight, out, *torch.empty(2, outputs))
    buffer = torch.zeros_like(x)
    pending = torch.zeros(2, columns)
    bn_relu_conv1x1_backward(grad, x, *vectors, 0.0, False, weight, buffer, False, pending, True, True)
    for made in (out, buffer):
        assert made.isnan().any(1).nonzero().flatten().tolist() == [128]


def test_only_what_is_needed() -> None:
    """Each of the three results alone is what it is beside the others."""
    operands = Drawn(300, 40, 48, torch.float32)
    x, norm, grad, weight = operands.x, operands.norm, operands.grad, operands.weight
    grad_x, grad_weight, total = operands.backward(False)
    alone = torch.empty(weight.shape)
    products.multiply_backward(grad, x, norm, weight, None, None, False, alone)
    assert torch.equal(alone, grad_weight)
    sums, found = Sums(x), torch.empty_like(x)
    products.multiply_backward(grad, x, norm, weight, sums, found, False, None)
    assert torch.equal(found, grad_x)
    assert torch.equal(sums.total(), total)
    sums = Sums(x)
    products.multiply_backward(grad, x, norm, weight, sums, None, False, None)
    assert torch.equal(sums.total(), total)


def test_other_shapes_and_dtypes_are_refused() -> None:
    """The compiled form is given addresses; what it was not made for it must not be handed."""
    x, grad, weight = torch.randn(80, 6), torch.randn(80, 4), torch.randn(4, 6)
    vectors = torch.ones(4, 6)
    for wrong in (torch.empty(79, 4), torch.empty(80, 5)):
        with pytest.raises(ValueError, match="takes out of"):
            bn_relu_conv1x1(x, *vectors, 0.0, weight, wrong, None, None)
        with pytest.raises(ValueError, match="takes grad of"):
            bn_relu_conv1x1_backward(
                wrong, x, *vectors, 0.0, True, weight, None, False, torch.zeros(2, 6), True, True
            )
    for places in [(torch.empty(4), None), (None, torch.empty(4)), torch.empty(2, 1, 4)]:
        with pytest.raises(ValueError, match="are a mean and a variance"):
            bn_relu_conv1x1(x, *vectors, 0.0, weight, torch.empty(80, 4), *places)
    with pytest.raises(ValueError, match="takes weight of"):
        bn_relu_conv1x1(x, *vectors, 0.0, torch.randn(4, 5), torch.empty(80, 4), None, None)
    with pytest.raises(ValueError, match="takes norm of"):
        bn_relu_conv1x1(x, *vectors[:, :5], 0.0, weight, torch.empty(80, 4), None, None)
    with pytest.raises(ValueError, match="takes grad_x of"):
        bn_relu_conv1x1_backward(
            grad, x, *vectors, 0.0, True, weight, torch.empty(80, 5), False, torch.zeros(2, 6), True, True
        )
    with pytest.raises(ValueError, match="takes the norm of out of"):
        bn_relu_conv1x1(x, *vectors, 0.0, weight, torch.empty(80, 4), None, None, *torch.ones(4, 3), 0.0)


def test_what_it_does_not_take() -> None:
    dense = torch.empty(4, 6)
    assert products.library(dense, None, torch.empty(4, 6)) is not None
    for other in (dense.bfloat16(), dense.double(), dense.t(), dense[:0], dense[:1].expand(4, 6)):
        assert products.library(dense, other) is None


def test_what_would_be_written_beyond() -> None:
    operands = Drawn(4096, 6, 4, torch.float32)
    x, norm, grad, weight = operands.x, operands.norm, operands.grad, operands.weight
    torch.set_num_threads(4)
    few = Sums(x[:1])  # of one thread
    products.multiply_backward(grad, x, norm, weight, few, None, False, None)
    torch.testing.assert_close(few.total(), operands.expected_backward(False)[2], rtol=0, atol=1e-2)
    with pytest.raises(ValueError, match="with sums only"):
        products.multiply_backward(grad, x, norm, weight, None, torch.empty_like(x), False, None)
    with pytest.raises(ValueError, match="its gradient without gaps"):
        products.multiply_backward(grad, x, norm, weight, None, None, False, torch.empty(6, 4).t())
    with pytest.raises(ValueError, match="norm without gaps"):
        products.multiply(x, Folded(torch.empty(6, 4).t()), weight, torch.empty(4096, 4), None, None)
