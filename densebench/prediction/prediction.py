"""`Prediction`: what a step of a network will need."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from densebench.capacities import GIB, MIB
from densebench.records import Timeline


@dataclass(frozen=True)
class Prediction:
    """What one step needs.

    Attributes:
        peak_bytes: the most that is alive at once; `breakdown` splits it by category: parameters, gradients,
            buffers, input, optimizer, activations (left by forward for backward), temporaries, workspace
            (libraries' on CUDA; what operators allocate inside on a CPU).
        activation_bytes: the part of the peak that is not parameters, gradients, buffers, input, optimizer
            state or libraries' workspace.
        operation, module: what runs at the peak, and whose parameters it (or the one before it) uses.
        flops_model: 2 x multiply-adds without recomputation; None where the network has no strategies to tell
            it from. `flops_executed` with it.
        bytes_moved: what the step's operations read and write, each once.
        roofline_s: seconds of the step on `gpu` at its bandwidth or matrix rate, whichever is slower for each
            operation, with every operand read from memory once.
        timeline: live bytes by category over the step.
        fits, largest_batch: for `device_memory`, `reserved_bytes` of which is left to the driver.
    """

    model: str
    input_shape: tuple[int, ...]
    strategy: str | None
    mode: str
    dtype: str | None
    autocast: str | None
    optimizer: str | None
    device: str
    peak_bytes: int
    activation_bytes: int
    breakdown: dict[str, int]
    operation: str
    module: str
    flops_model: int | None
    flops_executed: int
    bytes_moved: int
    gpu: str
    roofline_s: float
    timeline: Timeline = dataclasses.field(repr=False)  # thousands of numbers
    reserved_bytes: int = 0
    device_memory: int | None = None
    fits: bool | None = None
    largest_batch: int | None = None

    def __str__(self) -> str:
        """A few lines to read: the question, the peak and what it consists of, work, and whether it fits."""
        of = f" of {self.module}" if self.module else ""
        lines = [f"{self.question}: predicted", f"{_in_mib(self.peak_bytes)} at the peak, in {self.operation}{of}"]
        parts = sorted(self.breakdown.items(), key=lambda part: -part[1])
        lines += [f"{_in_mib(count)} {name}" for name, count in parts if count]
        lines.append(
            f"{self.flops_executed / 1e9:,.1f} GFLOP, {self.bytes_moved / 1e9:,.1f} GB read and written: "
            f"{1e3 * self.roofline_s:,.1f} ms on {self.gpu} by its roofline"
        )
        if self.device_memory is not None and self.largest_batch is not None:
            verdict = "fits" if self.fits else "does not fit"
            memory = f"{self.device_memory / GIB:,.2f} GiB"
            if self.reserved_bytes:
                memory += f", of which {self.reserved_bytes / GIB:.1f} GiB are left to the driver"
            lines.append(f"{verdict} in {memory}; largest batch: {self.largest_batch:,}")
        return "\n".join(lines)

    @property
    def question(self) -> str:
        """What was asked, in a line: the network, its step, precision and device."""
        strategy = f" with {self.strategy}" if self.strategy else ""
        shape = "x".join(map(str, self.input_shape))
        autocast = f"autocast {self.autocast}" if self.autocast else None
        settings = [setting for setting in (self.dtype, autocast, self.optimizer) if setting]
        return f"{', '.join([f'{self.model}{strategy}', f'{self.mode} {shape}', *settings])}, on {self.device}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Prediction:
        """The inverse of `to_dict`, also after a way through JSON."""
        timeline = data["timeline"]
        series = {name: tuple(values) for name, values in timeline["bytes"].items()}
        restored = Timeline(tuple(timeline["events"]), series, timeline["forward_end"])
        return cls(**data | {"input_shape": tuple(data["input_shape"]), "timeline": restored})


def _in_mib(count: int) -> str:
    return f"{count / MIB:10,.1f} MiB"
