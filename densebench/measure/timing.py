"""Time of a step by the device's own clock, several contenders in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Step = Callable[[], object]


@dataclass(frozen=True)
class Effort:
    """How long to go on: until every contender has `rounds` samples, or the time is up.

    Attributes:
        rounds: samples wanted of each contender.
        seconds: stop earlier once each contender has been timed for this long and has `least` samples.
        least: never fewer samples than this.
    """

    rounds: int = 20
    seconds: float = 2.0
    least: int = 5


def time_in_turns(steps: Mapping[str, Step], device: torch.device, effort: Effort) -> dict[str, list[float]]:
    """Seconds a step of each contender, timed in turns (A B C A B C ...), so that drift falls on all alike.

    Each step has been warmed up by the caller; one more untimed round is run here, so that the first sample
    does not follow something else. Sample i of every contender comes from round i.
    """
    clock = _cuda_seconds if device.type == "cuda" else _cpu_seconds
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    while not _enough(samples, effort):
        for name, step in steps.items():
            samples[name].append(clock(step))
    return samples


def _enough(samples: Mapping[str, list[float]], effort: Effort) -> bool:
    shortest = min((sum(times) for times in samples.values()), default=effort.seconds)
    rounds = min((len(times) for times in samples.values()), default=effort.rounds)
    return rounds >= effort.rounds or (rounds >= effort.least and shortest >= effort.seconds)


def _cpu_seconds(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _cuda_seconds(step: Step) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


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
        times.append(_cpu_seconds(step))
    torch.cuda.synchronize()
    return min(times)
