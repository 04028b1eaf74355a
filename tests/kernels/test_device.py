"""What kernels do to a tile, on a tile of its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from densebench.kernels.device import operand
from densebench.kernels.language import tl, triton
from tests.kernels.problems import PROBLEMS, Shape
from tests.kernels.values import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where Triton's interpreter runs kernels


@triton.jit
def _operand_kernel(x_pointer, out_pointer, count: tl.constexpr, precision: tl.constexpr):
    place = tl.arange(0, count)
    tl.store(out_pointer + place, operand(tl.load(x_pointer + place), precision))


def as_operand(x: Tensor, precision: str) -> Tensor:
    out = torch.empty_like(x, device=DEVICE)
    _operand_kernel[(1,)](x.to(DEVICE), out, count=x.numel(), precision=precision)
    return out.cpu()


def rounded(x: Tensor) -> Tensor:
    """To the 10 bits of mantissa of TF32, to nearest."""
    mantissa, exponent = torch.frexp(x.double())
    return torch.ldexp((mantissa * 2**11).round(), exponent - 11).to(x.dtype)


def test_operands_are_rounded_to_tf32() -> None:
    torch.manual_seed(0)
    x = torch.randn(1024) * torch.logspace(-30, 30, 1024)
    assert torch.equal(as_operand(x, "tf32"), rounded(x))
    assert torch.equal(as_operand(x, "ieee"), x)
    assert torch.equal(as_operand(x.half(), "tf32").nan_to_num(0), x.half().nan_to_num(0))


def test_what_is_not_finite_stays() -> None:
    """A NaN whose bits are all set would become -0 by adding to them."""
    bits = [0x7FFFFFFF, -1, 0x7FC00000, 0x7F800000, -0x800000, 0, -0x80000000, 1]
    x = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    out = as_operand(x, "tf32")
    assert torch.equal(out.isnan(), x.isnan())
    assert torch.equal(out[~x.isnan()][:4], x[~x.isnan()][:4])


@pytest.mark.parametrize("name", ["bn_relu_conv1x1", "bn_relu_conv1x1_backward"])
def test_products_in_tf32_have_no_bias(name: str) -> None:
    """Bits that are dropped instead of rounded make every product smaller, by up to 2^-10 for each operand."""
    problem = PROBLEMS[name](Shape(images=2, height=8, width=8, columns=64, outputs=64, dtype=torch.float32))
    quantity = "out" if name == "bn_relu_conv1x1" else "grad_weight"
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        produced, truth = problem.solve("cuda")[quantity].double().cpu(), problem.expected[quantity]
    assert relative_error(produced, truth) <= 1e-3
    assert relative_error(produced, truth) >= 1e-5, "not in TF32"
    bias = float((produced - truth).mul(truth).sum() / truth.square().sum())
    assert abs(bias) <= 5e-5
