"""What `assert_equivalent` is worth: it accepts right code however it is ordered, and finds every seeded fault."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tests.faults_of_execution  # noqa: F401 - registers its faults
from densebench import assert_equivalent
from densebench.equivalence import FLOORS
from densebench.models import Stage, Transition
from densebench.quantities import in_order_of_computation
from tests.faults import FAULTS
from tests.networks import architecture, draw_norms, images, lone_block, norms, small, temporary_strategy
from tests.rewritten import RIGHT

Situation = tuple[nn.Module, Any, dict[str, Any]]  # network, inputs, options of `assert_equivalent`


def _mixed_modes() -> Situation:
    network = small()
    for norm in norms(network)[::2]:
        norm.eval()
    return network, images(), {}


def _nan() -> Situation:
    x = images(channels=5)
    x[1, 2, 3, 4] = math.nan
    # In evaluation: in training one NaN is soon everywhere.
    return lone_block().eval(), x, {}


def _zero_weights() -> Situation:
    network = small()
    for norm in norms(network):
        with torch.no_grad():
            norm.weight[::2] = 0.0
            norm.bias[::2] = 0.0
    return network, images(), {}


def _frozen() -> Situation:
    network = small()
    network.features.denseblock1.requires_grad_(False)
    network.features.denseblock2.denselayer2.norm1.requires_grad_(False)
    return network, images(), {}


def _with_norms(**options: Any) -> nn.Module:
    network = small()
    for norm in norms(network):
        for name, value in options.items():
            setattr(norm, name, value)
    return network


def _bfloat16() -> Situation:
    network = lone_block(bn_size=None)
    network.add_module("transition1", Transition(17))
    draw_norms(network)
    x = images(16, channels=5, dtype=torch.float32) * 3 + 5
    return network.float(), x, {"autocast": torch.bfloat16}


SITUATIONS: dict[str, Callable[[], Situation]] = {
    "training": lambda: (small(), images(), {}),
    "two steps": lambda: (small(), [images(seed=1), images(seed=2)], {"learning_rate": 0.1}),
    "evaluation": lambda: (small(drop_rate=0.3).eval(), images(), {}),
    "mixed modes": _mixed_modes,
    "dropout": lambda: (small(drop_rate=0.3), images(), {}),
    "NaN": _nan,
    "zero weights": _zero_weights,
    "frozen": _frozen,
    "cumulative": lambda: (_with_norms(momentum=None), [images(seed=1), images(seed=2)], {}),
    "odd eps": lambda: (_with_norms(eps=0.3), images(), {}),
    "far from zero": lambda: (lone_block(layers=1), images(channels=5) + 1e4, {}),
    "block alone": lambda: (lone_block(), images(channels=5), {}),
    "dilated": lambda: (*architecture("output_stride_8"), {}),
    "float32": lambda: (lone_block().float(), images(16, channels=5, dtype=torch.float32), {}),
    "bfloat16": _bfloat16,
}


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("name", RIGHT)
def test_right_code_is_accepted(name: str, situation: str) -> None:
    """Correct arithmetic in another order is no fault: a rule that rejects it would be loosened soon."""
    network, inputs, options = SITUATIONS[situation]()
    with temporary_strategy(name, RIGHT[name]().__call__):
        differences = assert_equivalent(network, name, inputs, **options)
    if name != "rewritten":
        assert any(difference.error > 0 for difference in differences), "nothing was computed differently"


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_found(name: str) -> None:
    """And the message names a quantity that shows it."""
    fault = FAULTS[name]
    network, inputs, options = SITUATIONS[fault.situation]()
    with temporary_strategy(name, fault.strategy().__call__), pytest.raises(AssertionError) as caught:
        assert_equivalent(network, name, inputs, **options)
    message = str(caught.value).removeprefix(f"strategy {name!r} differs from 'naive' in ")
    assert re.search(fault.finds, message), message


def test_there_are_as_many_faults_as_promised() -> None:
    """Of every kind: a list that shrinks would still pass the tests above."""
    assert len(FAULTS) >= 40
    assert {fault.situation for fault in FAULTS.values()} >= set(SITUATIONS) - {"frozen"}


def test_a_run_is_never_compared_with_itself() -> None:
    """A strategy whose gradients lie in memory that its next run overwrites would always agree with itself."""
    kept: dict[str, Tensor] = {}

    def persistent(stage: Any, x: Tensor) -> Tensor:
        def place_gradients(_: Tensor) -> None:
            for name, parameter in stage.block.named_parameters():
                parameter.grad = kept.setdefault(name, torch.empty_like(parameter)).zero_()

        output = stage.block(x)
        output.register_hook(place_gradients)
        return output

    with temporary_strategy("persistent", persistent) as name, pytest.raises(AssertionError, match="with itself"):
        assert_equivalent(lone_block(), name, images(channels=5), reference=name)


def test_a_run_of_zeros_proves_nothing() -> None:
    network = lone_block(bn_size=None)
    for parameter in network.parameters():
        torch.nn.init.zeros_(parameter)
    for buffer in network.buffers():
        torch.nn.init.zeros_(buffer)

    def zeros(stage: Any, x: Tensor) -> Tensor:
        return stage.block(x).detach() * 0

    with temporary_strategy("zeros", zeros) as name, pytest.raises(AssertionError, match="all zeros"):
        assert_equivalent(network.eval(), name, images(channels=5) * 0, reference=name, input_gradient=False)


def test_model_is_left_as_it_is() -> None:
    """The comparison runs on copies: mode, strategy, parameters, gradients and statistics stay."""
    network = small("shared_buffer").eval()
    network.features.denseblock1.train()
    before = copy.deepcopy(network)
    assert_equivalent(network, "checkpointed", images(), learning_rate=0.1)
    assert network.strategy == "shared_buffer"
    assert [m.training for m in network.modules()] == [m.training for m in before.modules()]
    assert all(parameter.grad is None for parameter in network.parameters())
    for (name, value), other in zip(network.state_dict().items(), before.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


def test_message_names_quantity_place_values_and_gate() -> None:
    """What someone needs who must find the fault."""
    with (
        temporary_strategy("doubled", lambda stage, x: 2 * stage.run_tail(stage.block(x))) as name,
        pytest.raises(AssertionError) as caught,
    ):
        assert_equivalent(lone_block(), name, images(channels=5))
    assert re.fullmatch(
        r"strategy 'doubled' differs from 'naive' in [\w. ]+: relative error \S+ against a gate of \S+; "
        r"at \[.*\] it is \S+, the reference \S+ \(\d+ more quantities differ\)"
        r"(; the first in the order of computation: [\w. ]+, \S+)?",
        str(caught.value),
    ), str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_message_names_the_layer_that_is_wrong(dtype: torch.dtype) -> None:
    """Everything after it differs too, and in float32 something there is the worst."""

    def mirrored(stage: Stage, x: Tensor) -> Tensor:
        x = stage.run_head(x)
        x = x.flip(1) if stage.name == "denseblock2" else x
        return stage.run_tail(stage.run_block(x))

    with temporary_strategy("mirrored", mirrored), pytest.raises(AssertionError) as caught:
        assert_equivalent(small().to(dtype), "mirrored", images(dtype=dtype))
    first = "buffer features.denseblock2.denselayer1.norm1.running_"
    assert f"in {first}" in str(caught.value) or f"order of computation: {first}" in str(caught.value)


def test_order_of_computation() -> None:
    names = ["output", "loss", "input gradient", "input", "gradient a", "gradient b", "buffer a", "buffer b"]
    steps = [f"step {number}: {name}" for number in (1, 2) for name in names]
    ordered = ["buffer a", "buffer b", "output", "loss", "gradient b", "gradient a", "input gradient", "input"]
    expected = [f"step {number}: {name}" for number in (1, 2) for name in ordered]
    assert in_order_of_computation([*steps, "parameter a"]) == [*expected, "parameter a"]


OFF = {torch.float32: 4e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("dtype", FLOORS)
def test_floors_excuse_little(dtype: torch.dtype) -> None:
    """Four times what needs no excuse is found; the reference itself errs less than half of that here."""

    def off(stage: Stage, x: Tensor) -> Tensor:
        x = stage.run_tail(stage.run_block(stage.run_head(x)))
        return x * (1 + OFF[dtype]) if stage.tail is not None and stage.name == "denseblock2" else x

    x = images(dtype=torch.float32)
    autocast = None if dtype == torch.float32 else dtype
    with temporary_strategy("off", off), pytest.raises(AssertionError, match="differs from 'naive'"):
        assert_equivalent(small().float().eval(), "off", x, autocast=autocast)


@pytest.mark.parametrize("inputs", [[], ()])
def test_nothing_to_compare_on(inputs: Any) -> None:
    with pytest.raises(ValueError, match="no inputs to compare runs on"):
        assert_equivalent(small(), "naive", inputs)
