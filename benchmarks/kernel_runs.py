"""Time the contenders of one operator on one shape: checked first, then in turns, on operands out of the cache."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch

from benchmarks.cases import Group
from benchmarks.kernel_calls import Call, Results, compiled, eager, ours
from benchmarks.kernel_cases import PRODUCT, PRODUCTS
from benchmarks.kernel_cudnn import cudnn
from benchmarks.kernel_cudnn import missing as cudnn_missing
from benchmarks.kernel_operands import Operands
from densebench.measure.ceilings import device_seconds, measure_ceilings
from densebench.measure.deadline import TIMEOUT_SECONDS, deadline
from densebench.measure.environment import environment, identity
from densebench.measure.nvml import Nvml, facts_while_repeating
from densebench.measure.outcome import Outcome
from densebench.measure.timing import Effort, host_seconds, time_in_turns
from densebench.measure.validation import FLOORS, Verdict
from densebench.results import Case, Record, RunStore, latest
from densebench.statistics import summarize, unsteady

CONTENDERS: dict[str, Callable[[str, Sequence[Operands]], list[Call]]] = {
    "ours": ours,
    "eager": eager,
    "compiled": compiled,
    "cudnn": cudnn,
}
MISSING: dict[str, Callable[[], str | None]] = {"cudnn": cudnn_missing}
ERROR_FACTOR = 2.0  # as densebench.measure.validation: at most twice the error of eager, or the dtype's floor
CPU_CACHE_BYTES = 32 * 2**20  # PyTorch does not say; the last level of common server processors, for one process
CACHES = 2  # operands of so many times the cache go by before the same come again
MOST_COPIES = 48
CLOCK_SECONDS = 0.2  # for the clocks and throttling under this load; energy takes longer loops


class KernelRunner:
    """Measures groups of `benchmarks.kernel_cases` and appends their records to a store.

    Args:
        store: where records go, a group at a time.
        effort: how long to time.
        resume: take over what the store holds of the same commit and environment.
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
        """One record a case of the group; a group of which anything is missing is measured whole."""
        if any(case.key() not in self.done for case in group.cases):
            self.progress(f"kernel {group.name}")
            outcomes = [Outcome(case) for case in group.cases]
            _measure(outcomes, group.name, self.effort)
            for one in outcomes:
                self.done[one.key] = self.store.append(_record(one))
        return [self.done[case.key()] for case in group.cases]


class Rotation:
    """A step that runs one call after the other, so that each finds its operands out of the cache."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = calls
        self._next = itertools.cycle(call.run for call in calls)

    def __call__(self) -> object:
        return next(self._next)()


class Subject:
    """One operator on one shape: operands, what comes of them in float64, and how far off eager is.

    Attributes:
        floor_bytes: the fewest bytes that the operator can move.
    """

    def __init__(self, case: Case) -> None:
        self.operator, self.floor = case.model, FLOORS[getattr(torch, case.dtype)]
        self._operands = Operands.draw(case)
        self._truth = exact_results(self.operator, self._operands)
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

    def judge(self, results: Results) -> Verdict:
        """Errors may be twice eager's own, or reach the floor of the dtype."""
        errors = relative_errors(results, self._truth)
        largest = max(errors.values())
        for name, error in errors.items():
            own = self._own.get(name, 0.0)
            if not error <= max(ERROR_FACTOR * own, self.floor):
                known = largest if math.isfinite(largest) else None
                return Verdict(known, f"{name} is off by {error:.1e} (eager: {own:.1e})")
        return Verdict(largest, None)


def exact_results(operator: str, operands: Operands) -> Results:
    """What an operator computes, by eager in float64; with the statistics of a product."""
    (call,) = eager(operator, [operands.copied(torch.float64)])
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


