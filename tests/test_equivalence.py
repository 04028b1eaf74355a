"""Every strategy computes what naive computes: outputs, every gradient, every buffer, over several steps."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import densebench
from densebench import UnsupportedError, assert_equivalent
from densebench.equivalence import GATE_FLOAT64
from densebench.models import Stage
from densebench.registry import list_strategies
from tests.comparison import HUNDRED_STEPS
from tests.gpu.runs import repeatable
from tests.networks import (
    ARCHITECTURES,
    architecture,
    channels_last,
    images,
    lone_block,
    small,
    temporary_strategy,
    with_strategy,
)

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def _steps(x: Tensor, count: int = 2) -> list[Tensor]:
    """Different images of one shape and layout for as many optimizer steps."""
    return [x, *(x.flip(0) * 0.5 + number for number in range(1, count))]


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture(
    strategy: str, device: torch.device, name: str, training: bool, memory_format: str
) -> None:
    """Two optimizer steps in float64; in evaluation too, as one fine-tunes with frozen statistics."""
    network, x = architecture(name)
    network, x = network.train(training).to(device), x.to(device)
    if memory_format == "channels_last":
        network, x = channels_last(network, x)
    network = with_strategy(network, strategy)
    differences = assert_equivalent(network, strategy, _steps(x), learning_rate=0.05)
    names = {difference.name.removeprefix("step 1: ") for difference in differences}
    assert {"output", "loss", "input gradient", "gradient features.conv0.weight"} <= names
    assert {f"parameter {n}" for n, _ in network.named_parameters()} <= names
    assert {f"buffer {n}" for n, _ in network.named_buffers()} <= names


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_runs_the_networks_it_is_for(name: str) -> None:
    """Elsewhere a strategy that objects is skipped; what this project ships objects to none of these."""
    network, _ = architecture(name)
    for strategy in list_strategies():
        objected = densebench.get_strategy(strategy).missing()
        if not objected:
            densebench.set_strategy(network, strategy)
            assert network.strategy == strategy


def test_every_pair_of_strategies(strategy: str) -> None:
    """Being equal is not only being equal to naive: any may be the reference."""
    network = with_strategy(small(), strategy)
    for reference in list_strategies():
        if reference == strategy or densebench.get_strategy(reference).missing():
            continue
        assert assert_equivalent(network, strategy, images(), reference=reference)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("bn_size", [4, None], ids=["bottleneck", "plain"])
def test_dropout(strategy: str, device: torch.device, bn_size: int | None, training: bool) -> None:
    """The same masks from the same seed, over three steps of training."""
    network = with_strategy(small(drop_rate=0.3, bn_size=bn_size).train(training).to(device), strategy)
    assert_equivalent(network, strategy, _steps(images().to(device), 3), learning_rate=0.1)


def test_networks_inside_another_module(strategy: str) -> None:
    """Two networks and a head of one's own, as in a detector or an ensemble."""

    class Ensemble(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = with_strategy(small(seed=1, num_classes=None), strategy)
            self.second = with_strategy(small(seed=2, num_classes=None), strategy)
            self.head = nn.Linear(2 * self.first.config.stage_channels()[-1], 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.cat((self.first(x), self.second(x)), 1))

    differences = assert_equivalent(Ensemble(), strategy, images())
    assert {"gradient first.features.conv0.weight", "gradient head.bias"} <= {d.name for d in differences}


class Pyramid(nn.Module):
    """Returns maps, labels and a loss, as segmentation networks and detectors do."""

    def __init__(self, strategy: str) -> None:
        super().__init__()
        self.trunk = with_strategy(small(num_classes=None), strategy)

    def forward(self, x: Tensor) -> dict[str, Any]:
        points = self.trunk.end_points(x)
        maps = [points["transition1"], points["denseblock2"]]
        return {"maps": maps, "labels": maps[0].argmax(1), "loss": points["output"].mean(), "auxiliary": None}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_several_outputs(strategy: str, dtype: torch.dtype) -> None:
    network = Pyramid(strategy).to(dtype)
    names = {d.name for d in assert_equivalent(network, strategy, images().to(dtype))}
    found = ("output['maps'][0]", "output['maps'][1]", "output['labels']", "output['loss']")
    gradients = [f"gradient of the {name}" for name in found]
    assert {*found, *gradients, "gradient trunk.features.conv0.weight"} <= names


class Maps(Pyramid):
    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"maps": super().forward(x)["maps"]}


