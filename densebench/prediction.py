"""Peak memory and FLOPs of a step without the device: the model's own code on shapes without data."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from densebench.results import Case, Timeline
from densebench.step_tracker import Allocation, StepTracker
from densebench.workload import Workload, fake_workload

CATEGORIES = ("parameters", "gradients", "buffers", "input", "activations", "temporaries")


@dataclass(frozen=True)
class StepTrace:
    """One step on fake tensors.

    Attributes:
        constants: bytes by category of what exists at every moment.
        allocations: everything the step allocated, in order of birth.
        forward_end, end: events (operations so far) with which the forward and the step ended.
        flops: of convolutions and matrix products, recomputation included.
    """

    constants: dict[str, int]
    allocations: list[Allocation]
    forward_end: int
    end: int
    flops: int

    @property
    def baseline_bytes(self) -> int:
        return sum(self.constants.values())

    @property
    def peak_bytes(self) -> int:
        return self.baseline_bytes + max(map(sum, zip(*self._live().values(), strict=True)), default=0)

    @property
    def activation_bytes(self) -> int:
        """The peak beyond what is constant (measuring's `peak_delta_bytes`)."""
        return self.peak_bytes - self.baseline_bytes

    def timeline(self, points: int = 400) -> Timeline:
        """Live bytes by category over the step, thinned to about so many points (peaks are kept)."""
        live = self._live()
        total = [sum(values) for values in zip(*live.values(), strict=True)]
        stride = max(1, len(total) // points)
        kept = [
            max(range(at, min(at + stride, len(total))), key=total.__getitem__)
            for at in range(0, len(total), stride)
        ]
        series = {name: tuple(values[i] for i in kept) for name, values in live.items()}
        constant = {name: (bytes,) * len(kept) for name, bytes in self.constants.items()}
        return Timeline(tuple(kept), {**constant, **series}, self.forward_end)

    def _live(self) -> dict[str, list[int]]:
        """Live bytes of what the step allocated, by category, at each of its events."""
        length = self.end + 1
        changes = {"activations": [0] * (length + 1), "temporaries": [0] * (length + 1)}
        for allocation in self.allocations:
            died = self.end if allocation.died is None else allocation.died
            series = changes["activations" if self._kept_for_backward(allocation) else "temporaries"]
            series[allocation.born] += allocation.nbytes
            series[died + 1] -= allocation.nbytes  # it is still there while its last reader runs
        return {name: list(accumulate(series[:length])) for name, series in changes.items()}

    def _kept_for_backward(self, allocation: Allocation) -> bool:
        born_in_forward = allocation.born <= self.forward_end
        return born_in_forward and (allocation.died is None or allocation.died > self.forward_end)


def trace_case(case: Case) -> StepTrace:
    """Trace one step of a case (see `densebench.results.Case`) without running it; a few seconds."""
    mode, work = fake_workload(case)
    with mode:
        return trace_step(work)


def trace_step(work: Workload) -> StepTrace:
    """Trace one step of a workload on fake tensors; call inside the FakeTensorMode of its tensors.

    Gradients exist before the step, so that they are a constant as in any step but the first.
    """
    work.allocate_gradients()
    with StepTracker() as tracker:
        output = work.forward()
        forward_end = tracker.event
        if work.mode == "train":
            work.backward(output)
        del output
    return StepTrace(work.constants(), tracker.allocations, forward_end, tracker.event, tracker.flops)
