"""The kernel benchmark: every contender computes what it is timed for, and what is wrong gets no time."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from benchmarks import kernel_cache, kernel_runs
from benchmarks.cases import Group
from benchmarks.kernel_cache import Rotation, cold_clock, copies, other_operand
from benchmarks.kernel_calls import Call, Results, eager, given_statistics, ours
from benchmarks.kernel_cases import (
    BLOCKS,
    COMPILED_AT,
    CONVOLUTIONS,
    POOLS,
    PRODUCT,
    PRODUCTS,
    WITH_GIVEN_STATISTICS,
    geometry,
    kernel_groups,
)
from benchmarks.kernel_operands import Operands
from benchmarks.kernel_runs import CONTENDERS, NOT_RUN, KernelRunner, Subject, exact_results, relative_errors
from densebench.kernels import compiled
from densebench.kernels.convolutions import not_compiled
from densebench.kernels.library import IMPLEMENTATIONS
from densebench.measure import ceilings
from densebench.measure.device import DeviceLostError
from densebench.measure.timing import Effort
from densebench.report.kernels import failures, operators
from densebench.results import Case, RunStore, latest

OPERATORS = sorted({group.cases[0].model for group in kernel_groups("default", "cpu")})
SHORT = Effort(rounds=3, seconds=0.1, least=2)
CEILINGS = ceilings.Ceilings(10.0, 0.1)


def small(operator: str, dtype: str = "float32", strategy: str = "ours") -> Case:
    """An operator on two images of block 4's 7x7 pixels, or of 6x6 where they are pooled."""
    group = next(g for g in reversed(kernel_groups("default", "cpu")) if g.cases[0].model == operator)
    case = group.cases[0]
    side = 6 if operator in POOLS else 7
    options = {**case.options, "rows": 2 * side * side}
    shape = (case.input_shape[0], side, side)
    return dataclasses.replace(case, batch=2, input_shape=shape, dtype=dtype, options=options, strategy=strategy)


def group_of(*cases: Case) -> Group:
    return Group("a group", cases)


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KernelRunner:
    monkeypatch.setattr(kernel_runs, "measure_ceilings", lambda device, dtype: CEILINGS)
    monkeypatch.setattr(kernel_cache, "MOST_COPIES", 2)
    monkeypatch.setattr(kernel_cache, "CPU_CACHE_BYTES", 2**16)
    return KernelRunner(RunStore(tmp_path), SHORT, progress=lambda line: None)