def copies(case: Case, floor_bytes: int) -> int:
    """How many sets of operands a contender goes through before the first comes again."""
    cache = CPU_CACHE_BYTES
    if case.device == "cuda":
        cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(2, min(MOST_COPIES, -(-CACHES * cache // floor_bytes)))


def _measure(outcomes: list[Outcome], group: str, effort: Effort) -> None:
    """Fill in what becomes of the cases of a group."""
    try:
        subject = Subject(outcomes[0].case)
    except Exception as error:  # nothing to hold contenders against: none of them gets a time
        for one in outcomes:
            one.fail(error)
        return
    for one in outcomes:
        _attempt(one, lambda one: _prepare(one, subject))
    steps = {one.key: one.step for one in outcomes if one.step is not None}
    device = torch.device(outcomes[0].case.device)
    turns = time_in_turns(steps, device, effort, device_seconds if device.type == "cuda" else None)
    for one in outcomes:
        if one.key in turns.failures:
            one.fail(turns.failures[one.key])
        elif one.key in turns.samples:
            samples = turns.samples[one.key]
            _attempt(one, lambda one, samples=samples: _fill(one, samples, group))  # type: ignore[misc]
            one.step = None
    steps.clear()
    for one in outcomes:
        if "time_s" in one.fields:
            _attempt(one, lambda one: _check_again(one, subject))


def _prepare(one: Outcome, subject: Subject) -> None:
    """Check a contender; if it is right, warm it up."""
    case = one.case
    lacking = MISSING.get(case.strategy, lambda: None)()
    if lacking is not None:
        return one.end("unsupported", lacking)
    start = time.perf_counter()
    calls = CONTENDERS[case.strategy](case.model, subject.fresh(copies(case, subject.floor_bytes)))
    if case.strategy == "compiled":
        one.fields["compile_s"] = time.perf_counter() - start
    calls[0].run()
    verdict = subject.judge(calls[0].results())
    one.fields["max_error_vs_reference"] = verdict.error
    if verdict.wrong is not None:
        return one.end("incorrect", verdict.wrong)
    for call in calls[1:]:
        call.run()
    one.step = Rotation(calls)
    one.fields |= {"bytes_moved": subject.floor_bytes, "flops_executed": _flops(case)}
    return None


def _check_again(one: Outcome, subject: Subject) -> None:
    """A contender that is no longer right after many calls has no time either."""
    verdict = subject.judge(subject.first_results(one.case.strategy))
    if verdict.wrong is not None:
        del one.fields["time_s"]
        one.end("incorrect", f"after many calls, {verdict.wrong}")


def _fill(one: Outcome, samples: Sequence[float], group: str) -> None:
    assert one.step is not None
    device, timing = torch.device(one.case.device), summarize(samples)
    one.fields |= {"time_s": timing, "group": group}
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
    if case.model not in PRODUCTS:
        return None
    products = 1 if case.model == PRODUCT else 2
    return products * 2 * case.options["rows"] * case.options["columns"] * case.options["outputs"]


def _attempt(one: Outcome, work: Callable[[Outcome], object]) -> None:
    """Do some work for a case; what goes wrong becomes its status."""
    try:
        with deadline(TIMEOUT_SECONDS):
            work(one)
    except Exception as error:  # a failing contender is a result, and the next one must run
        one.fields.pop("time_s", None)
        one.fail(error)
    gc.collect()  # outside the handler, where no frame of the failure holds tensors
    if one.case.device == "cuda" and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _record(one: Outcome) -> Record:
    """The outcome's record, with the device's ceilings beside it."""
    record = one.record()
    if record.time_s is None:
        return record
    ceilings = measure_ceilings(torch.device(one.case.device), getattr(torch, one.case.dtype))
    return dataclasses.replace(record, environment={**record.environment, "ceilings": asdict(ceilings)})


def _already_measured(store: RunStore) -> dict[str, Record]:
    """What a store holds of the same commit and environment, but for what may go better next time."""
    return {
        record.case.key(): record
        for record in latest(store.read())
        if record.case.kind == "kernel"
        and record.status not in ("error", "crash", "timeout")
        and identity(record.environment) == identity(environment(record.case.device))
    }
