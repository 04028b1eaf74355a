"""Whatever happens to a case, it ends in one record, at once on the disk, and the next case runs."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from densebench import contenders
from densebench.measure import resume
from densebench.measure import runner as runner_module
from densebench.measure.deadline import CaseTimeout, deadline
from densebench.measure.device import LOST, DeviceLostError, release_memory, tune
from densebench.measure.environment import environment
from densebench.measure.outcome import is_out_of_memory
from densebench.measure.runner import Runner
from densebench.measure.timing import Effort
from densebench.results import latest
from tests.measure.cases import fault_case, small_case, small_record, small_timing


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


def test_a_case_that_takes_too_long_is_a_record(
    faults: ModuleType, monkeypatch: pytest.MonkeyPatch, runner: Callable[..., Runner]
) -> None:
    monkeypatch.setitem(faults.ACTS, "hangs", lambda: [time.sleep(0.01) for _ in range(10_000)])
    runner().measure([fault_case("fine", batch=3)], None)  # an import that is interrupted leaves half a module
    monkeypatch.setattr(runner_module, "TIMEOUT_SECONDS", 0.5)
    slow, fine = runner().measure([fault_case("hangs"), fault_case("fine")], None)
    assert (slow.status, slow.reason) == ("timeout", "took more than 0.5 s")
    assert fine.status == "ok"


def test_a_deadline_that_is_ignored_rings_again() -> None:
    """As it is when Python happens to run a destructor."""

    def ignores() -> None:
        with contextlib.suppress(CaseTimeout):
            time.sleep(5)
        time.sleep(5)

    with pytest.raises(CaseTimeout), deadline(0.1):
        ignores()


def test_a_deadline_leaves_no_alarm() -> None:
    with pytest.raises(CaseTimeout), deadline(0.05):
        time.sleep(5)
    with deadline(0.05):
        pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
    time.sleep(0.1)


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


def test_resume_takes_over_what_is_complete(faults: ModuleType, runner: Callable[..., Runner]) -> None:
    cases = [fault_case(name) for name in ("fine", "fails", "runs_out_of_memory")]
    runner().measure(cases, "a group")
    again = runner(resume=True)
    assert set(again.done) == {cases[0].key(), cases[2].key()}  # a failure may have been the machine's
    before = len(again.store.read())
    records = again.measure(cases, "a group")
    assert [record.status for record in records[1:]] == ["error", "oom"]
    assert len(again.store.read()) == before + 1


@pytest.mark.parametrize(
    ("status", "fields", "complete"),
    [
        ("ok", {}, False),
        ("noisy", {}, False),  # its memory is; its time is not there yet
        ("ok", {"time_s": small_timing()}, True),
        ("noisy", {"time_s": small_timing()}, True),
        ("error", {"time_s": small_timing()}, True),
        ("error", {}, False),
        *((status, {}, True) for status in ("oom", "unsupported", "skipped", "incorrect", "timeout", "crash")),
        ("skipped", {"reason": f"{LOST} by another before its turn was over"}, False),
    ],
)
def test_what_is_complete(status: str, fields: dict[str, Any], complete: bool) -> None:
    assert resume.is_complete(small_record(status=status, **fields)) is complete


def test_a_kill_after_the_turns_loses_no_time(
    faults: ModuleType, monkeypatch: pytest.MonkeyPatch, runner: Callable[..., Runner]
) -> None:
    """Nor while the driver is asked about the first of them."""
    cases = [fault_case("fine"), fault_case("garbles")]

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runner_module, "facts_while_repeating", killed)
        with pytest.raises(KeyboardInterrupt):
            runner().measure(cases, "a group")
    one, two = latest(runner().store.read())
    assert one.time_s is not None
    assert two.time_s is not None
    assert one.turns == two.turns is not None
    assert set(runner(resume=True).done) == {case.key() for case in cases}


def stopped_before_timing(interrupted: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """A case whose memory is measured and whose time is not."""

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runner_module, "time_in_turns", killed)
        with pytest.raises(KeyboardInterrupt):
            interrupted.measure([fault_case("fine")], "a group")


def test_resume_keeps_memory_and_times_what_has_no_time(
    faults: ModuleType, monkeypatch: pytest.MonkeyPatch, runner: Callable[..., Runner]
) -> None:
    stopped_before_timing(runner(), monkeypatch)
    (held,) = runner().store.read()
    monkeypatch.setattr(runner_module, "measure_peak", lambda *_: pytest.fail("measured again"))
    (record,) = runner(resume=True).measure([fault_case("fine")], "a group")
    assert record.time_s is not None
    assert (record.peak_delta_bytes, record.host_peak_rss_bytes) == (
        held.peak_delta_bytes,
        held.host_peak_rss_bytes,
    )


@pytest.mark.parametrize("when", ["memory", "turns", "driver"])
def test_a_lost_device_ends_the_run_with_records(
    when: str, faults: ModuleType, monkeypatch: pytest.MonkeyPatch, runner: Callable[..., Runner]
) -> None:
    """Who lost it crashed; who had no turn is skipped and measured when the run is resumed."""
    lost = False
    calls = 0

    def lose() -> None:
        nonlocal lost, calls
        calls += 1
        if calls > {"memory": 0, "turns": 7, "driver": 10**9}[when]:
            lost = True
            raise RuntimeError("an illegal memory access was encountered")

    def driver(*_: Any) -> dict[str, Any]:
        nonlocal lost
        lost = when == "driver"
        return {"unavailable": {}}

    monkeypatch.setitem(faults.ACTS, "fails", lose)
    monkeypatch.setattr(runner_module, "facts_while_repeating", driver)
    monkeypatch.setattr(runner_module, "release_memory", lambda _: "illegal memory access" if lost else None)
    cases = [fault_case(name) for name in ("fails", "fine")]
    with pytest.raises(DeviceLostError, match="context was lost: illegal memory access") as told:
        runner(effort=Effort(10, 60, 10)).measure(cases, "a group")
    assert told.value.case == cases[0]
    culprit, other = latest(runner().store.read())
    if when == "driver":  # both times were there already
        assert culprit.time_s is not None
        assert (other.status in ("ok", "noisy"), other.time_s is not None) == (True, True)
        return
    assert (culprit.status, culprit.reason) == ("crash", "the CUDA context was lost: illegal memory access")
    assert (other.status, other.reason) == (
        "skipped",
        "the CUDA context was lost by fails before its turn was over",
    )
    lost = False
    monkeypatch.setattr(runner_module, "facts_while_repeating", lambda *_: {"unavailable": {}})
    again, fine = runner(resume=True).measure(cases, "a group")
    assert again.status == "crash"
    assert fine.time_s is not None


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


@pytest.mark.parametrize(("failures", "said"), [(0, None), (1, None), (2, "sticky")])
def test_the_device_is_asked_whether_it_answers(
    failures: int, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a case did may come to light once; what comes twice stays."""
    answers = iter([RuntimeError("sticky\nmore")] * failures)

    def synchronize() -> None:
        error = next(answers, None)
        if error is not None:
            raise error

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert release_memory("cuda") == said
    assert release_memory("cpu") is None


