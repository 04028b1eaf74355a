"""Peak memory of a step, as the allocator saw it.

On CUDA the allocator keeps the figures itself. On a CPU PyTorch keeps none, but its profiler records every
allocation and release (also those inside an operator, which no dispatch-level tracker sees); the peak is the
highest point of their running sum. Both count bytes as they were asked for: CUDA's allocator rounds each tensor
up to 512 bytes, and so a thousand small parameters would count as activations. Memory that a library takes for
itself, past PyTorch's allocator, is not in either figure: oneDNN's and MKL's own buffers on a CPU.
"""

from __future__ import annotations

import gc
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.profiler import ProfilerActivity, profile, record_function

os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # else each use of the profiler writes two lines to stderr
_MARK = "densebench.measured_step"


class Measurable(Protocol):
    """What can be measured: a step, and what it needs to exist besides its activations."""

    def step(self) -> object:
        """One step; gradients accumulate."""

    def clear_gradients(self) -> None:
        """Release all gradients."""

    def constant_bytes(self) -> int:
        """Parameters, gradients, buffers, input and upstream gradient, computed from their shapes."""


@dataclass(frozen=True)
class Peak:
    """Peaks of one workload, in bytes; the names are those of `densebench.records.Record`.

    `repeats` are the allocated peaks of repeated steps: identical on CUDA, within 1 % on a CPU, or the
    figure is not to be trusted.
    """

    baseline_allocated_bytes: int
    peak_allocated_bytes: int
    plain_peak_bytes: int
    workspace_bytes: int
    repeats: tuple[int, ...]
    peak_reserved_bytes: int | None
    host_peak_rss_bytes: int | None

    @property
    def peak_delta_bytes(self) -> int:
        """Activation bytes: the peak beyond what is constant, library workspaces apart."""
        return self.peak_allocated_bytes - self.baseline_allocated_bytes - self.workspace_bytes

    @property
    def steady(self) -> bool:
        return max(self.repeats) <= 1.01 * min(self.repeats)


def measure_peak(
    build: Callable[[], Measurable], device: torch.device, repeats: int = 3, warm_up: bool = True
) -> Peak:
    """Build a workload and measure the peak of its steps; everything it allocates is charged to it.

    One step warms up; then one starts without gradients (its peak is `plain_peak_bytes`) and `repeats` with
    the gradients in place.

    Args:
        warm_up: may be False on a CPU, where PyTorch tunes nothing, for what does not compile itself.
    """
    gc.collect()
    _reset_host_peak()
    if device.type == "cuda":
        return _cuda_peak(build, repeats)
    return _cpu_peak(build, repeats, warm_up)


def _cpu_peak(build: Callable[[], Measurable], count: int, warm_up: bool) -> Peak:
    # There is one cycle; without `acc_events` PyTorch before 2.13 warns that the next would lose its events.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        work = build()
        if warm_up:
            work.step()
            work.clear_gradients()
        for _ in range(1 + count):
            with record_function(_MARK):
                work.step()
        constant = work.constant_bytes()
        del work
    plain, *repeats = _peaks_within_marks(_events(profiler))
    return Peak(constant, max(repeats), plain, 0, tuple(repeats), None, _host_peak())


def _peaks_within_marks(events: list[tuple[str, int, int]]) -> list[int]:
    """The highest running sum of allocated bytes within each marked span.

    Args:
        events: (name, time in ns, bytes or duration in ns) of allocations and marks, in any order.
    """
    marks = sorted((start, start + size) for name, start, size in events if name == _MARK)
    changes = sorted(((time, size) for name, time, size in events if name == "[memory]"), key=lambda c: c[0])
    peaks = []
    live = index = 0
    for start, end in marks:
        while index < len(changes) and changes[index][0] < start:
            live += changes[index][1]
            index += 1
        peak = live
        while index < len(changes) and changes[index][0] <= end:
            live += changes[index][1]
            peak = max(peak, live)
            index += 1
        peaks.append(peak)
    return peaks


def _events(profiler: profile) -> list[tuple[str, int, int]]:
    """Allocations and marks that a profiler saw: (name, time in ns, bytes or duration in ns)."""
    try:
        raw: Any = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
        named = ((event.name(), event) for event in raw)
        return [
            (name, event.start_ns(), event.nbytes() if name == "[memory]" else event.duration_ns())
            for name, event in named
            if name in ("[memory]", _MARK)
        ]
    except AttributeError:  # not public; the trace file is, but costs seconds for a large network
        return _events_of_trace(profiler)


def _events_of_trace(profiler: profile) -> list[tuple[str, int, int]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_text())["traceEvents"]
    events = []
    for event in trace:
        if event.get("name") == "[memory]":
            events.append(("[memory]", round(event["ts"] * 1000), int(event["args"]["Bytes"])))
        elif event.get("name") == _MARK and event.get("ph") == "X":
            events.append((_MARK, round(event["ts"] * 1000), round(event["dur"] * 1000)))
    return events


def _cuda_peak(build: Callable[[], Measurable], count: int) -> Peak:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    _release_cublas_workspaces()
    before = _requested("current")
    work = build()
    work.step()  # where cuDNN tries its algorithms, each with a workspace that no later step takes
    work.clear_gradients()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # the reserved bytes of those trials, too
    peaks = []
    for _ in range(1 + count):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        work.step()
        torch.cuda.synchronize()
        peaks.append(_requested("peak") - before)
    reserved = torch.cuda.max_memory_reserved()
    constant = work.constant_bytes()
    workspace = _release_cublas_workspaces()
    del work
    plain, *repeats = peaks
    return Peak(constant, max(repeats), plain, workspace, tuple(repeats), reserved, _host_peak())


def _release_cublas_workspaces() -> int:
    """Give back what cuBLAS keeps between calls (2 x 32 MiB on Hopper); returns its bytes."""
    before = _requested("current")
    torch._C._cuda_clearCublasWorkspaces()
    return before - _requested("current")


def _requested(when: str) -> int:
    """Bytes asked of CUDA's allocator, "current" or at their "peak" since it was last reset.

    Only PyTorch's own allocator counts what was asked for; of another one (cudaMallocAsync), what it gave.
    """
    name = "requested_bytes" if torch.cuda.get_allocator_backend() == "native" else "allocated_bytes"
    return int(torch.cuda.memory_stats()[f"{name}.all.{when}"])


def _reset_host_peak() -> None:
    """Start the kernel's own record of this process's peak anew, where it lets us."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _host_peak() -> int | None:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), None)
