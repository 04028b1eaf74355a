"""Time the contenders of one operator on one shape: checked first, then in turns, on operands out of the cache."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch

from benchmarks.cases import Group
from benchmarks.kernel_cache import Rotation, cold_clock, copies, other_operand
from benchmarks.kernel_calls import Call, Results, compiled, eager, given_statistics, ours
from benchmarks.kernel_cudnn import cudnn
from benchmarks.kernel_cudnn import missing as cudnn_missing
from benchmarks.kernel_facts import CONVOLUTIONS, OPERATORS
from benchmarks.kernel_operands import Operands
from densebench.kernels.convolutions import not_compiled
from densebench.measure.ceilings import measure_ceilings
from densebench.measure.deadline import TIMEOUT_SECONDS, deadline
from densebench.measure.device import LOST, DeviceLostError, release_memory, was_never_tried
from densebench.measure.environment import environment
from densebench.measure.nvml import Nvml, facts_while_repeating
from densebench.measure.outcome import Outcome
from densebench.measure.timing import Effort, Turns, host_seconds, time_in_turns
from densebench.measure.validation import FLOORS, Verdict, first_algorithms
from densebench.records import Case, Record, identity
from densebench.statistics import summarize, unsteady
from densebench.store import RunStore, latest

CONTENDERS: dict[str, Callable[[str, Sequence[Operands]], list[Call]]] = {
    "ours": ours,
    "eager": eager,
    "given_statistics": given_statistics,
    "compiled": compiled,
    "cudnn": cudnn,
}
ERROR_FACTOR = 2.0  # as densebench.measure.validation: at most twice the error of eager, or the dtype's floor
NOT_RUN = "not run: compiled for every shape in the full profile alone (--densebench-profile full)"
CLOCK_SECONDS = 0.2  # for the clocks and throttling under this load; energy takes longer loops


class KernelRunner:
    """Measures groups of `benchmarks.kernel_cases` and appends their records to a store.

    Args:
        store: where records go, a group at a time.
        effort: how long to time.
        resume: take over what the store holds of the same source and environment.
        progress: called with one line for each group that is begun.
    """

    def __init__(
        self, store: RunStore, effort: Effort, resume: bool = False, progress: Callable[[str], None] = print
    ) -> None:
        self.store = store
        self.effort = effort
        self.progress = progress
        self.done = _already_measured(store) if resume else {}

    def measure(self, group: Group) -> list[Record]:
        """One record a case of the group; a group of which anything is missing is measured whole.

        What the group leaves out has a record that says so, unless a larger profile has measured it here.
        But for a case that hung or took the device with it: that is left alone until the source changes.

        Raises:
            DeviceLostError: if a case makes the device unusable; all of the group have records then.
        """
        if any(self._is_missing(case) for case in group.cases):
            self.progress(f"kernel {group.name}")
            held = {key for key, record in self.done.items() if record.status in ("crash", "timeout")}
            outcomes = [Outcome(case) for case in group.cases if case.key() not in held]
            environment(group.cases[0].device)  # known from now on: a device that is lost would not tell
            try:
                _measure(outcomes, group.name, self.effort)
                records = [_record(one) for one in outcomes]
            except DeviceLostError as error:
                for record in _given_up(outcomes, error):
                    self.done[record.case.key()] = self.store.append(record)
                raise
            self.done |= {record.case.key(): self.store.append(record) for record in records}
        for case in group.left_out:
            if case.key() not in self.done:
                self.done[case.key()] = self.store.append(Outcome(case, "skipped", NOT_RUN).record())
        return [self.done[case.key()] for case in (*group.cases, *group.left_out)]

    def _is_missing(self, case: Case) -> bool:
        """Whether a case has no record but that a smaller profile left it out."""
        record = self.done.get(case.key())
        return record is None or record.reason == NOT_RUN


class Subject:
    """One operator on one shape: operands, what comes of them in float64, and how far off eager is.

    Attributes:
        floor_bytes: the fewest bytes that the operator can move.
    """

    def __init__(self, case: Case) -> None:
        self.operator, self.floor = case.model, FLOORS[getattr(torch, case.dtype)]
        self._operands = Operands.draw(case)
        self._truth = exact_results(self.operator, self._operands)
        self._truth_given: Results | None = None
        self._own = relative_errors(self.first_results("eager"), self._truth)
        self.floor_bytes = ours(self.operator, self.fresh(1))[0].floor_bytes

    def fresh(self, count: int) -> list[Operands]:
        """So many copies of the operands that nothing has been written to."""
        return [self._operands.copied() for _ in range(count)]

    def first_results(self, contender: str) -> Results:
        """What a contender computes when it is called once."""
        (call,) = CONTENDERS[contender](self.operator, self.fresh(1))
        call.run()
        return call.results()

    def judge(self, results: Results, contender: str = "eager") -> Verdict:
        """Errors may be twice eager's own, or reach the floor of the dtype."""
        errors = relative_errors(results, self._truth_of(contender))
        largest = max(errors.values())
        for name, error in errors.items():
            own = self._own.get(name, 0.0)
            if not error <= max(ERROR_FACTOR * own, self.floor):
                known = largest if math.isfinite(largest) else None
                return Verdict(known, f"{name} is off by {error:.1e} (eager: {own:.1e})")
        return Verdict(largest, None)

    def _truth_of(self, contender: str) -> Results:
        """Backward through a norm that is given its statistics is another function of the same operands."""
        if contender != "given_statistics":
            return self._truth
        if self._truth_given is None:
            self._truth_given = exact_results(self.operator, self._operands, given_statistics)
        return self._truth_given


