"""The kernel benchmark: each case ends in a record, and what is wrong gets no time."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks import kernel_runs
from benchmarks.kernel_calls import Call, Results, eager
from benchmarks.kernel_facts import PRODUCT, PRODUCTS
from benchmarks.kernel_operands import Operands
from benchmarks.kernel_runs import CONTENDERS, NOT_RUN, KernelRunner, Subject
from densebench.kernels import compiled
from densebench.measure.device import DeviceLostError
from densebench.records import Case
from densebench.report.kernels import failures, operators
from densebench.store import latest
from tests.kernels.benchmarked import SHORT, group_of, small


def test_what_a_profile_leaves_out_is_recorded_and_run_by_a_larger_one(runner: KernelRunner) -> None:
    case = small("bn_relu", strategy="eager")
    other = dataclasses.replace(case, strategy="given_statistics")
    few, every = dataclasses.replace(group_of(case), left_out=(other,)), group_of(case, other)

    def resumed() -> KernelRunner:
        return KernelRunner(runner.store, SHORT, resume=True, progress=lambda line: None)

    first, left_out = runner.measure(few)
    assert (left_out.case, left_out.status, left_out.reason) == (other, "skipped", NOT_RUN)
    assert "not run" in failures([left_out])[0]
    assert resumed().measure(few) == [first, left_out]
    both = resumed().measure(every)
    assert all(record.time_s is not None for record in both)
    assert first not in both  # times of one group are taken together
    assert resumed().measure(few) == resumed().measure(every) == both
    assert len(runner.store.read()) == 4


def test_records_hold_what_the_report_reads(runner: KernelRunner) -> None:
    cases = [dataclasses.replace(small(PRODUCT), strategy=name) for name in ("ours", "eager")]
    records = runner.measure(group_of(*cases))
    for record, case in zip(records, cases, strict=True):
        assert record.case == case
        assert record.status in ("ok", "noisy")
        assert record.time_s is not None
        assert len(record.time_s.samples) >= 2
        assert record.group == "a group"
        assert record.flops_executed == 2 * 98 * case.options["columns"] * 128
        assert record.tflops_s == pytest.approx(record.flops_executed / record.time_s.median / 1e12)
        assert record.max_error_vs_reference is not None
        assert record.environment["ceilings"] == {"copy_gb_s": 10.0, "matmul_tflops": 0.1}
    assert records[0].bytes_moved == records[1].bytes_moved
    assert runner.store.read() == records
    (shown,) = operators(records)
    ratios = {run.contender: run.ratio for run in shown.runs}
    assert ratios["eager"] is None
    assert ratios["ours"] is not None
    assert all(run.copy_share and run.matmul_share for run in shown.runs)


def test_resumed_run_measures_only_what_is_missing(runner: KernelRunner) -> None:
    case = small("channel_statistics")
    (record,) = runner.measure(group_of(case))
    again = KernelRunner(runner.store, SHORT, resume=True, progress=lambda line: pytest.fail("measured again"))
    assert again.measure(group_of(case)) == [record]
    fresh = KernelRunner(runner.store, SHORT, resume=False, progress=lambda line: None)
    assert fresh.measure(group_of(case)) != [record]


def test_another_machines_later_record_does_not_hide_ones_own(runner: KernelRunner) -> None:
    case = small("channel_statistics")
    (record,) = runner.measure(group_of(case))
    runner.store.append(dataclasses.replace(record, environment={**record.environment, "device": "another"}))
    again = KernelRunner(runner.store, SHORT, resume=True, progress=lambda line: pytest.fail("measured again"))
    assert again.measure(group_of(case)) == [record]


def wrong(operator: str, copies: list[Operands]) -> list[Call]:
    """Eager, but for one value."""

    def spoiled(call: Call) -> Results:
        results = call.results()
        next(iter(results.values())).view(-1)[3] += 1.0
        return results

    return [dataclasses.replace(call, results=lambda call=call: spoiled(call)) for call in eager(operator, copies)]


def failing(operator: str, copies: list[Operands]) -> list[Call]:
    raise torch.OutOfMemoryError("CUDA out of memory")


def late(operator: str, copies: list[Operands]) -> list[Call]:
    """Right at first, then an error."""
    (call, *rest) = eager(operator, copies)
    turns = iter(range(2))

    def run() -> None:
        if next(turns, None) is None:
            raise RuntimeError("the kernel broke")
        call.run()

    return [dataclasses.replace(call, run=run), *rest]


def test_what_is_wrong_or_fails_gets_no_time(runner: KernelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {"wrong": wrong, "failing": failing, "late": late}
    monkeypatch.setattr(kernel_runs, "CONTENDERS", {**CONTENDERS, **broken})
    cases = [small("bn_relu", strategy=name) for name in ("ours", *broken, "cudnn")]
    records = {record.case.strategy: record for record in runner.measure(group_of(*cases))}
    statuses = {name: record.status for name, record in records.items()}
    assert statuses == {
        "ours": statuses["ours"], "wrong": "incorrect", "failing": "oom", "late": "error", "cudnn": "unsupported"
    }  # fmt: skip
    assert records["ours"].time_s is not None
    assert all(records[name].time_s is None for name in (*broken, "cudnn"))
    assert "out is off by" in str(records["wrong"].reason)
    assert "nvidia-cudnn-frontend" in str(records["cudnn"].reason)
    assert len(failures(records.values())) == 4


def test_without_a_compiler_convolutions_are_eagers_alone(runner: KernelRunner) -> None:
    cases = [small("bn_relu_conv3x3", strategy=name) for name in ("ours", "eager")]
    with compiled.using(None):
        ours_, eager_ = runner.measure(group_of(*cases))
    assert (ours_.status, ours_.time_s) == ("unsupported", None)
    assert "nothing is compiled here (switched off)" in str(ours_.reason)
    assert eager_.time_s is not None


def test_what_was_timed_is_checked_again_without_being_built_again(
    runner: KernelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiler would take its time for that; and what it then made was not what was timed."""
    built: list[int] = []
    checked: list[Operands] = []

    def watched(operator: str, operands: list[Operands]) -> list[Call]:
        built.append(len(operands))
        (first, *rest) = eager(operator, operands)
        again = first.again
        assert again is not None

        def noted(fresh: Operands) -> Call:
            checked.append(fresh)
            call = again(fresh)
            return dataclasses.replace(call, results=lambda: {k: 2 * v for k, v in call.results().items()})

        return [dataclasses.replace(first, again=noted), *rest]

    monkeypatch.setattr(kernel_runs, "CONTENDERS", {**CONTENDERS, "watched": watched})
    (record,) = runner.measure(group_of(small("bn_relu", strategy="watched")))
    assert (len(built), len(checked)) == (1, 1)
    assert record.status == "incorrect"
    assert str(record.reason).startswith("after many calls, out is off by")
    assert record.time_s is None


