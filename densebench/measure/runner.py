"""Measure cases: check, memory, then time in turns; every case ends in a record, whatever happens to it."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from densebench.contenders import get_contender
from densebench.measure.environment import environment, identity
from densebench.measure.memory import measure_peak
from densebench.measure.nvml import Nvml
from densebench.measure.timing import Effort, Step, host_seconds, time_in_turns
from densebench.measure.validation import Reference, can_be_checked
from densebench.prediction import StepTrace, trace_case
from densebench.registry import UnsupportedError
from densebench.results import Case, Record, RunStore, Status, latest
from densebench.statistics import summarize
from densebench.workload import Workload, build_workload

Fields = dict[str, Any]
ENERGY_SECONDS = 1.0  # NVML's energy counter moves in steps of about 100 ms


@dataclass
class _Measured:
    """A case on its way to a record."""

    case: Case
    status: Status = "ok"
    reason: str | None = None
    fields: Fields = dataclasses.field(default_factory=dict)

    def record(self) -> Record:
        facts = environment(self.case.device)
        return Record(self.case, self.status, self.reason, environment=facts, **self.fields)


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
        self._too_large: dict[tuple[Any, ...], int] = {}
        self._traces: dict[str, StepTrace] = {}

    def measure(self, cases: Sequence[Case], group: str | None) -> list[Record]:
        """Measure cases of one network and shape; one record each, in the same order.

        Args:
            cases: what to measure.
            group: the name under which they are timed in turns; None measures memory only.
        """
        measured = [_Measured(case) for case in cases if case.key() not in self.done]
        reference = self._reference(measured)
        for one in measured:
            self._attempt(one, lambda one: self._memory(one, reference))
            if group is not None and one.fields.get("peak_delta_bytes"):
                self.store.append(one.record())  # its time follows; a kill in between keeps this much
        if group is not None:
            self._time([one for one in measured if "peak_delta_bytes" in one.fields], group)
        for one in measured:
            self.done[one.case.key()] = self.store.append(one.record())
        return [self.done[case.key()] for case in cases]

    def predict(self, case: Case) -> Record:
        """The record of a case that is not run: its predicted peak, FLOPs and memory over the step."""
        if case.key() in self.done:
            return self.done[case.key()]
        self.progress(f"predicting {case.label()}")
        one = _Measured(case)

        def work(one: _Measured) -> None:
            trace = self._trace(case)
            one.fields |= {
                "baseline_allocated_bytes": trace.baseline_bytes,
                "peak_allocated_bytes": trace.peak_bytes,
                "predicted_peak_bytes": trace.peak_bytes,
                "peak_delta_bytes": trace.activation_bytes,
                "flops_executed": trace.flops,
                "timeline": trace.timeline() if case.kind == "timeline" else None,
            }

        self._attempt(one, work)
        self.done[case.key()] = self.store.append(one.record())
        return self.done[case.key()]

    def _already_measured(self) -> dict[str, Record]:
        records = [r for r in latest(self.store.read()) if r.status not in ("error", "crash", "timeout")]
        return {
            r.case.key(): r
            for r in records
            if identity(r.environment) == identity(environment(r.case.device)) and _is_complete(r)
        }

    def _reference(self, measured: list[_Measured]) -> Reference | None:
        """What the group's contenders are checked against; None where none of them runs our DenseNet."""
        for one in measured:
            if can_be_checked(one.case) and one.case.mode != "forward":
                self.progress(f"reference for {one.case.label()}")
                return Reference(one.case)
        return None

    def _attempt(self, one: _Measured, work: Callable[[_Measured], None]) -> None:
        """Do some work for a case; what goes wrong becomes its status."""
        try:
            work(one)
        except UnsupportedError as error:
            one.status, one.reason = "unsupported", str(error)
        except torch.OutOfMemoryError as error:
            one.status, one.reason = "oom", _first_line(error)
            self._too_large[_without_batch(one.case)] = one.case.batch
        except Exception as error:  # a failing contender is a result, and the next one must run
            one.status, one.reason = "error", f"{type(error).__name__}: {_first_line(error)}"
        gc.collect()  # outside the handler, where no frame of the failure holds tensors
        if one.case.device == "cuda":
            torch.cuda.empty_cache()

    def _memory(self, one: _Measured, reference: Reference | None) -> None:
        case = one.case
        missing = get_contender(case.strategy).missing()
        if missing is not None:
            one.status, one.reason = "unsupported", missing
            return
        if self._too_large.get(_without_batch(case), case.batch) < case.batch:
            one.status, one.reason = "skipped", "larger than one that did not fit"
            return
        self.progress(f"memory of {case.label()}")
        if reference is not None and can_be_checked(case):
            verdict = reference.check(case.strategy)
            one.fields["max_error_vs_reference"] = verdict.error
            if verdict.wrong is not None:
                one.status, one.reason = "incorrect", verdict.wrong
                if get_contender(case.strategy).family == "strategy":
                    return  # a wrong strategy gets no time; a peer is what people use, right or wrong
        repeats = 3 if case.kind == "step" else 1
        peak = measure_peak(lambda: build_workload(case), torch.device(case.device), repeats)
        one.fields |= _fields_of_peak(peak)
        if case.kind == "step":
            one.fields |= self._counted(case)
        if not peak.steady:
            one.status, one.reason = "noisy", f"peaks of repeated steps differ: {peak.repeats}"

    def _counted(self, case: Case) -> Fields:
        """FLOPs and predicted peak, where the network runs on fake tensors."""
        if get_contender(case.strategy).compiles:
            case = dataclasses.replace(case, strategy="naive")
            return {"flops_model": self._trace(case).flops}
        trace = self._trace(case)
        model = trace
        if get_contender(case.strategy).models == "densenet":
            model = self._trace(dataclasses.replace(case, strategy="naive"))
        return {
            "flops_model": model.flops,
            "flops_executed": trace.flops,
            "predicted_peak_bytes": trace.peak_bytes,
        }

    def _trace(self, case: Case) -> StepTrace:
        key = case.key()
        if key not in self._traces:
            self._traces[key] = trace_case(case)
        return self._traces[key]

    def _time(self, measured: list[_Measured], group: str) -> None:
        works: dict[str, Workload] = {}
        for one in measured:
            self._attempt(one, lambda one: works.update({one.case.key(): self._warm(one)}))
        if not works:
            return
        ready = [one for one in measured if one.case.key() in works]
        self.progress(f"timing {', '.join(one.case.strategy for one in ready)} in turns")
        device = torch.device(ready[0].case.device)
        steps: dict[str, Step] = {key: _fresh_step(work) for key, work in works.items()}
        samples = time_in_turns(steps, device, self.effort)
        for one in ready:
            timing = summarize(samples[one.case.key()])
            step = steps[one.case.key()]
            one.fields |= {"time_s": timing, "group": group, "host_time_s": host_seconds(step, device)}
            one.fields["throughput_img_s"] = one.case.batch / timing.median
            if one.fields.get("flops_model"):
                one.fields["tflops_s"] = one.fields["flops_model"] / timing.median / 1e12
            one.fields |= _driver_facts(step, device)

    def _warm(self, one: _Measured) -> Workload:
        work = build_workload(one.case)
        start = time.perf_counter()
        work.step()
        if one.case.device == "cuda":
            torch.cuda.synchronize()
        if get_contender(one.case.strategy).compiles:
            one.fields["compile_s"] = time.perf_counter() - start
        return work


