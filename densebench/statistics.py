"""Summaries of samples: quartiles, and the ratio of two contenders that were timed in turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from densebench.records import Record, Timing

Verdict = Literal["FAST", "SLOW", "SAME", "AMBIGUOUS"]

SAME_WITHIN = 0.03  # two identical models differ by less than this in an interleaved run on a quiet machine
RESAMPLES = 2000
# With fewer, no interval between two of them holds the median with 95 %: (1 - 2 / 2^5) < 0.95 < (1 - 2 / 2^6).
LEAST_ROUNDS = 6
UNSTEADY = 0.10  # torch.utils.benchmark warns from here on


def unsteady(timing: Timing) -> str | None:
    """Why a timing is noisy: its quartiles lie more than 10 % of the median apart; None if they do not."""
    spread = (timing.q3 - timing.q1) / timing.median
    return f"quartiles of the time lie {spread:.0%} apart" if spread > UNSTEADY else None


def summarize(samples: Sequence[float]) -> Timing:
    """Median and quartiles of samples in seconds.

    Raises:
        ValueError: if there are none.
    """
    if not samples:
        raise ValueError("no samples to summarize")
    q1, median, q3 = np.quantile(samples, [0.25, 0.5, 0.75]).tolist()
    return Timing(median, q1, q3, min(samples), len(samples), tuple(samples))


@dataclass(frozen=True)
class Ratio:
    """Time of one contender over another's, pair by pair: the median, its 95 % interval and what it says."""

    median: float
    low: float
    high: float
    verdict: Verdict


def time_ratio(samples: Sequence[float], baseline: Sequence[float], seed: int = 0) -> Ratio:
    """How many times the baseline's time a contender takes; sample i of both comes from the same round.

    The interval is a bootstrap over rounds (2,000 resamples of the median of the pairwise ratios). FAST or
    SLOW: the whole interval lies beyond 3 % of equal; SAME: within; AMBIGUOUS: it crosses that line, or there are
    fewer than six rounds.

    Raises:
        ValueError: if the two have no rounds in common.
    """
    rounds = min(len(samples), len(baseline))
    if rounds == 0:
        raise ValueError("no rounds to pair: time both contenders in the same interleaved run")
    ratios = np.asarray(samples[:rounds]) / np.asarray(baseline[:rounds])
    draws = np.random.default_rng(seed).integers(0, rounds, size=(RESAMPLES, rounds))
    low, high = np.quantile(np.median(ratios[draws], axis=1), [0.025, 0.975]).tolist()
    return Ratio(float(np.median(ratios)), low, high, _verdict(low, high, rounds))


def unpaired_ratio(samples: Sequence[float], baseline: Sequence[float], seed: int = 0) -> Ratio:
    """As `time_ratio`, for samples of which nobody knows that they come from the same rounds.

    The ratio of the medians; for its interval each side is resampled by itself, so drift widens it.

    Raises:
        ValueError: if either has none.
    """
    if not samples or not baseline:
        raise ValueError("no samples to compare")
    generator, sides = np.random.default_rng(seed), []
    for times in (np.asarray(samples), np.asarray(baseline)):
        draws = generator.integers(0, len(times), size=(RESAMPLES, len(times)))
        sides.append(np.median(times[draws], axis=1))
    low, high = np.quantile(sides[0] / sides[1], [0.025, 0.975]).tolist()
    rounds = min(len(samples), len(baseline))
    return Ratio(float(np.median(samples) / np.median(baseline)), low, high, _verdict(low, high, rounds))


def ratio_of(record: Record, baseline: Record) -> Ratio | None:
    """Time of a record over that of another in its group; None if they were not timed together.

    Pair by pair where both come from the same turns; unpaired where older records do not say.
    """
    if record.time_s is None or baseline.time_s is None or record.group is None or record.group != baseline.group:
        return None
    if record.turns is None or baseline.turns is None:
        return unpaired_ratio(record.time_s.samples, baseline.time_s.samples)
    if record.turns != baseline.turns:
        return None
    return time_ratio(record.time_s.samples, baseline.time_s.samples)


def _verdict(low: float, high: float, rounds: int) -> Verdict:
    if rounds < LEAST_ROUNDS:
        return "AMBIGUOUS"
    if high < 1 - SAME_WITHIN:
        return "FAST"
    if low > 1 + SAME_WITHIN:
        return "SLOW"
    if low >= 1 - SAME_WITHIN and high <= 1 + SAME_WITHIN:
        return "SAME"
    return "AMBIGUOUS"
