"""Runs of two strategies side by side, for the tests that need more than `assert_equivalent` runs.

A scenario is a function of a network that does something with it and returns what must be the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.networks import with_strategy

# One table of tolerances: |difference| over |reference| in float64, as norms.
GATE = 1e-11  # values and gradients
TIGHT = 1e-12  # the same work, only repeated or laid out otherwise
BUFFERS = 1e-13  # plain averages of what the forward computed
HUNDRED_STEPS = 1e-10  # losses, parameters and buffers of a hundred optimizer steps
FLOAT32 = 2e-5  # where no ReLU is near zero (see `networks.align_masks`); naive itself shows up to 1e-5
MOMENTS_FLOAT32 = 1e-6  # running statistics in float32
VARIANCE_FLOAT32 = 2e-5  # running variances of values far from zero
# A gradient that is zero but for rounding is measured against the largest of its run, times this.
NEGLIGIBLE = 1e-4
NEGLIGIBLE_FLOAT32 = 1e-2

Quantities = dict[str, Tensor | None]
Scenario = Callable[[Any], Quantities]


def assert_as_naive(
    strategy: str, scenario: Scenario, network: nn.Module, gate: float = GATE, negligible: float = NEGLIGIBLE
) -> Quantities:
    """Play a scenario with a copy of the network under naive and one under a strategy, and compare."""
    expected = play(scenario, network, "naive")
    actual = play(scenario, network, strategy)
    assert_same(actual, expected, gate, negligible)
    return actual


def play(scenario: Scenario, network: nn.Module, strategy: str) -> Quantities:
    """A scenario's quantities with a copy of the network."""
    copied = with_strategy(copy.deepcopy(network), strategy)
    torch.manual_seed(0)
    return scenario(copied)


def everything(network: nn.Module, **values: Tensor | None) -> Quantities:
    """Copies of all gradients and buffers of a network by name, and of further values."""
    return {
        **{name: None if v is None else v.detach().clone() for name, v in values.items()},
        **{f"gradient {n}": None if p.grad is None else p.grad.clone() for n, p in network.named_parameters()},
        **buffers(network),
    }


def buffers(network: nn.Module) -> Quantities:
    return {f"buffer {name}": value.detach().clone() for name, value in network.named_buffers()}


def step(network: nn.Module, x: Tensor, **named: Any) -> Quantities:
    """Output, gradients and buffers after one forward and one backward from a random gradient."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(x.is_floating_point())
    output = network(x)
    output.backward(upstream(output))
    return everything(network, output=output, input=x.grad, **named)


def step_or_error(network: nn.Module, x: Tensor) -> Quantities:
    """`step`, or the error that it ends in, word for word, as a name."""
    try:
        return step(network, x) | {"ran": torch.ones(1)}
    except (ValueError, RuntimeError) as error:
        return {f"{type(error).__name__}: {error}": torch.ones(1)}


def upstream(output: Tensor, seed: int = 7) -> Tensor:
    """A random gradient: that of a sum is constant, and a norm's input gradient from it zero."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)


def assert_same(
    actual: Quantities, expected: Quantities, gate: float = GATE, negligible: float = NEGLIGIBLE
) -> None:
    """The same names, the same of them None, the same shapes and dtypes, values within the gates."""
    assert actual.keys() == expected.keys()
    absent = {name for name in expected if (actual[name] is None) != (expected[name] is None)}
    assert not absent, f"None in one of two runs: {sorted(absent)}"
    present = [name for name, value in expected.items() if value is not None]
    assert any(float(expected[name].double().abs().nan_to_num().sum()) > 0 for name in present)
    scales: dict[str, float] = {}
    for name in present:
        a, b = actual[name], expected[name]
        assert a.shape == b.shape, f"{name}: shape {a.shape}, naive's {b.shape}"
        assert a.dtype == b.dtype, f"{name}: {a.dtype}, naive's {b.dtype}"
        allowed = gate
        if name.startswith("buffer"):
            allowed = min(gate, MOMENTS_FLOAT32 if b.dtype == torch.float32 else BUFFERS)
        if torch.equal(a, b):
            continue
        scales = scales or _scales(expected, negligible)
        scale = scales[name]
        error = size(difference(a, b))
        assert error <= allowed * scale, f"{name}: off by {error:.2e} of {scale:.2e}; gate {allowed:.0e}"


def relative_errors(actual: Quantities, truth: Quantities, negligible: float = NEGLIGIBLE) -> dict[str, float]:
    """|difference| over |truth| of each quantity that has values, in whatever dtype."""
    scales = _scales(truth, negligible)
    return {name: size(difference(actual[name], truth[name])) / scale for name, scale in scales.items() if scale}


def _scales(expected: Quantities, negligible: float) -> dict[str, float]:
    """What the error of each quantity is measured against: its norm; of small gradients that of others."""
    present = {name: value for name, value in expected.items() if value is not None}
    norms = {name: size(torch.where(value.isfinite(), value, 0)) for name, value in present.items()}
    least = negligible * max((size for name, size in norms.items() if name.startswith("gradient")), default=0.0)
    return {name: max(norm, least) if name.startswith("gradient") else norm for name, norm in norms.items()}


def difference(a: Tensor, b: Tensor) -> Tensor:
    """a - b in float64, zero where both are the same NaN or infinity."""
    a, b = a.double(), b.double()
    return torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, a - b)


def size(value: Tensor) -> float:
    """The norm; that of a difference with a NaN or infinity on one side only passes no gate."""
    return float(value.double().norm())


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| over |expected|, as norms."""
    return size(difference(actual, expected)) / size(expected)
