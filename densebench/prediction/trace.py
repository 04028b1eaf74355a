"""One step of training or inference on shapes without data: what it allocates and computes, event by event."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.overrides import TorchFunctionMode

from densebench.kernels import compiled
from densebench.prediction.cuda import rounded
from densebench.prediction.gpus import Gpu
from densebench.prediction.hidden import hidden_on_cpu
from densebench.prediction.shapes import rule_for
from densebench.records import Case, Timeline
from densebench.step_tracker import Allocation, Operation, StepTracker, storage_key
from densebench.workload import Workload, fake_workload

Bytes = NDArray[np.int64]


@dataclass(frozen=True)
class StepTrace:
    """One step on fake tensors, priced for a device.

    Attributes:
        constants: bytes by category of what exists at every moment.
        constant_sizes: bytes of each tensor of it, for the allocator's rounding.
        allocations: everything the step allocated, in order of birth.
        operations: what each event did; event i is `operations[i - 1]`.
        forward_end: the event with which the forward ended.
        device: "cpu" (with what its operators allocate inside, as workspace) or "cuda" (every block rounded).
    """

    constants: dict[str, int]
    constant_sizes: dict[str, tuple[int, ...]]
    allocations: list[Allocation]
    operations: list[Operation]
    forward_end: int
    device: str = "cpu"

    @property
    def end(self) -> int:
        """The event with which the step ended."""
        return len(self.operations)

    @property
    def flops(self) -> int:
        """Of convolutions and matrix products, recomputation included."""
        return sum(operation.flops for operation in self.operations)

    @property
    def bytes_moved(self) -> int:
        return sum(operation.bytes_moved for operation in self.operations)

    @property
    def baseline_bytes(self) -> int:
        return sum(self.constants.values())

    @property
    def peak_bytes(self) -> int:
        return self.baseline_bytes + self.rounding_bytes + int(self.live.max(initial=0))

    @property
    def activation_bytes(self) -> int:
        """The peak beyond what is constant (measuring's `peak_delta_bytes`)."""
        return self.peak_bytes - self.baseline_bytes

    @property
    def rounding_bytes(self) -> int:
        """What the allocator adds to the constants."""
        if self.device != "cuda":
            return 0
        return sum(rounded(n) - n for sizes in self.constant_sizes.values() for n in sizes)

    @property
    def peak_event(self) -> int:
        """The first event at which most is alive."""
        return int(self.live.argmax())

    @cached_property
    def live(self) -> Bytes:
        """Live bytes of what the step allocated, at each of its events."""
        return np.sum(list(self.series.values()), axis=0)

    @cached_property
    def series(self) -> dict[str, Bytes]:
        """The same by category. Activations are what forward leaves for backward."""
        changes = {name: np.zeros(self.end + 2, np.int64) for name in ("activations", "temporaries")}
        for allocation in self.allocations:
            died = self.end if allocation.died is None else allocation.died
            series = changes["activations" if self._kept_for_backward(allocation) else "temporaries"]
            nbytes = rounded(allocation.nbytes) if self.device == "cuda" else allocation.nbytes
            series[allocation.born] += nbytes
            series[died + 1] -= nbytes  # it is still there while its last reader runs
        found = {name: np.cumsum(series)[: self.end + 1] for name, series in changes.items()}
        found["workspace"] = np.zeros(self.end + 1, np.int64)
        if self.device == "cpu":
            found["workspace"][1:] = [operation.hidden for operation in self.operations]
        return found

    def at_peak(self) -> dict[str, int]:
        """Bytes by category at the peak, constants first; they add up to `peak_bytes`."""
        cuda = self.device == "cuda"
        sizes = {name: sum(map(rounded, s)) if cuda else sum(s) for name, s in self.constant_sizes.items()}
        return sizes | {name: int(series[self.peak_event]) for name, series in self.series.items()}

    def roofline_seconds(self, gpu: Gpu) -> float:
        """Roofline time: each operation at the GPU's bandwidth or matrix rate, every operand from memory once.

        What stays in the GPU's cache from one operation to the next may take less.
        """
        return sum(
            max(op.bytes_moved / gpu.bandwidth, op.flops / gpu.rate(op.dtype) if op.flops else 0.0)
            for op in self.operations
        )

    def timeline(self, points: int = 400) -> Timeline:
        """Live bytes by category over the step, thinned to about so many points (peaks are kept).

        What operators allocate inside counts as temporaries.
        """
        total = self.live
        stride = max(1, len(total) // points)
        kept = [at + int(total[at : at + stride].argmax()) for at in range(0, len(total), stride)]
        series = {
            "activations": self.series["activations"],
            "temporaries": self.series["temporaries"] + self.series["workspace"],
        }
        constant = {name: (bytes,) * len(kept) for name, bytes in self.constants.items()}
        live = {name: tuple(int(values[i]) for i in kept) for name, values in series.items()}
        return Timeline(tuple(kept), {**constant, **live}, self.forward_end)

    def _kept_for_backward(self, allocation: Allocation) -> bool:
        born_in_forward = allocation.born <= self.forward_end
        return born_in_forward and (allocation.died is None or allocation.died > self.forward_end)


def trace_case(case: Case) -> StepTrace:
    """Trace one step of a case (see `densebench.records.Case`) without running it; seconds at most."""
    mode, work = fake_workload(case)
    with mode:
        return trace_step(work, case.device)


def trace_step(work: Workload, device: str = "cpu") -> StepTrace:
    """Trace one step of a workload on fake tensors; call inside the FakeTensorMode of its tensors.

    Gradients exist before the step, so that they are a constant as in any step but the first. The tensors lie on a
    CPU whatever the device, but for CUDA nothing chooses what is compiled for a CPU only, and volumes are pooled
    in the dtype that they have.
    """
    work.allocate_gradients()
    tensors = {**dict(work.model.named_parameters()), **dict(work.model.named_buffers())}
    owners = {storage_key(tensor): name for name, tensor in tensors.items()}
    with _as_on(device), StepTracker(hidden_on_cpu, owners, rule_for) as tracker:
        output = work.forward()
        forward_end = tracker.event
        if work.mode == "train":
            work.backward(output)
        del output
    constants = {name: [t.nbytes for t in tensors] for name, tensors in work.constant_tensors().items()}
    return StepTrace(
        {name: sum(sizes) for name, sizes in constants.items()},
        {name: tuple(sizes) for name, sizes in constants.items()},
        tracker.allocations,
        tracker.operations,
        forward_end,
        device,
    )


@contextlib.contextmanager
def _as_on(device: str) -> Iterator[None]:
    if device != "cuda":
        yield
        return
    with compiled.using(None), _PoolsAsOnCuda():
        yield


class _PoolsAsOnCuda(TorchFunctionMode):
    """On a CPU autocast pools volumes in float32, and maps become twice as large; on a GPU it does not."""

    POOLS = ("max_pool3d", "max_pool3d_with_indices", "avg_pool3d", "adaptive_avg_pool3d", "adaptive_max_pool3d")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") not in self.POOLS:
            return func(*args, **(kwargs or {}))
        with torch.autocast("cpu", enabled=False):
            return func(*args, **(kwargs or {}))
