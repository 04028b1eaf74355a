"""Values of every operator, by every implementation, against its reference in float64.

`cpu` is the cache-blocked path, `cpu uncompiled` the same on a machine without a C compiler; `cuda` the Triton
kernels, which run in Triton's interpreter where there is no GPU (`tests/conftest.py` asks for it), with the same
masks, tails and merging of partial results.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from tests.kernels.problems import PROBLEMS, Shape, Values, call
from tests.kernels.values import GATE, VARIANTS, relative_error
from tests.properties import HealthCheck, given, settings, st

IMPLEMENTATIONS_TESTED = ("cpu", "cpu uncompiled", "cuda")
PRODUCTS = [name for name in PROBLEMS if "conv1x1" in name]


def assert_solved(name: str, implementation: str, shape: Shape) -> None:
    if implementation == "cuda" and name in PRODUCTS and shape.dtype == torch.bfloat16 and interpreted():
        pytest.skip("Triton's interpreter multiplies bfloat16 wrongly; a GPU runs this")
    problem = PROBLEMS[name](shape)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        produced = problem.solve(implementation)
    assert produced.keys() == problem.expected.keys()
    for quantity, truth in problem.expected.items():
        error = relative_error(produced[quantity], truth)
        assert error <= GATE[shape.dtype], f"{name} by {implementation}: {quantity} is off by {error:.1e}"


def interpreted() -> bool:
    return not torch.cuda.is_available()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS_TESTED)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_values(name: str, variant: str, implementation: str) -> None:
    if "avg" in name and VARIANTS[variant].get("width") == 1:
        pytest.skip("a map one pixel wide has no 2x2 windows; PyTorch refuses it")
    assert_solved(name, implementation, Shape(**VARIANTS[variant]))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    name=st.sampled_from(sorted(PROBLEMS)),
    images=st.integers(1, 3),
    height=st.integers(2, 9),
    width=st.integers(2, 9),
    columns=st.sampled_from([1, 2, 3, 15, 16, 17, 31, 33, 63, 64, 65, 100]),
    outputs=st.sampled_from([1, 3, 12, 16, 48, 65]),
    extra=st.integers(0, 20),
    before=st.integers(0, 20),
    by_batch=st.booleans(),
    accumulate=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float64, torch.float32, torch.float16]),
    seed=st.integers(0, 99),
)
def test_fuzzed_shapes(name: str, **drawn: object) -> None:
    shape = Shape(**drawn)  # type: ignore[arg-type]
    shape = dataclasses.replace(shape, before=min(shape.before, shape.extra))
    for implementation in IMPLEMENTATIONS_TESTED:
        assert_solved(name, implementation, shape)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS_TESTED)
@pytest.mark.parametrize("name", [n for n in PROBLEMS if "statistics" not in n and n != "bn_relu_conv1x1"])
def test_exact_on_integers(name: str, implementation: str) -> None:
    """On small integers and powers of two no order of summation rounds: not one bit may differ."""
    shape = Shape(images=4, height=4, width=4, columns=17, integers=True, dtype=torch.float32)
    problem = PROBLEMS[name](shape)
    produced = problem.solve(implementation)
    for quantity, truth in problem.expected.items():
        assert torch.equal(produced[quantity].double(), truth), quantity


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS_TESTED)
@pytest.mark.parametrize("ratio", [0, 1, 10, 1e2, 1e3, 1e4])
def test_variance_does_not_cancel(ratio: float, implementation: str) -> None:
    """Failure mode 10: E[x^2] - E[x]^2 would be wrong by 98 % at mean/std 3,000, and negative at 10,000."""
    shape = Shape(images=6, height=10, width=10, columns=8, dtype=torch.float32, mean_over_std=ratio)
    problem = PROBLEMS["channel_statistics"](shape)
    var, truth = problem.solve(implementation)["var"], problem.expected["var"]
    assert bool((var >= 0).all())
    # The truth is of x as rounded to float32, so only the arithmetic is tested.
    assert float((var.double() / truth - 1).abs().max()) <= 2e-5


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS_TESTED)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", PROBLEMS)
def test_nan_and_infinity_spread_as_in_pytorch(name: str, value: float, implementation: str) -> None:
    """One value of x: wherever the reference has NaN or infinity, so has the operator, and nowhere else."""
    if "statistics" in name and math.isinf(value):
        pytest.skip("the variance of an infinity is NaN by any formula; its mean is tested with NaN")
    if "conv1x1" in name or "into" in name or "settled" in name:
        pytest.skip("what is deferred and the statistics of the product spread it differently: tested in networks")
    shape = Shape(extra=0, by_batch=False)
    clean = PROBLEMS[name](shape)
    x = clean.arguments[1 if "backward" in name else 0]
    x.view(-1)[5] = value
    expected, produced = spread_by_reference(name, clean.arguments), clean.solve(implementation)
    for quantity, truth in expected.items():
        assert torch.equal(produced[quantity].isnan(), truth.isnan()), quantity
        assert torch.equal(produced[quantity].isposinf(), truth.isposinf()), quantity


def spread_by_reference(name: str, arguments: list) -> Values:
    """What PyTorch's own modules make of the arguments."""
    from densebench.kernels import bn_relu, bn_relu_backward, bn_relu_pool, channel_statistics
    from densebench.kernels.norm import Norm

    if "statistics" in name:
        mean, var = channel_statistics.reference(arguments[0])
        return {"mean": mean, "var": var}
    if name == "bn_relu":
        return {"out": bn_relu.reference(arguments[0], Norm(*arguments[1:6]))}
    if name == "bn_relu_backward":
        grad, x, *norm = arguments[:7]
        grad_x, *sums = bn_relu_backward.reference(grad, x, Norm(*norm), False)
        return {"grad_x": grad_x, "grad_gamma": sums[0], "grad_beta": sums[1]}
    if not name.endswith("backward"):
        return {"out": bn_relu_pool.reference(arguments[0], Norm(*arguments[1:6]), name.split("_")[2])}
    # Through pooling the places of NaN follow PyTorch's own autograd.
    grad, x, *norm = arguments[:7]
    leaf = x.clone().requires_grad_()
    bn_relu_pool.reference(leaf, Norm(*norm), name.split("_")[2]).backward(grad)
    assert leaf.grad is not None
    return {"grad_x": leaf.grad.view(-1, x.shape[-1])}


@pytest.mark.parametrize("name", PROBLEMS)
def test_writes_nothing_beside_its_slice(name: str) -> None:
    """Slices lie in wider buffers filled with NaN: afterwards everything beside them still is."""
    for implementation in IMPLEMENTATIONS_TESTED:
        problem = PROBLEMS[name](Shape(before=4, extra=9))
        arguments = list(problem.arguments)
        call(problem.operator, implementation, arguments)
        for argument in arguments:
            if isinstance(argument, Tensor) and argument.dim() == 2 and argument.stride(0) > argument.shape[1]:
                whole = argument.as_strided((argument.shape[0], argument.stride(0)), (argument.stride(0), 1), 0)
                if whole.shape[0] == 2:
                    continue  # `pending` is drawn at full width
                beside = torch.cat((whole[:, :4], whole[:, 4 + argument.shape[1] :]), 1)
                assert bool(beside.isnan().all()), f"{implementation} wrote beside its columns"