def exact_results(
    operator: str, operands: Operands, contender: Callable[[str, Sequence[Operands]], list[Call]] = eager
) -> Results:
    """What an operator computes, by eager in float64; with the statistics of a product."""
    (call,) = contender(operator, [operands.copied(torch.float64)])
    with first_algorithms():
        call.run()
    results = call.results()
    if "out" in results:
        var, mean = torch.var_mean(results["out"], dim=0, correction=0)
        results |= {"mean": mean, "var": var}
    return results


def relative_errors(values: Results, truth: Results) -> dict[str, float]:
    """|difference| over |truth| (norms) of each quantity that there is; NaN anywhere is infinitely wrong.

    A mean is held against the standard deviation, beside which it may be next to nothing.
    """
    errors = {}
    for name, value in values.items():
        if value.shape != truth[name].shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, not {tuple(truth[name].shape)}")
        size = truth["var"].sqrt() if name == "mean" else truth[name]
        error = float((value.double() - truth[name]).norm() / size.norm())
        errors[name] = math.inf if math.isnan(error) else error
    return errors


def _measure(outcomes: list[Outcome], group: str, effort: Effort) -> None:
    """Fill in what becomes of the cases of a group."""
    try:
        subject = Subject(outcomes[0].case)
        other = other_operand(outcomes[0].case, subject.floor_bytes)
    except Exception as error:  # nothing to hold contenders against: none of them gets a time
        subject = None
        for one in outcomes:
            one.fail(error)
    if subject is None:
        _answers(next((one for one in outcomes if one.case.strategy == "eager"), outcomes[0]))  # all that ran
        return
    for one in outcomes:
        _attempt(one, functools.partial(_prepare, subject=subject, other=other))
    again = {one.key: one.step.calls[0].again for one in outcomes if isinstance(one.step, Rotation)}
    steps = {one.key: one.step for one in outcomes if one.step is not None}
    device = torch.device(outcomes[0].case.device)
    turns = time_in_turns(steps, device, effort, cold_clock(device))
    steps.clear()
    by_key = {one.key: one for one in outcomes}
    for key, error in turns.failures.items():  # in their order: if the device is lost, the first lost it
        by_key[key].fail(error)
        _answers(by_key[key])
    for one in outcomes:
        if one.key in turns.samples:
            _attempt(one, functools.partial(_fill, turns=turns, group=group))
            one.step = None
    for one in outcomes:
        if "time_s" in one.fields:
            _attempt(one, functools.partial(_check_again, subject=subject, again=again[one.key]))


def _prepare(one: Outcome, subject: Subject, other: torch.Tensor | None) -> None:
    """Check a contender; if it is right, warm it up."""
    case = one.case
    lacking = _lacking(case)
    if lacking is not None:
        return one.end("unsupported", lacking)
    start = time.perf_counter()
    calls = CONTENDERS[case.strategy](case.model, subject.fresh(copies(case, subject.floor_bytes)))
    if case.strategy == "compiled":
        one.fields["compile_s"] = time.perf_counter() - start
    calls[0].run()
    verdict = subject.judge(calls[0].results(), case.strategy)
    one.fields["max_error_vs_reference"] = verdict.error
    if verdict.wrong is not None:
        return one.end("incorrect", verdict.wrong)
    for call in calls[1:]:
        call.run()
    one.step = Rotation(calls, other)
    one.fields |= {"bytes_moved": subject.floor_bytes, "flops_executed": _flops(case)}
    return None