def _wrong_at_the_end(stage: Stage, x: Tensor) -> Tensor:
    x = stage.run_tail(stage.run_block(stage.run_head(x)))
    return x + 0.01 * x.detach() if stage.name == "denseblock2" else x


def test_the_last_output_counts() -> None:
    """Nothing else is wrong here: in float32 the outputs' sum is not compared."""
    with (
        temporary_strategy("wrong", _wrong_at_the_end),
        pytest.raises(AssertionError, match=r"in output\['maps'\]\[1\]: ") as info,
    ):
        assert_equivalent(Maps("naive").float().eval(), "wrong", images().float())
    assert "more quantities" not in str(info.value)


class Output(NamedTuple):
    loss: Tensor


class Loss(Pyramid):
    """Its output is named as what is not compared in float32, and as what has a gate of its own."""

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"buffer": Output(super().forward(x)["maps"][1])}


def test_names_of_outputs_decide_nothing() -> None:
    network = Loss("naive").eval()
    gates = {d.name: d.gate for d in assert_equivalent(network, "fused", images())}
    assert gates["output['buffer'].loss"] == GATE_FLOAT64
    found = r"in output\['buffer'\]\.loss: "
    with temporary_strategy("wrong", _wrong_at_the_end), pytest.raises(AssertionError, match=found):
        assert_equivalent(network.float(), "wrong", images().float())


class Extra(Pyramid):
    """Returns something more."""

    def __init__(self, extra: object) -> None:
        super().__init__("naive")
        self.extra = extra

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {**super().forward(x), "extra": self.extra}


class Rows(nn.Module):
    """Returns pixels as rows, or channels first: rows are no images."""

    def __init__(self, channels_first: bool) -> None:
        super().__init__()
        self.trunk, self.channels_first = small(num_classes=None, global_pool=False), channels_first

    def forward(self, x: Tensor) -> Tensor:
        maps = self.trunk(x).movedim(1, 0)
        return maps if self.channels_first else maps.flatten(1).t()


@pytest.mark.parametrize("channels_first", [False, True])
def test_gates_stay_narrow_where_rows_are_no_images(channels_first: bool) -> None:
    def wrong(stage: Stage, x: Tensor) -> Tensor:
        x = stage.run_tail(stage.run_block(stage.run_head(x)))
        return x.detach() + 1.5 * (x - x.detach())

    network = Rows(channels_first)
    assert max(d.gate for d in assert_equivalent(network, "fused", images())) < 1e-3
    with temporary_strategy("wrong", wrong), pytest.raises(AssertionError, match="'wrong' differs"):
        assert_equivalent(network, "wrong", images())


@pytest.mark.parametrize(("extra", "named"), [("pyramid", "str"), (torch.ones(1) * 1j, "complex numbers")])
def test_outputs_that_cannot_be_compared(extra: object, named: str) -> None:
    with pytest.raises(ValueError, match=f"the network returns {named}; what can be compared are real tensors"):
        assert_equivalent(Extra(extra), "naive", images())


