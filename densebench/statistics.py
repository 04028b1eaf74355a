"""Summaries of samples: quartiles, and the ratio of two contenders that were timed in turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from densebench.results import Timing

Verdict = Literal["FAST", "SLOW", "SAME", "AMBIGUOUS"]

SAME_WITHIN = 0.03  # two identical models differ by less than this in an interleaved run on a quiet machine
RESAMPLES = 2000


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
    SLOW: the whole interval lies beyond 3 % of equal; SAME: within; AMBIGUOUS: it crosses that line.

    Raises:
        ValueError: if the two have no rounds in common.
    """
    rounds = min(len(samples), len(baseline))
    if rounds == 0:
        raise ValueError("no rounds to pair: time both contenders in the same interleaved run")
    ratios = np.asarray(samples[:rounds]) / np.asarray(baseline[:rounds])
    draws = np.random.default_rng(seed).integers(0, rounds, size=(RESAMPLES, rounds))
    low, high = np.quantile(np.median(ratios[draws], axis=1), [0.025, 0.975]).tolist()
    return Ratio(float(np.median(ratios)), low, high, _verdict(low, high))


def _verdict(low: float, high: float) -> Verdict:
    if high < 1 - SAME_WITHIN:
        return "FAST"
    if low > 1 + SAME_WITHIN:
        return "SLOW"
    if low >= 1 - SAME_WITHIN and high <= 1 + SAME_WITHIN:
        return "SAME"
    return "AMBIGUOUS"
