"""What a ratio of times may claim."""

from __future__ import annotations

import numpy as np
import pytest

from densebench.statistics import SAME_WITHIN, Ratio, ratio_of, summarize, time_ratio, unpaired_ratio
from tests.measure.cases import small_record


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


@pytest.mark.parametrize(("rounds", "verdict"), [(2, "AMBIGUOUS"), (5, "AMBIGUOUS"), (6, "FAST")])
def test_a_few_rounds_claim_nothing(rounds: int, verdict: str) -> None:
    """However well they agree."""
    assert time_ratio([0.5] * rounds, [1.0] * rounds).verdict == verdict
    assert unpaired_ratio([0.5] * rounds, [1.0] * 40).verdict == verdict


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


def test_without_rounds_in_common_drift_is_doubt() -> None:
    """The machine that doubles its time halfway: paired it does not matter, unpaired it widens the interval."""
    baseline = [1.0] * 10 + [2.0] * 10
    paired, unpaired = (f([1.5 * t for t in baseline], baseline) for f in (time_ratio, unpaired_ratio))
    assert unpaired.median == pytest.approx(paired.median)
    assert unpaired.low < paired.low
    assert unpaired.high > paired.high
    assert unpaired_ratio([2.0] * 6, [1.0] * 7).verdict == "SLOW"
    with pytest.raises(ValueError, match="no samples"):
        unpaired_ratio([], [1.0])


def test_only_what_was_timed_in_the_same_turns_pairs() -> None:
    baseline, times = [1.0] * 10 + [2.0] * 10, [2.0] * 10 + [4.0] * 10

    def ratio(turns: str | None, others: str | None = "one", group: str | None = "g") -> Ratio | None:
        record = small_record(time_s=summarize(times), group=group, turns=turns)
        return ratio_of(record, small_record(time_s=summarize(baseline), group="g", turns=others))

    assert ratio("one") == time_ratio(times, baseline)
    assert ratio("two") is None
    assert ratio(None) == ratio("one", None) == unpaired_ratio(times, baseline)  # older records
    assert ratio("one", group="other") is ratio("one", group=None) is None
    assert ratio_of(small_record(group="g"), small_record(time_s=summarize(baseline), group="g")) is None


def test_nothing_in_common_is_refused() -> None:
    with pytest.raises(ValueError, match="same interleaved run"):
        time_ratio([], [1.0])
    with pytest.raises(ValueError, match="no samples"):
        summarize([])


def test_the_edge_of_same() -> None:
    assert time_ratio([1 + SAME_WITHIN / 2] * 6, [1.0] * 6).verdict == "SAME"
    assert time_ratio([1 + SAME_WITHIN * 2] * 6, [1.0] * 6).verdict == "SLOW"


def test_quartiles() -> None:
    found = summarize([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (found.min, found.q1, found.median, found.q3, found.n) == (1.0, 2.0, 3.0, 4.0, 5)
