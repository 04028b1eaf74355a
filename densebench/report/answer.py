"""The report's answer in one sentence, and what else was won, in other settings and on other machines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from densebench.report.selection import Comparison, Row
from densebench.report.units import memory, number, times
from densebench.statistics import Ratio, Verdict

SLOW_ENOUGH = 1.25  # times naive's time: what one would give up for memory without thinking twice
_FREE: tuple[Verdict, ...] = ("FAST", "SAME")

SPEED_WORDS: dict[Verdict, str] = {
    "FAST": "↑ faster",
    "SLOW": "↓ slower",
    "SAME": "= same speed",
    "AMBIGUOUS": "? undecided",
}
_IN_A_SENTENCE: dict[Verdict, str] = {
    "FAST": "faster",
    "SLOW": "slower",
    "SAME": "the same within 3 %",
    "AMBIGUOUS": "undecided: the interval crosses 3 %",
}
_OPENINGS = {"train": "Training", "forward": "A forward pass of", "infer": "Inference with"}


@dataclass(frozen=True)
class Answer:
    """What the report says first.

    Attributes:
        sentence: the answer.
        scope: what it was not measured on; None where that is nothing.
        comparison: the comparison it was read from, None if there is none.
        winner: its strategy, None if no strategy has results.
        elsewhere: the same in other modes and precisions, of volumes, and on every other device in the records.
    """

    sentence: str
    scope: str | None = None
    comparison: Comparison | None = None
    winner: Row | None = None
    elsewhere: tuple[tuple[Comparison, Row], ...] = ()


def answer(measured: Sequence[Comparison], predicted: Sequence[Comparison]) -> Answer:
    """Read the answer from the first comparison that has one; predictions count only where nothing was run."""
    told = _won(measured or predicted)
    if told:
        (comparison, winner), *others = told
        sentence = f"{_opening(comparison)}: {_verdict(comparison, winner)}."
        return Answer(sentence, _scope(measured), comparison, winner, tuple(others))
    for comparison in [*measured, *predicted]:
        if comparison.measured:
            return Answer("Only contenders without a strategy to compare were measured.", None, comparison)
    return Answer("No whole network was measured, so there is no comparison to sum up.")


def _won(comparisons: Sequence[Comparison]) -> list[tuple[Comparison, Row]]:
    """Every setting of the first device, then what is new on others: a line for each, and settings not yet told.

    A setting is mode, images or volumes, and precision.
    """
    found = [(comparison, winner) for comparison in comparisons if (winner := best(comparison)) is not None]
    first = found[0][0].device if found else None
    found.sort(key=lambda pair: pair[0].device != first)
    told, seen = [], set[object]()
    for comparison, winner in found:
        case = comparison.case
        setting = (case.mode, len(case.input_shape), case.autocast or case.dtype)
        if not {comparison.device, setting} <= seen:
            told.append((comparison, winner))
        seen |= {comparison.device, setting}
    return told


def best(comparison: Comparison) -> Row | None:
    """The strategy with the least memory of those that give up nothing: less of it than naive, and no slower.

    Failing that, of those within 1.25 times naive's time; failing that, of all.
    """
    candidates = [row for row in comparison.strategies if row.record.peak_delta_bytes is not None]
    quick = [row for row in candidates if row.time_ratio and row.time_ratio.median <= SLOW_ENOUGH]
    free = [
        row for row in quick if (row.memory_ratio or 1) < 1 and row.time_ratio and row.time_ratio.verdict in _FREE
    ]
    return min(free or quick or candidates, key=lambda row: row.record.peak_delta_bytes or 0, default=None)


def ratio_words(ratio: Ratio) -> str:
    """A ratio with its interval: 0.91× (0.86 to 0.95)."""
    return f"{times(ratio.median)} ({ratio.low:.2f} to {ratio.high:.2f})"


def _scope(measured: Sequence[Comparison]) -> str | None:
    """Readers of memory and speed think of GPUs: where none was measured, that is said first."""
    if not measured or any(comparison.case.device == "cuda" for comparison in measured):
        return None
    return "Measured on CPUs. No GPU is in these records: what is said of GPUs' memory is predicted."


def _opening(comparison: Comparison) -> str:
    opening = _OPENINGS.get(comparison.case.mode, comparison.case.mode)
    if comparison.case.source == "predicted":
        where = comparison.setting.replace(", predicted, not run", "")
        return f"Predicted, not run: {opening[0].lower()}{opening[1:]} {where}"
    where, _, rest = comparison.setting.partition(f", {comparison.device}")
    return f"{opening} {where} on {comparison.device}{rest}"


def _verdict(comparison: Comparison, winner: Row) -> str:
    bytes = winner.record.peak_delta_bytes or 0
    naive = comparison.naive
    if naive is None or not naive.record.peak_delta_bytes:
        without = "naive was not measured" if naive is None else _failure(naive)
        amount = memory(bytes, comparison.unit)
        return f"{without}; {winner.name} needs {amount} of activation memory{_at_speed(winner)}"
    least = memory(bytes, comparison.unit)
    most = memory(naive.record.peak_delta_bytes, comparison.unit)
    share = f"{times(winner.memory_ratio or 0)} the activation memory of naive ({least} instead of {most})"
    gain = f"{winner.name} needs {share}"
    if (winner.memory_ratio or 0) >= 1:
        gain = f"no strategy saves memory; {winner.name}, the smallest, needs {share}"
    return gain + _in_time(winner) + _doubts(winner, naive)


def _in_time(winner: Row) -> str:
    ratio = winner.time_ratio
    if ratio is None:
        return "" if winner.record.case.source == "predicted" else "; the two were not timed in turns"
    words = f" in {times(ratio.median)} its time ({_IN_A_SENTENCE[ratio.verdict]})"
    if ratio.median > SLOW_ENOUGH:
        words += f"; no strategy stays within {times(SLOW_ENOUGH)}"
    return words


def _doubts(*rows: Row) -> str:
    """What was wrong with the measurements, as far as the records know."""
    doubts = [f"{row.name} is noisy" for row in rows if row.record.status == "noisy"]
    doubts += [f"{row.name} was throttled" for row in rows if row.record.throttled]
    doubts += ["the GPU was shared"] if any(row.record.shared_gpu for row in rows) else []
    return f"; take with care: {', '.join(doubts)}" if doubts else ""


def _failure(naive: Row) -> str:
    return {"oom": "naive does not fit"}.get(naive.record.status, "naive has no result")


def _at_speed(row: Row) -> str:
    speed = row.record.throughput_img_s
    return "" if speed is None else f" at {number(speed)} images a second"
