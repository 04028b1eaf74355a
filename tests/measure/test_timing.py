"""Contenders are timed in turns, all samples are kept, and a broken clock or contender is told, not averaged."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from densebench.measure import timing
from densebench.measure.timing import ClockError, Effort, Step, elapsed, host_seconds, time_in_turns
from densebench.statistics import summarize, time_ratio, unsteady

CPU = torch.device("cpu")


def noting(name: str, notes: list[str]) -> Step:
    return lambda: notes.append(name)


def returning(seconds: float) -> Callable[[Step], float]:
    def clock(step: Step) -> float:
        step()
        return seconds

    return clock


def test_contenders_take_turns() -> None:
    notes: list[str] = []
    steps = {name: noting(name, notes) for name in "abc"}
    turns = time_in_turns(steps, CPU, Effort(rounds=3, seconds=9, least=3))
    assert "".join(notes) == "abc" * 4  # one round more, which is not timed
    assert {name: len(samples) for name, samples in turns.samples.items()} == dict.fromkeys("abc", 3)


@pytest.mark.parametrize(
    ("effort", "seconds", "samples"),
    [
        (Effort(rounds=20, seconds=2.0, least=5), 0.01, 20),  # quick: all rounds
        (Effort(rounds=20, seconds=2.0, least=5), 0.25, 8),  # slow: until the time is up
        (Effort(rounds=20, seconds=2.0, least=5), 60.0, 5),  # very slow: the least
    ],
)
def test_how_many_samples(effort: Effort, seconds: float, samples: int) -> None:
    turns = time_in_turns({"a": lambda: None}, CPU, effort, returning(seconds))
    assert turns.samples == {"a": [seconds] * samples}


def test_a_slow_contender_does_not_set_the_clock_for_all() -> None:
    """Each leaves when it has been timed for long enough; the slow one goes on alone to its least."""
    seconds, notes = {"slow": 1.0, "quick": 0.25}, []

    def clock(step: Step) -> float:
        step()
        return seconds[notes[-1]]

    steps = {name: noting(name, notes) for name in seconds}
    turns = time_in_turns(steps, CPU, Effort(rounds=20, seconds=2.0, least=5), clock)
    assert {name: len(times) for name, times in turns.samples.items()} == {"slow": 5, "quick": 8}
    assert notes == ["slow", "quick"] * 6 + ["quick"] * 3  # in turns for as long as both are in


def test_every_call_has_a_token_of_its_own() -> None:
    tokens = {time_in_turns({"a": lambda: None}, CPU, Effort(1, 1, 1)).token for _ in range(3)}
    assert len(tokens) == 3


def test_every_sample_is_kept_in_the_order_taken() -> None:
    readings: Iterator[float] = iter([0.5, 0.1, 0.9])
    turns = time_in_turns({"a": lambda: None}, CPU, Effort(3, 9, 3), lambda step: next(readings))
    found = summarize(turns.samples["a"])
    assert found.samples == (0.5, 0.1, 0.9)
    assert (found.median, found.min, found.n) == (0.5, 0.1, 3)


@pytest.mark.parametrize(("start", "end"), [(5.0, 4.0), (5.0, 5.0), (0.0, math.inf), (0.0, math.nan)])
def test_a_clock_that_does_not_go_forward_is_told(start: float, end: float) -> None:
    with pytest.raises(ClockError, match="clock went from"):
        elapsed(start, end)


def test_a_clock_that_goes_backwards_ends_the_contender(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter(range(1000, 0, -1))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(readings))
    turns = time_in_turns({"a": lambda: None}, CPU, Effort(3, 9, 3))
    assert turns.samples == {}
    assert isinstance(turns.failures["a"], ClockError)


def test_one_that_fails_leaves_and_the_others_go_on() -> None:
    calls = 0

    def fails_late() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise torch.OutOfMemoryError("no more")

    turns = time_in_turns({"a": fails_late, "b": lambda: None}, CPU, Effort(6, 9, 6))
    assert calls == 3
    assert list(turns.samples) == ["b"]
    assert len(turns.samples["b"]) == 6
    assert isinstance(turns.failures["a"], torch.OutOfMemoryError)
    assert turns.failures["a"].__traceback__ is None  # its frames would hold the tensors


def test_when_all_fail_it_ends() -> None:
    def fails() -> None:
        raise ValueError("never works")

    turns = time_in_turns({"a": fails, "b": fails}, CPU, Effort())
    assert turns.samples == {}
    assert set(turns.failures) == {"a", "b"}


def test_spread_is_noise() -> None:
    assert unsteady(summarize([1.0, 1.01, 1.02, 1.03])) is None
    assert unsteady(summarize([1.0, 1.2, 1.4, 1.6])) == "quartiles of the time lie 23% apart"


def test_the_host_does_the_work_on_a_cpu() -> None:
    assert host_seconds(lambda: None, CPU) is None


def test_drift_falls_on_all_alike() -> None:
    """Three identical contenders on a machine that slows down by half: in turns they come out the same."""
    random, now = np.random.default_rng(0), 0

    def clock(step: Step) -> float:
        nonlocal now
        now += 1
        return (1 + now / 240) * (1 + 0.01 * random.standard_normal())

    turns = time_in_turns(dict.fromkeys("abc", lambda: None), CPU, Effort(40, 1e9, 40), clock)
    verdicts = {time_ratio(turns.samples[name], turns.samples["a"]).verdict for name in "bc"}
    one_after_the_other = [*turns.samples["a"], *turns.samples["b"], *turns.samples["c"]]
    assert verdicts == {"SAME"}
    assert time_ratio(sorted(one_after_the_other)[-40:], turns.samples["a"]).verdict == "SLOW"


@pytest.mark.gpu
def test_device_time_is_positive_on_a_gpu() -> None:
    a = torch.randn(256, 256, device="cuda")
    turns = time_in_turns({"mm": lambda: a @ a}, torch.device("cuda"), Effort(5, 9, 5))
    assert all(0 < seconds < 1 for seconds in turns.samples["mm"])
