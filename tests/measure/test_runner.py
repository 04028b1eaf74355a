"""Whatever happens to a case, it ends in one record, at once on the disk, and the next case runs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from densebench import contenders
from densebench.measure import runner as runner_module
from densebench.measure.runner import Runner
from densebench.measure.timing import Effort
from densebench.store import latest
from tests.measure.cases import fault_case, small_case


def test_faults_are_records_and_the_next_case_runs(faults: ModuleType, runner: Callable[..., Runner]) -> None:
    names = ["fails", "runs_out_of_memory", "fine"]
    made = runner()
    records = made.measure([fault_case(name) for name in names], "a group")
    assert [record.status for record in records[:2]] == ["error", "oom"]
    assert records[2].time_s is not None
    assert [r.case.strategy for r in latest(made.store.read())] == names


def test_one_that_fails_while_it_is_timed(
    faults: ModuleType, monkeypatch: pytest.MonkeyPatch, runner: Callable[..., Runner]
) -> None:
    """It keeps its memory, loses its time, and the others are timed to the end."""
    calls = 0

    def out_of_memory_later() -> None:
        nonlocal calls
        calls += 1
        if calls > 8:
            raise torch.OutOfMemoryError("beside the others")

    monkeypatch.setitem(faults.ACTS, "fails", out_of_memory_later)
    made = runner(effort=Effort(10, 60, 10))
    failed, fine = made.measure([fault_case("fails"), fault_case("fine")], "a group")
    assert (failed.status, failed.time_s) == ("oom", None)
    assert failed.peak_delta_bytes
    assert fine.time_s is not None
    assert fine.time_s.n == 10
    assert made.too_large(fault_case("fails", batch=64)) is None  # alone it may have fitted


def test_a_larger_batch_than_one_that_did_not_fit_is_skipped(
    faults: ModuleType, runner: Callable[..., Runner]
) -> None:
    made = runner()
    for batch, status in [(8, "oom"), (64, "skipped"), (4, "oom")]:
        (record,) = made.measure([fault_case("runs_out_of_memory", batch=batch)], None)
        assert record.status == status
    other = fault_case("runs_out_of_memory", batch=64, input_shape=(3, 8, 8))
    assert made.too_large(other) is None


def test_memory_is_on_the_disk_before_anything_is_timed(
    faults: ModuleType, monkeypatch: pytest.MonkeyPatch, runner: Callable[..., Runner]
) -> None:
    made = runner()

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner_module, "time_in_turns", killed)
    with pytest.raises(KeyboardInterrupt):
        made.measure([fault_case("fine"), fault_case("fails")], "a group")
    stored = {record.case.strategy: record for record in made.store.read()}
    assert stored["fine"].peak_delta_bytes
    assert stored["fine"].time_s is None
    assert stored["fails"].status == "error"


def test_every_depth_is_on_the_disk_before_the_next(
    faults: ModuleType, monkeypatch: pytest.MonkeyPatch, runner: Callable[..., Runner]
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(faults.ACTS, "fails", interrupt)
    made = runner()
    with pytest.raises(KeyboardInterrupt):
        made.measure([fault_case("fine"), fault_case("fails")], None)
    assert [record.case.strategy for record in made.store.read()] == ["fine"]


def test_a_small_case_has_all_that_a_cpu_can_tell(runner: Callable[..., Runner]) -> None:
    (record,) = runner().measure([small_case()], "a group")
    assert record.status in ("ok", "noisy")
    assert record.time_s is not None
    for name in ("peak_delta_bytes", "flops_model", "throughput_img_s", "tflops_s", "predicted_peak_bytes"):
        assert getattr(record, name), name
    assert record.predicted_peak_bytes == pytest.approx(record.peak_allocated_bytes, rel=0.02)
    assert record.throughput_img_s == pytest.approx(4 / record.time_s.median)
    assert record.energy_j is None
    assert record.unavailable["energy_j"] == "no CUDA device"
    assert record.group == "a group"


def test_what_cannot_be_traced_is_measured_all_the_same(
    monkeypatch: pytest.MonkeyPatch, runner: Callable[..., Runner]
) -> None:
    def broken(case: Any) -> None:
        raise NotImplementedError("no fake kernel")

    monkeypatch.setattr(runner_module, "trace_case", broken)
    (record,) = runner().measure([small_case()], None)
    assert record.status == "ok"
    assert record.predicted_peak_bytes is None
    assert record.unavailable["predicted_peak_bytes"] == "not traced: no fake kernel"


def test_what_compiles_starts_afresh_each_time_and_its_first_step_is_timed(
    faults: ModuleType, monkeypatch: pytest.MonkeyPatch, runner: Callable[..., Runner]
) -> None:
    """Before the first step, the check, the memory and the timing; for the others nothing is forgotten."""
    events: list[str] = []

    def compile_first() -> None:
        time.sleep(0.2 if "step" not in events else 0)
        events.append("step")

    monkeypatch.setitem(faults.ACTS, "fine", compile_first)
    monkeypatch.setattr(torch._dynamo, "reset", lambda: events.append("reset"))
    plain = runner().measure([fault_case("fine", batch=2)], "a group")[0]
    assert "reset" not in events
    assert plain.compile_s is None
    events.clear()
    known = contenders._peers["fine"]
    monkeypatch.setitem(contenders._peers, "fine", dataclasses.replace(known, compiles=True))
    (record,) = runner().measure([fault_case("fine")], "a group")
    assert record.compile_s is not None
    assert record.compile_s >= 0.2
    assert events[:4] == ["reset", "step", "reset", "reset"]  # a network of no kind of ours is not checked
    rest = events[4:]
    assert rest.count("reset") == 1
    assert rest.index("reset") > 3  # warm-up, plain step and repeats


def test_the_peak_that_is_predicted_is_that_of_the_device(runner: Callable[..., Runner]) -> None:
    """On a CPU operators allocate inside, by thread, and convolutions of our own need no operand."""
    case = dataclasses.replace(small_case(), strategy="fused")
    here, there = (runner()._trace(dataclasses.replace(case, device=device)) for device in ("cpu", "cuda"))
    assert (here.device, there.device) == ("cpu", "cuda")
    assert here.series["workspace"].any()
    assert not there.series["workspace"].any()
    graph = dataclasses.replace(case, device="cuda", cuda_graph=True)
    assert runner()._trace(graph).peak_bytes == there.peak_bytes


def test_a_missing_package_is_unsupported(monkeypatch: pytest.MonkeyPatch, runner: Callable[..., Runner]) -> None:
    monkeypatch.setattr(contenders, "_peers", dict(contenders._peers))
    contenders._peers["timm"] = dataclasses.replace(contenders._peers["timm"], needs="no_such_package")
    case = small_case("timm", model="densenet121", options={})
    made = runner()
    for record in (*made.measure([case], "a group"), made.predict(dataclasses.replace(case, source="predicted"))):
        assert record.status == "unsupported"
        assert record.reason == "no_such_package is not installed; pip install 'densebench[peers]'"


def test_a_prediction_is_a_record(runner: Callable[..., Runner]) -> None:
    made = runner()
    step = made.predict(small_case(source="predicted"))
    timeline = made.predict(small_case(source="predicted", kind="timeline"))
    assert step.status == timeline.status == "ok"
    assert step.peak_delta_bytes == timeline.peak_delta_bytes
    assert timeline.timeline is not None
    assert len(made._traces) == 1  # both come from one trace
    assert made.predict(small_case(source="predicted")) is step
    failed = made.predict(small_case(source="predicted", model="no_such_model"))
    assert failed.status == "error"
    assert "no_such_model" in str(failed.reason)


@pytest.mark.gpu
def test_a_recorded_step_computes_what_the_launched_one_does(
    every_strategy: str, runner: Callable[..., Runner]
) -> None:
    """Recording checks itself: the output of the last replay is held against that of the first step."""
    launched = small_case(every_strategy, device="cuda", memory_format="channels_last")
    graphed = dataclasses.replace(launched, cuda_graph=True)
    one, two = runner().measure([launched, graphed], "a group")
    assert two.status in ("ok", "noisy"), two.reason
    assert two.peak_delta_bytes == pytest.approx(one.peak_delta_bytes, rel=0.1)