def test_cudnn_tries_its_algorithms_on_a_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    tune("cpu")
    assert not torch.backends.cudnn.benchmark
    tune("cuda")
    assert torch.backends.cudnn.benchmark


def test_resume_is_for_the_same_code_and_machine(
    faults: ModuleType, monkeypatch: pytest.MonkeyPatch, runner: Callable[..., Runner]
) -> None:
    runner().measure([fault_case("fine")], "a group")
    assert len(runner(resume=True).done) == 1
    facts = resume.environment("cpu")
    with monkeypatch.context() as patch:
        patch.setattr(resume, "environment", lambda _: {**facts, "source": "changed"})
        assert runner(resume=True).done == {}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ([{"threads": 99}], "1 record found there, of which none applies: the machine or its settings differ ("),
        ([{"source": "x"}, {"python": "2.7"}], "2 records found there, of which none applies: the code differs"),
        ([{"gpu": {"driver": "1"}}], "(GPU driver)"),
        ([{"device": "x", "cpu_kernels": "x", "source": "x"}], "cpu kernels) and the code differs (source)"),
        ([{"threads": 99}, {"source": "x"}], "(threads) or the code differs (source)"),
    ],
)
def test_resume_tells_that_and_why_none_applies(changes: list[dict[str, Any]], why: str) -> None:
    here = environment("cpu")
    records = [small_record(environment={**here, **change}) for change in changes]
    said = str(resume.why_none_applies(records))
    assert why in said
    assert said.endswith("; everything is measured anew")
    assert resume.why_none_applies([*records, small_record(environment=here)]) is None


