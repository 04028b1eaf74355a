"""The kernel benchmark's contenders: all compute the same, on DenseNet-121's shapes, out of the cache."""

from __future__ import annotations

import pytest
import torch

from benchmarks import kernel_cache, kernel_facts
from benchmarks.kernel_cache import Rotation, cold_clock, copies, other_operand
from benchmarks.kernel_calls import Call, given_statistics, ours
from benchmarks.kernel_cases import BLOCKS, COMPILED_AT, geometry, kernel_groups
from benchmarks.kernel_facts import CONVOLUTIONS, PRODUCT, PRODUCTS, WITH_GIVEN_STATISTICS
from benchmarks.kernel_operands import Operands
from benchmarks.kernel_runs import Subject, exact_results, relative_errors
from densebench.operators import load_all
from tests.kernels.benchmarked import OPERATORS, skip_what_is_not_compiled, small


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


def test_every_operator_is_timed() -> None:
    """But for the form of bn_relu_backward that only networks without bottleneck use."""
    assert {*OPERATORS, "bn_relu_backward_into"} == set(load_all())
    assert set(kernel_facts.OPERATORS) == set(OPERATORS)


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


def test_floor_counts_each_operand_once() -> None:
    case = small(PRODUCT)
    (call,) = ours(PRODUCT, [Operands.draw(case)])
    rows, columns, outputs = (case.options[name] for name in ("rows", "columns", "outputs"))
    maps = rows * columns + rows * outputs + outputs * columns
    assert call.floor_bytes == 4 * (maps + 4 * columns + 2 * outputs)  # norm and statistics


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


def test_nan_is_infinitely_wrong_and_shapes_must_agree() -> None:
    truth = exact_results("bn_relu", Operands.draw(small("bn_relu")))
    spoiled = truth["out"].clone()
    spoiled[0, 0] = float("nan")
    assert relative_errors({"out": spoiled}, truth) == {"out": float("inf")}
    with pytest.raises(ValueError, match="out has shape"):
        relative_errors({"out": truth["out"][:1]}, truth)