def test_contenders_of_one_group_share_their_turns(runner: KernelRunner) -> None:
    cases = [small("bn_relu", strategy=name) for name in ("ours", "eager", "given_statistics")]
    first, second = ({r.turns for r in runner.measure(group_of(*cases))}, set[str]())
    runner.done.clear()
    second = {r.turns for r in runner.measure(group_of(*cases))}
    assert len(first) == len(second) == 1
    assert first != second
    assert None not in first


def test_a_lost_device_leaves_records_and_is_not_lost_again(
    runner: KernelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = False

    def fatal(operator: str, operands: list[Operands]) -> list[Call]:
        nonlocal lost
        lost = True
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(kernel_runs, "CONTENDERS", {**CONTENDERS, "fatal": fatal})
    monkeypatch.setattr(kernel_runs, "release_memory", lambda _: "illegal access" if lost else None)
    cases = [small("bn_relu", strategy=name) for name in ("eager", "fatal", "ours")]
    with pytest.raises(DeviceLostError, match="illegal access"):
        runner.measure(group_of(*cases))
    assert [r.status for r in runner.store.read()] == ["skipped", "crash", "skipped"]
    lost = False
    again = KernelRunner(runner.store, SHORT, resume=True, progress=lambda line: None)
    records = again.measure(group_of(*cases))
    assert [record.time_s is not None for record in records] == [True, False, True]
    assert records[1].status == "crash"


def test_a_device_lost_by_the_reference_is_not_held_against_ours(
    runner: KernelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fatal(case: Case) -> Subject:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(kernel_runs, "Subject", fatal)
    cases = [small("bn_relu", strategy=name) for name in ("ours", "eager")]
    assert [record.status for record in runner.measure(group_of(*cases))] == ["error", "error"]
    runner.done.clear()
    monkeypatch.setattr(kernel_runs, "release_memory", lambda _: "illegal access")
    with pytest.raises(DeviceLostError) as told:
        runner.measure(group_of(*cases))
    assert told.value.case == cases[1]
    assert [r.status for r in latest(runner.store.read())] == ["skipped", "crash"]


@pytest.mark.nightly
def test_compiled_contender_is_right_and_says_how_long_it_compiled(runner: KernelRunner) -> None:
    for operator in PRODUCTS:
        (record,) = runner.measure(group_of(small(operator, strategy="compiled")))
        assert record.status in ("ok", "noisy"), record.reason
        assert record.compile_s is not None
        assert record.compile_s > 0