def test_resume_says_nothing_of_a_folder_without_results() -> None:
    assert resume.why_none_applies([]) is None
    assert resume.why_none_applies([small_record(status="skipped")]) is None


def test_resume_takes_over_what_was_predicted_for_a_gpu() -> None:
    """As what fits into a card is: its case is of CUDA, its environment that of the processor."""
    options = {"capacity_gib": 8, "largest_batch": 1}
    case = small_case(kind="fit", device="cuda", source="predicted", options=options)
    record = small_record(case=case, environment=environment("cpu"), predicted_peak_bytes=1)
    assert resume.finished([record]) == {case.key(): record}
    measured = dataclasses.replace(record, case=dataclasses.replace(case, source="measured"))
    assert resume.finished([measured]) == {}


def test_another_machine_in_the_same_folder_hides_nothing(
    faults: ModuleType, monkeypatch: pytest.MonkeyPatch, runner: Callable[..., Runner]
) -> None:
    (own,) = runner().measure([fault_case("fine")], "a group")
    other = dataclasses.replace(own, environment={**own.environment, "source": "changed"})
    assert resume.finished([own, other]) == {own.case.key(): own}


def test_what_was_timed_apart_does_not_pair(faults: ModuleType, runner: Callable[..., Runner]) -> None:
    runner().measure([fault_case("fine")], "a group")
    fine, garbles = runner(resume=True).measure([fault_case("fine"), fault_case("garbles")], "a group")
    assert fine.group == "a group"
    assert str(garbles.group).startswith("a group, resumed ")


def test_a_memory_without_its_time_is_not_complete(
    faults: ModuleType, monkeypatch: pytest.MonkeyPatch, runner: Callable[..., Runner]
) -> None:
    stopped_before_timing(runner(), monkeypatch)
    again = runner(resume=True)
    assert again.done == {}
    (record,) = again.measure([fault_case("fine")], "a group")
    assert (record.time_s is not None, record.group) == (True, "a group")


def test_a_graph_on_a_cpu_is_unsupported_with_a_reason(runner: Callable[..., Runner]) -> None:
    (record,) = runner().measure([small_case(cuda_graph=True)], "a group")
    assert (record.status, record.reason) == (
        "unsupported",
        "CUDA graphs need a CUDA device; this case is for 'cpu'",
    )


def test_the_peak_that_is_predicted_is_that_of_the_device(runner: Callable[..., Runner]) -> None:
    """On a CPU operators allocate inside, by thread, and convolutions of our own need no operand."""
    case = dataclasses.replace(small_case(), strategy="fused")
    here, there = (runner()._trace(dataclasses.replace(case, device=device)) for device in ("cpu", "cuda"))
    assert (here.device, there.device) == ("cpu", "cuda")
    assert here.series["workspace"].any()
    assert not there.series["workspace"].any()
    graph = dataclasses.replace(case, device="cuda", cuda_graph=True)
    assert runner()._trace(graph).peak_bytes == there.peak_bytes


def test_a_gpu_that_is_not_there_is_unsupported(runner: Callable[..., Runner]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    for graph in (False, True):
        (record,) = runner().measure([small_case(device="cuda", cuda_graph=graph)], "a group")
        assert record.status == "unsupported"
        assert "torch sees no CUDA device" in str(record.reason)


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


def test_words_for_a_lack_of_memory() -> None:
    host = (
        "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate"
    )
    assert is_out_of_memory(RuntimeError(host))
    assert is_out_of_memory(RuntimeError("GET was unable to find an engine to execute this computation"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


def test_a_host_that_has_not_the_memory_is_oom(
    faults: ModuleType, monkeypatch: pytest.MonkeyPatch, runner: Callable[..., Runner]
) -> None:
    monkeypatch.setitem(faults.ACTS, "fails", lambda: torch.empty(2**60, dtype=torch.uint8))
    (record,) = runner().measure([fault_case("fails")], None)
    assert record.status == "oom"


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
