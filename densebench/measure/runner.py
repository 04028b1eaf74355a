"""Measure cases: check, memory, then time in turns; every case ends in a record, whatever happens to it."""

from __future__ import annotations

import dataclasses
import functools
import gc
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import torch

from densebench.contenders import get_contender
from densebench.measure.deadline import TIMEOUT_SECONDS, deadline
from densebench.measure.device import LOST, DeviceLostError, release_memory
from densebench.measure.environment import environment
from densebench.measure.graph import why_no_graph
from densebench.measure.memory import measure_peak
from densebench.measure.nvml import Nvml, facts_while_repeating
from densebench.measure.outcome import Fields, Outcome, first_line
from densebench.measure.resume import figures, finished, memory_records, why_none_applies
from densebench.measure.steps import compile_seconds, compiles, forget_compiled, measurable, warm_up
from densebench.measure.timing import Effort, host_seconds, time_in_turns
from densebench.measure.validation import Checks, changed
from densebench.prediction import StepTrace, trace_case
from densebench.records import Case, Record
from densebench.statistics import summarize, unsteady
from densebench.store import RunStore


class Runner:
    """Measures groups of cases and appends their records to a store.

    Args:
        store: where records go, each as soon as it is known.
        effort: how long to time.
        resume: take over what the store already holds for the same source and environment.
        progress: called with one line for each thing that is begun.

    Attributes:
        none_applies: the sentence to show where the store holds records and none can be taken over; else None.
    """

    def __init__(
        self,
        store: RunStore,
        effort: Effort,
        resume: bool = False,
        progress: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.store = store
        self.effort = effort
        self.progress = progress
        held = store.read() if resume else []
        self.done = finished(held)
        self.none_applies = why_none_applies(held)
        self._memory_done = memory_records(held)
        self._too_large: dict[str, int] = {}
        self._traces: dict[str, StepTrace] = {}

    def measure(self, cases: Sequence[Case], group: str | None, checks: Checks | None = None) -> list[Record]:
        """Measure cases of one network and shape; one record each, in the same order.

        Args:
            cases: what to measure.
            group: the name under which they are timed in turns; None measures memory only.
            checks: verdicts of an earlier call to go on from.

        Raises:
            DeviceLostError: if one of them makes the device unusable; all of them have records then.
        """
        measured = [self._begun(case) for case in cases if case.key() not in self.done]
        if group is not None and len(measured) < len(cases):  # what was timed before does not pair with these
            group = f"{group}, resumed {datetime.now(UTC):%Y-%m-%d %H:%M:%S}"
        try:
            self._memory_of(measured, checks or Checks(one_network=group is None), timed=group is not None)
            if group is not None:
                self._time([one for one in measured if one.has_memory], group)
        except DeviceLostError as error:
            self._give_up(measured, error)
            raise
        return [self.done[case.key()] for case in cases]

    def _begun(self, case: Case) -> Outcome:
        """A case to measure, with the memory that an earlier run found."""
        environment(case.device)  # known from now on: a device that is lost would not tell
        held = self._memory_done.get(case.key())
        return Outcome(case) if held is None else Outcome(case, held.status, held.reason, figures(held))

    def _give_up(self, measured: Sequence[Outcome], error: DeviceLostError) -> None:
        """Records of what is not settled yet, when the device is lost: whose doing it was, and who suffers."""
        for one in measured:
            if one.key in self.done:
                continue
            if one.key == error.case.key():
                one.end("crash", str(error))
            elif "time_s" not in one.fields:
                one.end("skipped", f"{LOST} by {error.case.strategy} before its turn was over")
            self._settle(one)

    def too_large(self, case: Case) -> str | None:
        """Why a case need not be tried: a smaller batch of it did not fit; None if there is no such."""
        if case.batch > self._too_large.get(_without_batch(case), case.batch):
            return "larger than one that did not fit"
        return None

    def note(self, record: Record) -> Record:
        """Store a record made elsewhere and count it as measured."""
        if record.status == "oom":
            self._too_large[_without_batch(record.case)] = record.case.batch
        self.done[record.case.key()] = self.store.append(record)
        return self.done[record.case.key()]

    def predict(self, case: Case) -> Record:
        """The record of a case that is not run: its predicted peak, FLOPs and memory over the step."""
        if case.key() in self.done:
            return self.done[case.key()]
        self.progress(f"predicting {case.label()}")
        one = Outcome(case)

        contender = get_contender(case.strategy)
        absent = None if contender.family == "strategy" else contender.missing()

        def work(one: Outcome) -> None:
            if absent is not None:
                return one.end("unsupported", absent)
            trace = self._trace(case)
            one.fields |= {
                "baseline_allocated_bytes": trace.baseline_bytes,
                "peak_allocated_bytes": trace.peak_bytes,
                "predicted_peak_bytes": trace.peak_bytes,
                "peak_delta_bytes": trace.activation_bytes,
                "flops_executed": trace.flops,
                "timeline": trace.timeline() if case.kind == "timeline" else None,
            }
            return None

        self._attempt(one, work)
        self._settle(one)
        return self.done[case.key()]

    def _settle(self, one: Outcome) -> None:
        self.done[one.key] = self.store.append(one.record())

    def _attempt(self, one: Outcome, work: Callable[[Outcome], None]) -> None:
        """Do some work for a case; what goes wrong becomes its status.

        Raises:
            DeviceLostError: if it leaves the device unusable.
        """
        try:
            with deadline(TIMEOUT_SECONDS):
                work(one)
        except Exception as error:  # a failing contender is a result, and the next one must run
            one.fail(error)
            if one.status == "oom" and not one.has_memory:  # in turns it may have lacked the others' share only
                self._too_large[_without_batch(one.case)] = one.case.batch
        said = release_memory(one.case.device)  # outside the handler, where no frame of the failure holds tensors
        if said is not None:
            raise DeviceLostError(one.case, said)

    def _memory_of(self, measured: Sequence[Outcome], checks: Checks, timed: bool) -> None:
        """Check each case and measure its memory; what is to be timed is stored without its time for now."""
        for one in measured:
            if not one.has_memory:
                self._attempt(one, functools.partial(self._memory, checks=checks))
                if timed and one.has_memory:
                    self.store.append(one.record())  # a kill in between keeps this much
            if not (timed and one.has_memory):
                self._settle(one)

    def _memory(self, one: Outcome, checks: Checks) -> None:
        case = one.case
        lacking = _lacking(case)
        if lacking is not None:
            return one.end("unsupported", lacking)
        too_large = self.too_large(case)
        if too_large is not None:
            return one.end("skipped", too_large)
        self.progress(f"memory of {case.label()}")
        if compiles(case):  # before the check, whose compiled code the compiler's cache on the disk would keep
            one.fields["compile_s"] = compile_seconds(case)
        forget_compiled([case])
        verdict = checks.check(case)
        if verdict is not None:
            one.fields["max_error_vs_reference"] = verdict.error
            if verdict.wrong is not None:
                one.doubt("incorrect", verdict.wrong)
                if get_contender(case.strategy).family == "strategy":
                    return None  # a wrong strategy gets no figure; a peer is what people use, right or wrong
        repeats = 3 if case.kind == "step" else 1
        forget_compiled([case])
        peak = measure_peak(lambda: measurable(case), torch.device(case.device), repeats, compiles(case))
        if case.kind == "step":
            one.fields |= self._counted(case)
        one.fields |= _fields_of_peak(peak)
        if not peak.steady:
            one.doubt("noisy", f"peaks of repeated steps differ: {peak.repeats}")
        return None

    def _counted(self, case: Case) -> Fields:
        """FLOPs and predicted peak, where the network runs on fake tensors; the reason where it does not."""
        contender = get_contender(case.strategy)
        try:
            plain = dataclasses.replace(case, strategy=contender.reference or case.strategy)
            facts: Fields = {"flops_model": self._trace(plain).flops}
            if not contender.compiles:  # what a compiler makes of it shows only when it runs
                trace = self._trace(case)
                facts |= {"flops_executed": trace.flops, "predicted_peak_bytes": trace.peak_bytes}
        except Exception as error:  # a figure beside the measurement, which must not fail with it
            reason = f"not traced: {first_line(error)}"
            return {"unavailable": {"predicted_peak_bytes": reason, "flops_executed": reason}}
        return facts

    def _trace(self, case: Case) -> StepTrace:
        same = dataclasses.replace(case, kind="step", source="measured", cuda_graph=False)
        if same.key() not in self._traces:
            self._traces[same.key()] = trace_case(same)
        return self._traces[same.key()]

    def _time(self, measured: list[Outcome], group: str) -> None:
        """Time cases in turns and settle them."""
        forget_compiled([one.case for one in measured])
        for one in measured:
            self._attempt(one, warm_up)
        ready = [one for one in measured if one.step is not None]
        if ready:
            self.progress(f"timing {', '.join(one.case.strategy for one in ready)} in turns")
            self._take_turns(ready, group)
        for one in measured:
            if one.step is not None:
                self._attempt(one, _ask_the_driver)
                one.step = None
            self._settle(one)
        gc.collect()

    def _take_turns(self, ready: Sequence[Outcome], group: str) -> None:
        """Time those that are warmed up; each time is on the disk before anything else is tried."""
        steps = {one.key: one.step for one in ready if one.step is not None}
        turns = time_in_turns(steps, torch.device(ready[0].case.device), self.effort)
        by_key = {one.key: one for one in ready}
        for key, error in turns.failures.items():  # in their order: if the device is lost, the first lost it
            by_key[key].fail(error)
            said = release_memory(by_key[key].case.device)
            if said is not None:
                raise DeviceLostError(by_key[key].case, said)
        for one in ready:
            if one.key in turns.samples:
                fill = functools.partial(_fill, samples=turns.samples[one.key], group=group, turns=turns.token)
                self._attempt(one, fill)
                self.store.append(one.record())  # replaced by the complete one, unless that never comes


def _fill(one: Outcome, samples: Sequence[float], group: str, turns: str) -> None:
    """Fill in what the samples say, unless the contender went wrong on the way."""
    moved = changed(one.outputs[0], one.outputs[-1], one.case)
    if moved is not None:
        one.end("incorrect", moved)
        return
    timing = summarize(samples)
    one.fields |= {"time_s": timing, "group": group, "turns": turns}
    one.fields["throughput_img_s"] = one.case.batch / timing.median
    if one.fields.get("flops_model"):
        one.fields["tflops_s"] = one.fields["flops_model"] / timing.median / 1e12
    noise = unsteady(timing)
    if noise is not None:
        one.doubt("noisy", noise)


def _ask_the_driver(one: Outcome) -> None:
    """The host's time, and what only the driver knows; both repeat the step."""
    assert one.step is not None
    device = torch.device(one.case.device)
    one.fields["host_time_s"] = host_seconds(one.step, device)
    facts = facts_while_repeating(one.step, Nvml(device))
    facts["unavailable"] |= one.fields.get("unavailable", {})
    one.fields |= facts


def _lacking(case: Case) -> str | None:
    """What this machine lacks for a case, with the remedy; None if nothing."""
    if case.device == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device; measure on the CPU with --densebench-device cpu"
    return get_contender(case.strategy).missing() or why_no_graph(case)


def _fields_of_peak(peak: Any) -> Fields:
    names = [f.name for f in dataclasses.fields(Record) if hasattr(peak, f.name)]
    return {name: getattr(peak, name) for name in names}


def _without_batch(case: Case) -> str:
    return dataclasses.replace(case, batch=0).key()
