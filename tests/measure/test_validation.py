"""A wrong strategy gets no figure; a wrong peer is measured and marked."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from densebench import contenders
from densebench.measure import runner as runner_module
from densebench.measure import validation
from densebench.measure.runner import Runner
from densebench.measure.validation import Checks, NoReferenceError, Reference, changed
from densebench.models import build_model
from densebench.registry import get_strategy, list_strategies, strategy
from tests.measure.cases import fault_case, small_case


def register(name: str, change: Callable[[Any, Tensor], Tensor]) -> str:
    """A strategy that is naive, with its output changed."""

    @strategy(name, summary="wrong on purpose")
    def wrong(stage: Any, x: Tensor) -> Tensor:
        return change(stage, get_strategy("naive").function(stage, x))

    return name


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 1.001


def twice_counted(stage: Any, out: Tensor) -> Tensor:
    if stage.block.training:
        stage.layers[0].norm1.running_mean.data.mul_(1.01)  # past autograd's count of changes
    return out


WRONG: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "wrong_output": (lambda stage, out: out * 1.001, "output"),
    "wrong_gradient": (lambda stage, out: WrongGradient.apply(out), "gradient"),
    "wrong_buffers": (twice_counted, "buffers"),
    "not_a_number": (lambda stage, out: out * float("nan"), "output"),
}


@pytest.mark.usefixtures("own_strategies")
def test_nothing_is_tuned_for_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what the check makes cuDNN choose is not what is timed: PyTorch keeps deterministic choices apart."""
    cudnn, seen = torch.backends.cudnn, []
    monkeypatch.setattr(cudnn, "benchmark", True)

    def noting(stage: Any, out: Tensor) -> Tensor:
        seen.append((cudnn.benchmark, cudnn.deterministic))
        return out

    reference = Reference(small_case())
    assert reference.check(small_case(register("noting", noting))).wrong is None
    assert set(seen) == {(False, True)}
    assert (cudnn.benchmark, cudnn.deterministic) == (True, False)


@pytest.mark.parametrize("mode", ["train", "infer"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_strategy_passes(dtype: str, mode: str) -> None:
    reference = Reference(small_case(dtype=dtype, mode=mode))
    for name in list_strategies():
        verdict = reference.check(small_case(name, dtype=dtype, mode=mode))
        assert verdict.wrong is None, name
        assert verdict.error is not None
        assert verdict.error < (1e-11 if dtype == "float64" else 1e-5)


@pytest.mark.parametrize("precision", [{"autocast": "bfloat16"}, {"dtype": "bfloat16"}])
def test_low_precision_is_held_against_a_higher_one(precision: dict[str, str]) -> None:
    case = small_case(**precision)
    reference = Reference(case)
    assert 1e-4 < max(reference.own_error.values()) < 0.2
    assert reference.check(case).wrong is None


@pytest.mark.usefixtures("own_strategies")
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_strategy_is_incorrect_and_has_no_figure(name: str, runner: Callable[..., Runner]) -> None:
    change, quantity = WRONG[name]
    register(name, change)
    right, wrong = runner().measure([small_case(), small_case(name)], "a group")
    assert right.time_s is not None
    assert wrong.status == "incorrect"
    assert wrong.reason is not None
    assert quantity in wrong.reason
    assert wrong.time_s is None
    assert wrong.peak_delta_bytes is None
    assert (wrong.max_error_vs_reference is None) == (name == "not_a_number")


@pytest.mark.parametrize("models", ["densenet", "densenet_x", "dense"])
def test_a_wrong_peer_is_measured_and_marked(
    models: str, monkeypatch: pytest.MonkeyPatch, runner: Callable[..., Runner]
) -> None:
    """Which networks it has says nothing of whether it is checked."""
    monkeypatch.setattr(contenders, "_peers", dict(contenders._peers))

    @contenders.contender("shaky", summary="a peer that is not quite the same", models=models)
    def shaky(model: str, **options: Any) -> nn.Module:
        network = build_model(model, **options)
        network.classifier.register_forward_hook(lambda module, args, out: out * 1.01)
        return network

    (record,) = runner().measure([small_case("shaky")], "a group")
    assert record.status == "incorrect"
    assert record.flops_model
    assert record.time_s is not None
    assert record.peak_delta_bytes


@pytest.mark.usefixtures("own_strategies")
def test_one_that_goes_wrong_while_it_is_timed_gets_no_time(runner: Callable[..., Runner]) -> None:
    calls = 0

    def later(stage: Any, out: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return out * (1 if calls < 30 else 1.1)

    register("wears_out", later)
    (record,) = runner(effort=runner_module.Effort(20, 60, 20)).measure([small_case("wears_out")], "a group")
    assert record.status == "incorrect"
    assert record.reason is not None
    assert "moved" in record.reason
    assert record.time_s is None


def test_dropout_may_move_the_output() -> None:
    case = small_case(options={"drop_rate": 0.5})
    assert changed(torch.ones(3), torch.zeros(3), case) is None
    assert changed(torch.ones(3), torch.zeros(3), small_case()) is not None


def test_another_strategy_may_be_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is not there is no reason to time what was not checked; without any there is nothing to check."""
    monkeypatch.setattr(contenders, "_peers", dict(contenders._peers))
    for name, reference in {"by_fused": "fused", "by_nothing": "no_such", "by_none": None}.items():
        contenders.contender(name, summary="naive", reference=reference)(build_model)
    checks = Checks()
    assert checks.check(small_case("by_fused")).error is not None  # type: ignore[union-attr]
    assert {strategy for strategy, _ in checks._references} == {"fused"}
    with pytest.raises(NoReferenceError, match="no_such failed as the reference"):
        checks.check(small_case("by_nothing"))
    assert checks.check(small_case("by_none")) is None


def test_the_reference_of_a_group_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    class Counting(Reference):
        def __init__(self, case: Any, strategy: str) -> None:
            made.append(case.key())
            super().__init__(case, strategy)

    monkeypatch.setattr(validation, "Reference", Counting)
    checks = Checks()
    checks.check(small_case())
    checks.check(small_case("checkpointed", memory_format="channels_last"))
    assert len(made) == 1
    checks.check(small_case(mode="infer"))
    assert len(made) == 2


def test_without_a_reference_nothing_is_timed(
    monkeypatch: pytest.MonkeyPatch, runner: Callable[..., Runner], faults: ModuleType
) -> None:
    calls = 0

    def broken(case: Any, strategy: str) -> Any:
        nonlocal calls
        calls += 1
        raise RuntimeError("unable to find an engine to execute this computation")  # taken for a lack of memory

    monkeypatch.setattr(validation, "Reference", broken)
    with pytest.raises(NoReferenceError, match="naive failed as the reference"):
        Checks().check(small_case())
    calls = 0
    cases = [small_case(), small_case("checkpointed"), fault_case("fine")]
    records = runner().measure(cases, "a group")
    assert [record.status for record in records[:2]] == ["error", "error"]
    assert all(record.time_s is None for record in records[:2])
    assert records[2].time_s is not None  # another network, which needs no reference
    assert calls == 1
