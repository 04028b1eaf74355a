"""The report's answer in one sentence, and the few numbers beneath it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from densebench.report.selection import Comparison, Row
from densebench.report.units import Unit, memory, number, times
from densebench.statistics import Ratio, Verdict

FAST_ENOUGH = 0.8  # of naive's speed: what one would give up for memory without thinking twice

SPEED_WORDS: dict[Verdict, str] = {
    "FAST": "↑ faster",
    "SLOW": "↓ slower",
    "SAME": "= same speed",
    "AMBIGUOUS": "? undecided",
}
_OPENINGS = {"train": "Training", "forward": "A forward pass of", "infer": "Inference with"}


@dataclass(frozen=True)
class KeyFigure:
    """One number to remember: what it is, its value, and the value in proportion."""

    term: str
    value: str
    note: str


@dataclass(frozen=True)
class Answer:
    """What the report says first.

    Attributes:
        sentence: the answer.
        figures: the numbers beneath it.
        comparison: the comparison it was read from, None if there is none.
        winner: its strategy, None if no strategy has results.
    """

    sentence: str
    figures: tuple[KeyFigure, ...] = ()
    comparison: Comparison | None = None
    winner: Row | None = None


def answer(measured: Sequence[Comparison], predicted: Sequence[Comparison]) -> Answer:
    """Read the answer from the first comparison that has one; predictions count only where nothing was run."""
    for comparison in [*measured, *predicted]:
        winner = best(comparison)
        if winner is not None:
            sentence = f"{_opening(comparison)}: {_verdict(comparison, winner)}."
            return Answer(sentence, tuple(_figures(comparison, winner)), comparison, winner)
    for comparison in [*measured, *predicted]:
        if comparison.measured:
            return Answer("Only contenders without a strategy to compare were measured.", (), comparison)
    return Answer("No whole network was measured, so there is no comparison to sum up.")


def best(comparison: Comparison) -> Row | None:
    """The strategy with the least memory at 0.8 of naive's speed or more; failing that, with the least at all."""
    candidates = [row for row in comparison.strategies if row.record.peak_delta_bytes is not None]
    quick = [row for row in candidates if (speed := speed_ratio(row)) and speed.median >= FAST_ENOUGH]
    return min(quick or candidates, key=lambda row: row.record.peak_delta_bytes or 0, default=None)


def speed_ratio(row: Row) -> Ratio | None:
    """Speed over naive's, the inverse of the time ratio; None where they were not timed in turns."""
    ratio = row.time_ratio
    return None if ratio is None else Ratio(1 / ratio.median, 1 / ratio.high, 1 / ratio.low, ratio.verdict)


def ratio_words(ratio: Ratio) -> str:
    """A ratio with its interval: 0.91× (0.86 to 0.95)."""
    return f"{times(ratio.median)} ({ratio.low:.2f} to {ratio.high:.2f})"


def _opening(comparison: Comparison) -> str:
    opening = _OPENINGS.get(comparison.case.mode, comparison.case.mode)
    if comparison.case.source == "predicted":
        return f"Predicted, not run: {opening.lower()} " + comparison.setting.removesuffix(", predicted, not run")
    where, _, device = comparison.setting.partition(f", {comparison.device}")
    return f"{opening} {where} on {comparison.device}{device}"


def _verdict(comparison: Comparison, winner: Row) -> str:
    bytes = winner.record.peak_delta_bytes or 0
    naive = comparison.naive
    if naive is None or not naive.record.peak_delta_bytes:
        without = "naive was not measured" if naive is None else _failure(naive)
        amount = memory(bytes, comparison.unit)
        return f"{without}; {winner.name} needs {amount} of activation memory{_at_speed(winner)}"
    share = f"{times(winner.memory_ratio or 0)} naive's activation memory"
    amounts = (
        f"({memory(bytes, comparison.unit)} instead of {memory(naive.record.peak_delta_bytes, comparison.unit)})"
    )
    speed = speed_ratio(winner)
    if speed is None:
        return f"{winner.name} needs {share} {amounts}"
    at_speed = f"at {times(speed.median)} its speed"
    if speed.median < FAST_ENOUGH:
        at_speed += f"; no strategy reaches {times(FAST_ENOUGH)}"
    if (winner.memory_ratio or 0) >= 1:
        return f"no strategy saves memory; {winner.name}, the smallest, needs {share} {amounts} {at_speed}"
    return f"{winner.name} needs {share} {amounts} {at_speed}"


def _failure(naive: Row) -> str:
    return {"oom": "naive does not fit"}.get(naive.record.status, "naive has no result")


def _at_speed(row: Row) -> str:
    speed = row.record.throughput_img_s
    return "" if speed is None else f" at {number(speed)} images a second"


def _figures(comparison: Comparison, winner: Row) -> list[KeyFigure]:
    record = winner.record
    figures = [
        KeyFigure(
            f"activation memory, {winner.name}",
            memory(record.peak_delta_bytes or 0, comparison.unit),
            _memory_note(comparison, winner),
        )
    ]
    if record.throughput_img_s is not None:
        speed = speed_ratio(winner)
        note = "" if speed is None else f"{SPEED_WORDS[speed.verdict]}: {ratio_words(speed)} naive's"
        figures.append(KeyFigure(f"throughput, {winner.name}", f"{number(record.throughput_img_s)} img/s", note))
    beside = next((row for row in comparison.measured if row.family == "yardstick" and row.usable), None)
    if beside is not None:
        figures.append(_beside(beside, winner, comparison.unit))
    return figures


def _memory_note(comparison: Comparison, winner: Row) -> str:
    if winner.memory_ratio is None or comparison.naive is None:
        return "naive has no figure to compare with"
    arrow = "↓ less" if winner.memory_ratio < 1 else "↑ more"
    whole = memory(comparison.naive.record.peak_delta_bytes or 0, comparison.unit)
    return f"{arrow}: {times(winner.memory_ratio)} naive's {whole}"


def _beside(beside: Row, winner: Row, unit: Unit) -> KeyFigure:
    speed = beside.record.throughput_img_s
    value = memory(beside.record.peak_delta_bytes or 0, unit)
    note = "for scale: another network on the same images"
    if speed is not None and winner.record.throughput_img_s is not None:
        quicker = winner.record.throughput_img_s / speed
        less = (winner.record.peak_delta_bytes or 0) / (beside.record.peak_delta_bytes or 1)
        note = f"at {number(speed)} img/s; {winner.name}: {times(less)} its memory, {times(quicker)} its speed"
    return KeyFigure(f"activation memory, {beside.name}", value, note)