def skip_what_is_not_compiled(operator: str, dtype: str = "float32") -> None:
    reason = not_compiled(getattr(torch, dtype)) if operator in CONVOLUTIONS else None
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_ours_and_eager_compute_the_same(operator: str, dtype: str) -> None:
    skip_what_is_not_compiled(operator, dtype)
    subject = Subject(small(operator, dtype))
    for contender in ("ours", "eager"):
        results = subject.first_results(contender)
        verdict = subject.judge(results)
        assert verdict.wrong is None, f"{contender}: {verdict.wrong}"
        assert all(float(value.double().norm()) > 0 for value in results.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("operator", WITH_GIVEN_STATISTICS)
def test_given_statistics_computes_the_same_without_taking_any(operator: str, dtype: str) -> None:
    """Forward it is held against the same truth; backward the terms of the statistics are missing."""
    subject = Subject(small(operator, dtype))
    results = subject.first_results("given_statistics")
    assert subject.judge(results, "given_statistics").wrong is None
    as_eager = subject.judge(results).wrong
    assert (as_eager is not None) == operator.endswith("backward")
    spoiled = {name: value * 1.5 for name, value in results.items()}
    assert subject.judge(spoiled, "given_statistics").wrong is not None


def test_given_statistics_are_those_of_the_operand() -> None:
    operands = Operands.draw(small("bn_relu"))
    (call,) = given_statistics("bn_relu", [operands])
    operands.x.add_(1.0)  # by its own statistics the norm would not change
    call.run()
    assert call.again is not None
    other = call.again(operands)
    other.run()
    assert not torch.allclose(call.results()["out"], other.results()["out"])
    assert {
        g.cases[0].model
        for g in kernel_groups("default", "cpu")
        for c in g.cases
        if c.strategy == "given_statistics"
    } == set(WITH_GIVEN_STATISTICS)


@pytest.mark.parametrize("operator", OPERATORS)
def test_operands_are_not_compared_with_themselves(operator: str) -> None:
    """Copies share no memory, and calling one leaves the others as they are."""
    skip_what_is_not_compiled(operator)
    first, second = Operands.draw(small(operator)), Operands.draw(small(operator))
    copy = first.copied()
    ours(operator, [copy])[0].run()
    for name in ("x", "grad", "buffer", "pending", "weight"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
        if getattr(first, name).numel():
            assert getattr(copy, name).data_ptr() != getattr(first, name).data_ptr()
    assert copy.x.stride() == first.x.stride()


def test_every_operator_of_the_fused_path_is_timed() -> None:
    """But for the form of bn_relu_backward that only networks without bottleneck use."""
    assert {*OPERATORS, "bn_relu_backward_into"} == set(IMPLEMENTATIONS)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_shapes_are_those_of_densenet121(kind: str) -> None:
    groups = kernel_groups("default", kind)
    cases = [case for group in groups for case in group.cases]
    assert len({case.key() for case in cases}) == len(cases)
    assert len({group.name for group in groups}) == len(groups)
    for operator in PRODUCTS:
        layers = [g.cases[0].options for g in groups if g.cases[0].model == operator]
        assert [(o["block"], o["layer"]) for o in layers][::3] == [(block, 1) for block in (1, 2, 3, 4)]
        assert [o["columns"] for o in layers][2::3] == [224, 480, 992, 992]  # of the last layer of each block
    batch = 64 if kind == "cuda" else 8
    for case in cases:
        shape = geometry(case)
        assert case.options["rows"] == shape.rows == batch * case.input_shape[1] * case.input_shape[2]
        assert shape.first + shape.columns <= shape.buffer
        assert (case.strategy == "cudnn") <= (case.device == "cuda" and case.model == PRODUCT)
    assert sum(layers for layers, _, _ in BLOCKS) == 58


def test_the_quick_run_on_a_cpu_compiles_nothing() -> None:
    cases = [case for group in kernel_groups("quick", "cpu") for case in group.cases]
    assert {case.strategy for case in cases} == {"ours", "eager", "given_statistics"}
    assert {case.options["block"] for case in cases} == {1}
    assert all(group.left_out for group in kernel_groups("quick", "cpu"))
    assert kernel_groups("tiny", "cpu") == kernel_groups("tiny", "cuda") == ()


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_every_operator_is_compiled_on_a_few_shapes_and_in_the_full_profile_on_all(kind: str) -> None:
    default, full = kernel_groups("default", kind), kernel_groups("full", kind)
    for few, every in zip(default, full, strict=True):
        assert {case.key() for case in (*few.cases, *few.left_out)} == {case.key() for case in every.cases}
    assert not any(group.left_out for group in full)
    compiled = [case for group in default for case in group.cases if case.strategy == "compiled"]
    on_cuda = set(OPERATORS) - set(CONVOLUTIONS)
    assert {case.model for case in compiled} == (on_cuda if kind == "cuda" else set(OPERATORS))
    assert {(case.options.get("block"), case.options["layer"]) for case in compiled} == set(COMPILED_AT)
    assert len(compiled) == (16 if kind == "cuda" else 20)


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


def test_floor_counts_each_operand_once() -> None:
    case = small(PRODUCT)
    (call,) = ours(PRODUCT, [Operands.draw(case)])
    rows, columns, outputs = (case.options[name] for name in ("rows", "columns", "outputs"))
    maps = rows * columns + rows * outputs + outputs * columns
    assert call.floor_bytes == 4 * (maps + 4 * columns + 2 * outputs)  # norm and statistics


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


@pytest.mark.parametrize("operator", PRODUCTS)
def test_a_product_without_one_column_is_found(operator: str) -> None:
    """What is left out changes every result by less than it would take to see in a glance."""
    case = small(operator)
    subject, operands = Subject(case), Operands.draw(case)
    with torch.no_grad():
        operands.weight[:, 5] = 0
    (call,) = ours(operator, [operands])
    call.run()
    assert subject.judge(call.results()).wrong is not None


def test_rotation_takes_the_operands_in_turns() -> None:
    order: list[int] = []
    calls = [Call(lambda number=number: order.append(number), dict) for number in range(3)]
    step = Rotation(calls)
    for _ in range(5):
        step()
    assert order == [0, 1, 2, 0, 1]


def test_what_fits_into_the_cache_is_pushed_out_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the cache goes by between two calls on the same operands: copies, or else other memory."""
    case = small("bn_relu")
    monkeypatch.setattr(kernel_cache, "CPU_CACHE_BYTES", 1000)
    monkeypatch.setattr(kernel_cache, "MOST_COPIES", 8)
    for floor, count, other in [(5000, 2, 0), (400, 5, 0), (250, 8, 0), (100, 8, 2000)]:
        assert copies(case, floor) == count
        buffer = other_operand(case, floor)
        assert (0 if buffer is None else buffer.nbytes) == other
        assert other or count * floor >= 2000


def test_the_cache_is_cleared_before_the_clock_starts() -> None:
    other, seen = torch.ones(4), []
    step = Rotation([Call(lambda: seen.append(other.tolist()), dict)], other)
    assert cold_clock(torch.device("cpu"))(step) > 0
    assert seen == [[0.0] * 4]
    Rotation([Call(lambda: None, dict)]).clear_cache()


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


def test_nan_is_infinitely_wrong_and_shapes_must_agree() -> None:
    truth = exact_results("bn_relu", Operands.draw(small("bn_relu")))
    spoiled = truth["out"].clone()
    spoiled[0, 0] = float("nan")
    assert relative_errors({"out": spoiled}, truth) == {"out": float("inf")}
    with pytest.raises(ValueError, match="out has shape"):
        relative_errors({"out": truth["out"][:1]}, truth)


def test_ceilings_as_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(ceilings, "_CPU_COPY_BYTES", 2**16)
    monkeypatch.setattr(ceilings, "_CPU_MATMUL_SIDE", 64)
    ceilings.measure_ceilings.cache_clear()
    out = tmp_path / "new" / "ceilings.json"
    assert ceilings.main(["--device", "cpu", "--out", str(out)]) == 0
    written = json.loads(out.read_text())
    assert written == json.loads(capsys.readouterr().out)
    assert written["environment"]["cpu"]
    assert set(written["ceilings"]) == {"float32"}
    assert all(0 < rate < 1e6 for rate in written["ceilings"]["float32"].values())
    ceilings.measure_ceilings.cache_clear()


@pytest.mark.nightly
def test_compiled_contender_is_right_and_says_how_long_it_compiled(runner: KernelRunner) -> None:
    for operator in PRODUCTS:
        (record,) = runner.measure(group_of(small(operator, strategy="compiled")))
        assert record.status in ("ok", "noisy"), record.reason
        assert record.compile_s is not None
        assert record.compile_s > 0
