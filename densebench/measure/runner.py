"""Measure cases: check, memory, then time in turns; every case ends in a record, whatever happens to it."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor

from densebench.contenders import get_contender
from densebench.measure.deadline import TIMEOUT_SECONDS, deadline
from densebench.measure.environment import environment, identity
from densebench.measure.graph import Graphed, why_no_graph
from densebench.measure.memory import Measurable, measure_peak
from densebench.measure.nvml import Nvml, facts_while_repeating
from densebench.measure.outcome import Fields, Outcome, first_line
from densebench.measure.timing import Effort, Step, host_seconds, time_in_turns
from densebench.measure.validation import Checks, changed
from densebench.prediction import StepTrace, trace_case
from densebench.results import Case, Record, RunStore, latest
from densebench.statistics import summarize, unsteady
from densebench.workload import Workload, build_workload


class Runner:
    """Measures groups of cases and appends their records to a store.

    Args:
        store: where records go, each as soon as it is known.
        effort: how long to time.
        resume: take over what the store already holds for the same commit and environment.
        progress: called with one line for each thing that is begun.
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
        self.done = self._already_measured() if resume else {}
        self._too_large: dict[str, int] = {}
        self._traces: dict[str, StepTrace] = {}

    def measure(self, cases: Sequence[Case], group: str | None, checks: Checks | None = None) -> list[Record]:
        """Measure cases of one network and shape; one record each, in the same order.

        Args:
            cases: what to measure.
            group: the name under which they are timed in turns; None measures memory only.
            checks: verdicts of an earlier call to go on from.
        """
        measured = [Outcome(case) for case in cases if case.key() not in self.done]
        if group is not None and len(measured) < len(cases):  # what was timed before does not pair with these
            group = f"{group}, resumed {datetime.now(UTC):%Y-%m-%d %H:%M:%S}"
        self._memory_of(measured, checks or Checks(one_network=group is None), timed=group is not None)
        if group is not None:
            timed = [one for one in measured if one.has_memory]
            self._time(timed, group)
            for one in timed:
                self._settle(one)
        return [self.done[case.key()] for case in cases]

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

    def _already_measured(self) -> dict[str, Record]:
        records = [r for r in latest(self.store.read()) if r.status not in ("error", "crash", "timeout")]
        return {
            r.case.key(): r
            for r in records
            if identity(r.environment) == identity(environment(r.case.device)) and _is_complete(r)
        }

    def _settle(self, one: Outcome) -> None:
        self.done[one.key] = self.store.append(one.record())

    def _attempt(self, one: Outcome, work: Callable[[Outcome], None]) -> None:
        """Do some work for a case; what goes wrong becomes its status."""
        try:
            with deadline(TIMEOUT_SECONDS):
                work(one)
        except Exception as error:  # a failing contender is a result, and the next one must run
            one.fail(error)
            if one.status == "oom" and not one.has_memory:  # in turns it may have lacked the others' share only
                self._too_large[_without_batch(one.case)] = one.case.batch
        gc.collect()  # outside the handler, where no frame of the failure holds tensors
        if one.case.device == "cuda" and torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _memory_of(self, measured: Sequence[Outcome], checks: Checks, timed: bool) -> None:
        """Check each case and measure its memory; what is to be timed is stored without its time for now."""
        for one in measured:
            self._attempt(one, lambda one: self._memory(one, checks))
            if timed and one.has_memory:
                self.store.append(one.record())  # a kill in between keeps this much
            else:
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
        verdict = checks.check(case)
        if verdict is not None:
            one.fields["max_error_vs_reference"] = verdict.error
            if verdict.wrong is not None:
                one.doubt("incorrect", verdict.wrong)
                if get_contender(case.strategy).family == "strategy":
                    return None  # a wrong strategy gets no figure; a peer is what people use, right or wrong
        repeats = 3 if case.kind == "step" else 1
        warm_up = get_contender(case.strategy).compiles
        peak = measure_peak(lambda: _build(case), torch.device(case.device), repeats, warm_up)
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
            naive = dataclasses.replace(case, strategy="naive") if contender.models == "densenet" else case
            facts: Fields = {"flops_model": self._trace(naive).flops}
            if not contender.compiles:  # what a compiler makes of it shows only when it runs
                trace = self._trace(case)
                facts |= {"flops_executed": trace.flops, "predicted_peak_bytes": trace.peak_bytes}
        except Exception as error:  # a figure beside the measurement, which must not fail with it
            reason = f"not traced: {first_line(error)}"
            return {"unavailable": {"predicted_peak_bytes": reason, "flops_executed": reason}}
        return facts

    def _trace(self, case: Case) -> StepTrace:
        same = dataclasses.replace(case, kind="step", source="measured", device="cpu", cuda_graph=False)
        if same.key() not in self._traces:
            self._traces[same.key()] = trace_case(same)
        return self._traces[same.key()]

    def _time(self, measured: list[Outcome], group: str) -> None:
        for one in measured:
            self._attempt(one, self._warm)
        steps = {one.key: one.step for one in measured if one.step is not None}
        if not steps:
            return
        ready = [one for one in measured if one.key in steps]
        self.progress(f"timing {', '.join(one.case.strategy for one in ready)} in turns")
        turns = time_in_turns(steps, torch.device(ready[0].case.device), self.effort)
        for one in ready:
            if one.key in turns.failures:
                one.fail(turns.failures[one.key])
            else:
                samples = turns.samples[one.key]
                self._attempt(one, lambda one, samples=samples: self._timed(one, samples, group))  # type: ignore[misc]
            one.step = None
        gc.collect()

    def _timed(self, one: Outcome, samples: Sequence[float], group: str) -> None:
        """Fill in what the samples say, unless the contender went wrong on the way."""
        moved = changed(one.outputs[0], one.outputs[-1], one.case)
        if moved is not None:
            one.end("incorrect", moved)
            return
        timing = summarize(samples)
        one.fields |= {"time_s": timing, "group": group, "throughput_img_s": one.case.batch / timing.median}
        if one.fields.get("flops_model"):
            one.fields["tflops_s"] = one.fields["flops_model"] / timing.median / 1e12
        noise = unsteady(timing)
        if noise is not None:
            one.doubt("noisy", noise)
        assert one.step is not None
        device = torch.device(one.case.device)
        one.fields["host_time_s"] = host_seconds(one.step, device)
        facts = facts_while_repeating(one.step, Nvml(device))
        facts["unavailable"] |= one.fields.get("unavailable", {})
        one.fields |= facts

    def _warm(self, one: Outcome) -> None:
        work = build_workload(one.case)
        start = time.perf_counter()
        one.outputs.append(work.step().clone())
        if one.case.device == "cuda":
            torch.cuda.synchronize()
        if get_contender(one.case.strategy).compiles:
            one.fields["compile_s"] = time.perf_counter() - start
        one.step = _fresh_step(work, one.outputs) if not one.case.cuda_graph else _replayed(work, one.outputs)


