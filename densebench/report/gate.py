"""The gate: whether a new run needs more memory or time than an old one, case by case."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from densebench.capacities import MIB
from densebench.records import Record, Timing

MEMORY_SLACK = MIB  # bytes: allocator rounding, and the profiler's own small tensors
TIME_SLACK = 50e-6  # seconds: what a timer and one launch may differ by
DEFAULT = "mem:2%,time:10%"
RESAMPLES = 2000
FEW = 5  # samples; below that a bootstrap says less than the extremes do
_GOOD = ("ok", "noisy")


class ToleranceError(ValueError):
    """A text that is no tolerance; the message says what one looks like."""


@dataclass(frozen=True)
class Tolerance:
    """Shares by which a new figure may exceed the old one; what is None is not compared."""

    memory: float | None
    time: float | None


@dataclass(frozen=True)
class Regression:
    """A case that got worse: what, from where to where."""

    label: str
    what: str
    old: str
    new: str

    def line(self) -> str:
        return f"{self.what:<11} {self.label}: {self.old} -> {self.new}"


@dataclass(frozen=True)
class Verdict:
    """What the gate found; `compared` counts the cases that both runs have."""

    regressions: tuple[Regression, ...]
    compared: int
    notes: tuple[str, ...] = ()


def parse_tolerance(text: str) -> Tolerance:
    """Read "mem:2%,time:10%", in any order, one of them or both.

    Raises:
        ToleranceError: for anything else.
    """
    found: dict[str, float] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(mem|time)\s*:\s*(\d+(?:\.\d+)?)\s*%\s*", part)
        if match is None or match[1] in found:
            raise ToleranceError(f"cannot read {text!r} as tolerances; they look like {DEFAULT}")
        found[match[1]] = float(match[2]) / 100
    return Tolerance(found.get("mem"), found.get("time"))


def compare(old: Sequence[Record], new: Sequence[Record], tolerance: Tolerance) -> Verdict:
    """Compare the last record of each case.

    A regression is: more memory, or more time with intervals that do not overlap, beyond tolerance and slack;
    a case that ended well and no longer does; and one that disappeared.
    """
    before, after = _by_case(old), _by_case(new)
    regressions: list[Regression] = []
    shared = [key for key in before if key in after]
    for key in before:
        regressions += _compare(before[key], after.get(key), tolerance)
    devices = [dict.fromkeys(str(r.environment.get("device")) for r in run.values()) for run in (before, after)]
    notes = []
    if devices[0] != devices[1]:
        names = ["; ".join(device) for device in devices]
        notes.append(f"old ran on {names[0]}, new on {names[1]}: their times say little about the code")
    return Verdict(tuple(regressions), len(shared), tuple(notes))


def interval(timing: Timing, seed: int = 0) -> tuple[float, float]:
    """Where the median lies: bootstrap at 95 %, or the extremes of very few samples, or the quartiles if none."""
    if not timing.samples:
        return timing.q1, timing.q3
    if len(timing.samples) < FEW:
        return min(timing.samples), max(timing.samples)
    samples = np.asarray(timing.samples)
    draws = np.random.default_rng(seed).integers(0, len(samples), size=(RESAMPLES, len(samples)))
    low, high = np.quantile(np.median(samples[draws], axis=1), [0.025, 0.975]).tolist()
    return float(low), float(high)


def _by_case(records: Iterable[Record]) -> dict[str, Record]:
    return {record.case.key(): record for record in records}


def _compare(old: Record, new: Record | None, tolerance: Tolerance) -> list[Regression]:
    label = f"{old.case.kind} {old.case.label()}{_options(old)}"
    if old.status not in _GOOD:
        return []
    if new is None:
        return [Regression(label, "disappeared", old.status, "no record")]
    if new.status not in _GOOD:
        reason = f"{new.status} ({new.reason})" if new.reason else new.status
        return [Regression(label, "failed", old.status, reason)]
    return [*_memory(label, old, new, tolerance.memory), *_time(label, old, new, tolerance.time)]


def _memory(label: str, old: Record, new: Record, tolerance: float | None) -> list[Regression]:
    if tolerance is None or old.peak_delta_bytes is None:
        return []
    before, after = old.peak_delta_bytes, new.peak_delta_bytes
    if after is None:
        return [Regression(label, "disappeared", _mib(before), "no memory figure")]
    if after <= before * (1 + tolerance) + MEMORY_SLACK:
        return []
    return [Regression(label, "memory", _mib(before), f"{_mib(after)} ({after / max(before, 1) - 1:+.1%})")]


def _time(label: str, old: Record, new: Record, tolerance: float | None) -> list[Regression]:
    if tolerance is None or old.time_s is None:
        return []
    if new.time_s is None:
        return [Regression(label, "disappeared", _ms(old.time_s), "no time")]
    before, after = old.time_s.median, new.time_s.median
    apart = interval(new.time_s)[0] > interval(old.time_s)[1]
    if after <= before * (1 + tolerance) + TIME_SLACK or not apart:
        return []
    return [Regression(label, "time", _ms(old.time_s), f"{_ms(new.time_s)} ({after / before - 1:+.1%})")]


def _options(record: Record) -> str:
    options = sorted(record.case.options.items())
    return f" {' '.join(f'{key}={value}' for key, value in options)}" if options else ""


def _mib(value: int) -> str:
    return f"{value / MIB:,.1f} MiB"


def _ms(timing: Timing) -> str:
    return f"{timing.median * 1e3:,.3f} ms"
