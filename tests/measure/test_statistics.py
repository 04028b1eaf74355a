"""What a ratio of times may claim."""

from __future__ import annotations

import numpy as np
import pytest

from densebench.statistics import SAME_WITHIN, summarize, time_ratio


def samples(median: float, spread: float, count: int = 40, seed: int = 0) -> list[float]:
    return [float(t) for t in median * (1 + spread * np.random.default_rng(seed).standard_normal(count))]


@pytest.mark.parametrize(
    ("median", "spread", "verdict"),
    [
        (0.80, 0.01, "FAST"),
        (1.25, 0.01, "SLOW"),
        (1.00, 0.01, "SAME"),
        (1.01, 0.01, "SAME"),
        (1.03, 0.02, "AMBIGUOUS"),
        (1.00, 0.30, "AMBIGUOUS"),
    ],
)
def test_verdicts(median: float, spread: float, verdict: str) -> None:
    ratio = time_ratio(samples(median, spread, seed=1), samples(1.0, 0.01, seed=2))
    assert ratio.verdict == verdict, ratio
    assert ratio.low <= ratio.median <= ratio.high


def test_identical_contenders_are_never_called_different() -> None:
    """200 pairs of the same distribution, with the noise of a quiet machine."""
    verdicts = [
        time_ratio(samples(1, 0.02, seed=2 * i), samples(1, 0.02, seed=2 * i + 1)).verdict for i in range(200)
    ]
    assert {"FAST", "SLOW"}.isdisjoint(verdicts)
    assert verdicts.count("SAME") >= 190


def test_three_rounds_decide_nothing_that_is_close() -> None:
    ratio = time_ratio([82e-6, 156e-6, 207e-6], [156e-6, 82e-6, 150e-6])
    assert ratio.verdict == "AMBIGUOUS"


def test_pairs_come_from_the_same_round() -> None:
    """A machine that doubles its time halfway does so for both, and the ratio stays."""
    baseline = [1.0] * 10 + [2.0] * 10
    ratio = time_ratio([1.5 * t for t in baseline], baseline)
    assert (ratio.low, ratio.median, ratio.high) == pytest.approx((1.5, 1.5, 1.5))


def test_it_is_the_same_every_time() -> None:
    pair = samples(1.1, 0.1, seed=3), samples(1.0, 0.1, seed=4)
    assert time_ratio(*pair) == time_ratio(*pair)


def test_nothing_in_common_is_refused() -> None:
    with pytest.raises(ValueError, match="same interleaved run"):
        time_ratio([], [1.0])
    with pytest.raises(ValueError, match="no samples"):
        summarize([])


def test_the_edge_of_same() -> None:
    assert time_ratio([1 + SAME_WITHIN / 2] * 5, [1.0] * 5).verdict == "SAME"
    assert time_ratio([1 + SAME_WITHIN * 2] * 5, [1.0] * 5).verdict == "SLOW"


def test_quartiles() -> None:
    found = summarize([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (found.min, found.q1, found.median, found.q3, found.n) == (1.0, 2.0, 3.0, 4.0, 5)