def _lacking(case: Case) -> str | None:
    """What this machine lacks for a case, with the remedy; None if nothing."""
    if case.device == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device; measure on the CPU with --densebench-device cpu"
    return get_contender(case.strategy).missing() or why_no_graph(case)


def _build(case: Case) -> Measurable:
    work = build_workload(case)
    return Graphed(work) if case.cuda_graph else work


def _replayed(work: Workload, outputs: list[Tensor]) -> Step:
    """A step that replays a graph; its gradients are the graph's own and overwritten each time."""
    graph = Graphed(work)
    work.clear_gradients()
    graph.step()

    def step() -> None:
        outputs[1:] = [graph.replay()]

    return step


def _fresh_step(work: Workload, outputs: list[Tensor]) -> Step:
    """A step as training loops take it: gradients are released first."""

    def step() -> None:
        work.clear_gradients()
        outputs[1:] = [work.step()]

    return step


def _fields_of_peak(peak: Any) -> Fields:
    names = [f.name for f in dataclasses.fields(Record) if hasattr(peak, f.name)]
    return {name: getattr(peak, name) for name in names}


def _without_batch(case: Case) -> str:
    return dataclasses.replace(case, batch=0).key()


def _is_complete(record: Record) -> bool:
    timed = record.case.kind == "step" and record.case.source == "measured"
    return record.status != "ok" or not timed or record.time_s is not None