def test_frozen_features(strategy: str) -> None:
    """Fine-tuning the classifier alone, without a gradient of the images."""
    network = with_strategy(small(), strategy)
    network.features.requires_grad_(False)
    differences = assert_equivalent(network, strategy, _steps(images()), input_gradient=False, learning_rate=0.1)
    gradients = {d.name for d in differences if "gradient" in d.name and "of the output" not in d.name}
    expected = {f"step {n}: gradient classifier.{p}" for n in (1, 2) for p in ("weight", "bias")}
    assert gradients == expected


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("bn_size", [2, None], ids=["bottleneck", "plain"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(
    strategy: str, device: torch.device, dtype: torch.dtype, bn_size: int | None, memory_format: str
) -> None:
    """At most twice the error of naive under the same autocast, both against float64."""
    network = with_strategy(lone_block(bn_size=bn_size).float().to(device), strategy)
    x = images(16, channels=5, dtype=torch.float32).to(device, memory_format=FORMATS[memory_format])
    differences = assert_equivalent(network, strategy, x, autocast=dtype)
    assert max(difference.error for difference in differences) > 1e-5, "nothing was rounded to half precision"


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("bn_size", [2, None], ids=["bottleneck", "plain"])
def test_float32(strategy: str, device: torch.device, bn_size: int | None, training: bool) -> None:
    """At most twice the error of naive, both against float64.

    In channels-last memory: PyTorch's norms of contiguous maps sum in float64 on a CPU, in float32 elsewhere.
    Without TF32, beside whose rounding the nudges of naive's other runs are nothing (with it: tests/gpu).
    """
    network = lone_block(bn_size=bn_size).float().train(training)
    network = with_strategy(network.to(device, memory_format=torch.channels_last), strategy)
    x = images(16, channels=5, dtype=torch.float32).to(device, memory_format=torch.channels_last)
    with repeatable():
        differences = assert_equivalent(network, strategy, x)
    assert max(difference.error for difference in differences) > 1e-9, "nothing was rounded to float32"


@pytest.mark.parametrize("bn_size", [4, None], ids=["bottleneck", "plain"])
def test_hundred_steps_of_training(strategy: str, bn_size: int | None) -> None:
    """In float64, where a fault shows: in float32 even a norm without gradient through its statistics hides.

    Then in evaluation, which alone depends on the running statistics.
    """
    network = with_strategy(small(bn_size=bn_size, block_config=(2, 2)), strategy)
    trained = {name: _train(copy.deepcopy(network), name) for name in ("naive", strategy)}
    expected, actual = trained["naive"], trained[strategy]
    for name, value in expected.items():
        error = (actual[name] - value).double().norm() / value.double().norm()
        assert error <= HUNDRED_STEPS, f"{name} is off by {error:.2e} after 100 steps"


def _train(network: densebench.DenseNet, strategy: str) -> dict[str, Tensor]:
    """Losses, parameters, buffers and predictions after a hundred steps of SGD on random labels."""
    densebench.set_strategy(network, strategy)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    x, labels = images(8), torch.arange(8) % 5
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    with torch.no_grad():
        predictions = network.eval()(x)
    assert losses[-1] < 0.5 * losses[0], "the network learned nothing: the comparison shows little"
    state = {name: value.clone() for name, value in network.state_dict().items()}
    return {"losses": torch.stack(losses), "predictions": predictions, **state}


def test_objection_is_not_run(strategy: str) -> None:
    """`assert_equivalent` hands on that a strategy cannot run a network, and compares nothing."""
    network = small()
    network.features.denseblock1.denselayer1.norm1.register_forward_hook(lambda *_: None)
    if densebench.get_strategy(strategy).bypasses == "nothing":
        pytest.skip(f"{strategy} calls every module, so it objects to no hook")
    with pytest.raises(UnsupportedError, match=r"features\.|denseblock1"):
        assert_equivalent(network, strategy, images())


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="unknown strategy 'fast'; known: naive"):
        assert_equivalent(small(), "fast", images())
    with pytest.raises(ValueError, match="unknown strategy 'old'; known: naive"):
        assert_equivalent(small(), "naive", images(), reference="old")
    with pytest.raises(ValueError, match="Linear contains no dense block of densebench"):
        assert_equivalent(nn.Linear(2, 2), "naive", torch.ones(1, 2))