def _lacking(case: Case) -> str | None:
    """Why a contender cannot be had here; None if it can."""
    if case.strategy == "cudnn":
        return cudnn_missing()
    if case.strategy == "ours" and case.model in CONVOLUTIONS:
        return not_compiled(getattr(torch, case.dtype))
    return None


def _check_again(one: Outcome, subject: Subject, again: Callable[[Operands], Call] | None) -> None:
    """A contender that is no longer right after many calls has no time either.

    It is what was timed that is called once more, on fresh operands; nothing is compiled a second time.
    """
    if again is None:
        results = subject.first_results(one.case.strategy)
    else:
        call = again(subject.fresh(1)[0])
        call.run()
        results = call.results()
    verdict = subject.judge(results, one.case.strategy)
    if verdict.wrong is not None:
        del one.fields["time_s"]
        one.end("incorrect", f"after many calls, {verdict.wrong}")


def _fill(one: Outcome, turns: Turns, group: str) -> None:
    assert one.step is not None
    device, timing = torch.device(one.case.device), summarize(turns.samples[one.key])
    one.fields |= {"time_s": timing, "group": group, "turns": turns.token}
    if one.fields["flops_executed"]:
        one.fields["tflops_s"] = one.fields["flops_executed"] / timing.median / 1e12
    noise = unsteady(timing)
    if noise is not None:
        one.doubt("noisy", noise)
    one.fields["host_time_s"] = host_seconds(one.step, device)
    facts = facts_while_repeating(one.step, Nvml(device), CLOCK_SECONDS)
    one.fields |= {**facts, "energy_j": None}


def _flops(case: Case) -> int | None:
    """Of the products: one forward, two backward; the rest of an operator multiplies no matrices."""
    facts = OPERATORS[case.model]
    if not facts.taps:
        return None
    products = 2 if facts.is_gradient else 1
    return products * 2 * case.options["rows"] * case.options["columns"] * facts.taps * case.options["outputs"]


def _attempt(one: Outcome, work: Callable[[Outcome], object]) -> None:
    """Do some work for a case; what goes wrong becomes its status.

    Raises:
        DeviceLostError: if it leaves the device unusable.
    """
    try:
        with deadline(TIMEOUT_SECONDS):
            work(one)
    except Exception as error:  # a failing contender is a result, and the next one must run
        one.fields.pop("time_s", None)
        one.fail(error)
    _answers(one)  # outside the handler, where no frame of the failure holds tensors


def _answers(one: Outcome) -> None:
    said = release_memory(one.case.device)
    if said is not None:
        raise DeviceLostError(one.case, said)


def _given_up(outcomes: Sequence[Outcome], error: DeviceLostError) -> list[Record]:
    """Records of a group when the device is lost: whose doing it was, and who is to be measured again."""
    for one in outcomes:
        one.fields.pop("time_s", None)  # nobody can check again what was timed
        if one.key == error.case.key():
            one.end("crash", str(error))
        else:
            one.end("skipped", f"{LOST} by {error.case.strategy} before its turn was over")
    return [one.record() for one in outcomes]


def _record(one: Outcome) -> Record:
    """The outcome's record, with the device's ceilings beside it."""
    record = one.record()
    if record.time_s is None:
        return record
    ceilings = measure_ceilings(torch.device(one.case.device), getattr(torch, one.case.dtype))
    return dataclasses.replace(record, environment={**record.environment, "ceilings": asdict(ceilings)})


def _already_measured(store: RunStore) -> dict[str, Record]:
    """What a store holds of the same source and environment, but for what may go better next time."""
    here = [  # first: another machine's may be the latest
        record
        for record in store.read()
        if record.case.kind == "kernel"
        and identity(record.environment) == identity(environment(record.case.device))
    ]
    return {
        record.case.key(): record
        for record in latest(here)
        if record.status != "error" and not was_never_tried(record)
    }
