"""A run that was cut short goes on from what is on the disk, on the same code and machine only."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from densebench.measure import resume
from densebench.measure import runner as runner_module
from densebench.measure.device import LOST
from densebench.measure.environment import environment
from densebench.measure.runner import Runner
from densebench.store import latest
from tests.measure.cases import fault_case, small_case, small_record, small_timing


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
