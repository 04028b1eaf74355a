"""Time of a step by the device's own clock, several contenders in turns."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Step = Callable[[], object]
Clock = Callable[[Step], float]


@dataclass(frozen=True)
class Effort:
    """How long to go on with a contender: until it has `rounds` samples, or its time is up.

    Attributes:
        rounds: samples wanted of each contender.
        seconds: a contender leaves earlier once it has been timed for this long and has `least` samples.
        least: never fewer samples than this.
    """

    rounds: int = 20
    seconds: float = 2.0
    least: int = 5


class ClockError(RuntimeError):
    """A clock stood still or went backwards: what it says is no time."""


def _token() -> str:
    return uuid.uuid4().hex[:16]


@dataclass
class Turns:
    """What came of timing in turns.

    Attributes:
        samples: seconds a step of each contender that ran to the end; sample i is from round i. One that was
            through earlier has fewer: what pairs are the rounds that two have in common.
        failures: what the others raised; each left the turns when it did.
        token: different for every call of `time_in_turns`, for records to say which of them pair.
    """

    samples: dict[str, list[float]]
    failures: dict[str, Exception]
    token: str = field(default_factory=_token)


def time_in_turns(
    steps: Mapping[str, Step], device: torch.device, effort: Effort, clock: Clock | None = None
) -> Turns:
    """Time each contender in turns (A B C A B C ...), so that drift falls on all alike.

    Each step has been warmed up by the caller; one more untimed round is run here, so that the first sample
    does not follow something else. A contender leaves when the effort is spent on it, so that a slow one does
    not set the clock for all, or when it raises; the others go on.

    Args:
        clock: seconds that one call of a step takes; the device's own if None.
    """
    clock = clock or (_cuda_seconds if device.type == "cuda" else cpu_seconds)
    turns = Turns({name: [] for name in steps}, {})
    _round(steps, steps, turns, lambda step: step())
    while waiting := [name for name, times in turns.samples.items() if not _enough(times, effort)]:
        for name, seconds in _round(waiting, steps, turns, clock).items():
            turns.samples[name].append(seconds)
    return turns


def _round(
    names: Iterable[str], steps: Mapping[str, Step], turns: Turns, run: Callable[[Step], Any]
) -> dict[str, Any]:
    """One turn of each of some contenders; what each returned."""
    returned = {}
    for name in names:
        try:
            returned[name] = run(steps[name])
        except Exception as error:  # its record says so; the next contender must have its turn
            turns.failures[name] = error.with_traceback(None)  # whose frames hold tensors
            del turns.samples[name]
    return returned


def _enough(times: list[float], effort: Effort) -> bool:
    return len(times) >= effort.rounds or (len(times) >= effort.least and sum(times) >= effort.seconds)


def cpu_seconds(step: Step) -> float:
    """Seconds by the host's clock that one step takes."""
    start = time.perf_counter()
    step()
    return elapsed(start, time.perf_counter())


def elapsed(start: float, end: float) -> float:
    """Seconds between two readings of a clock.

    Raises:
        ClockError: if it did not go forward.
    """
    seconds = end - start
    if not 0 < seconds < float("inf"):
        raise ClockError(f"the clock went from {start} to {end} s over one step")
    return seconds


def _cuda_seconds(step: Step) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    step()
    end.record()
    end.synchronize()
    return elapsed(0, start.elapsed_time(end) / 1000)


def host_seconds(step: Step, device: torch.device, repeats: int = 5) -> float | None:
    """Time the host needs to issue one step, the device's work aside; None where the host does the work.

    The fastest of a few repeats that each start with an idle device; a step that waits for the device shows
    as its whole time.
    """
    if device.type != "cuda":
        return None
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        times.append(cpu_seconds(step))
    torch.cuda.synchronize()
    return min(times)