def _fresh_step(work: Workload) -> Step:
    """A step as training loops take it: gradients are released first."""

    def step() -> None:
        work.clear_gradients()
        work.step()

    return step


def _driver_facts(step: Step, device: torch.device) -> Fields:
    """Clocks, throttling and energy while a step repeats; a reason where the driver does not tell."""
    nvml = Nvml(device)
    if nvml.unavailable is not None:
        return {"unavailable": dict.fromkeys(("energy_j", "sm_clock_mhz", "throttled"), nvml.unavailable)}
    before, repeats, start = nvml.read(), 0, time.perf_counter()
    while time.perf_counter() - start < ENERGY_SECONDS:
        step()
        torch.cuda.synchronize()
        repeats += 1
    after = nvml.read()
    facts: Fields = {
        "sm_clock_mhz": after.sm_clock_mhz,
        "clock_event_reasons": after.event_reasons,
        "throttled": after.throttled,
        "process_device_bytes": after.process_bytes,
        "shared_gpu": None if after.other_processes is None else after.other_processes > 0,
    }
    if before.energy_mj is not None and after.energy_mj is not None:
        facts["energy_j"] = (after.energy_mj - before.energy_mj) / 1000 / repeats
    return facts


def _fields_of_peak(peak: Any) -> Fields:
    names = [f.name for f in dataclasses.fields(Record) if hasattr(peak, f.name)]
    return {name: getattr(peak, name) for name in names}


def _without_batch(case: Case) -> tuple[Any, ...]:
    return (
        case.model,
        case.strategy,
        case.mode,
        case.input_shape,
        case.dtype,
        case.autocast,
        case.memory_format,
    )


def _is_complete(record: Record) -> bool:
    timed = record.case.kind == "step" and record.case.source == "measured"
    return record.status != "ok" or not timed or record.time_s is not None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
