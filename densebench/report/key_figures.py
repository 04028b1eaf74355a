"""The few numbers beneath the answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from densebench.report.answer import SPEED_WORDS, ratio_words
from densebench.report.fits import Fit
from densebench.report.selection import Comparison, Row
from densebench.report.units import Unit, duration, memory, number, times
from densebench.statistics import ratio_of

CARD_GIB = 24


@dataclass(frozen=True)
class KeyFigure:
    """One number to remember: what it is, its value, and the value in proportion."""

    term: str
    value: str
    note: str


def key_figures(comparison: Comparison, winner: Row, fitting: Sequence[Fit] = ()) -> tuple[KeyFigure, ...]:
    """The answer's memory and time, the fastest strategy's, what fits, and what is known from elsewhere.

    Args:
        comparison: that of the answer.
        winner: its strategy.
        fitting: the batches that fit, of the same network and setting.
    """
    return tuple(_figures(comparison, winner, fitting))


def _figures(comparison: Comparison, winner: Row, fitting: Sequence[Fit]) -> Iterator[KeyFigure]:
    bytes = memory(winner.record.peak_delta_bytes or 0, comparison.unit)
    yield KeyFigure(f"activation memory, {winner.name}", bytes, _memory_note(comparison, winner))
    if winner.record.time_s is not None:
        time = duration(winner.record.time_s.median)
        yield KeyFigure(f"time of a step, {winner.name}", time, _time_note(comparison, winner))
    fastest = _fastest(comparison.strategies)
    if fastest is not None and fastest.record.time_s is not None and fastest is not winner:
        time, note = duration(fastest.record.time_s.median), _time_note(comparison, fastest)
        share = "" if fastest.memory_ratio is None else f", at {times(fastest.memory_ratio)} its memory"
        yield KeyFigure(f"time of a step, {fastest.name}", time, note + share)
    yield from _largest_batch(winner, fitting)
    peer = _fastest([row for row in comparison.measured if row.family == "peer" and row.usable])
    ratio = None if peer is None else ratio_of(winner.record, peer.record)
    if peer is not None and peer.record.time_s is not None and ratio is not None:
        note = f"the fastest other way to run this network; {winner.name}: {ratio_words(ratio)} of it"
        yield KeyFigure(f"time of a step, {peer.name}", duration(peer.record.time_s.median), note)
    beside = next((row for row in comparison.measured if row.family == "yardstick" and row.usable), None)
    if beside is not None:
        yield _beside(beside, winner, comparison.unit)


def _largest_batch(winner: Row, fitting: Sequence[Fit]) -> Iterator[KeyFigure]:
    """On a card of 24 GiB, which many have; no estimates."""
    known = {fit.name: fit for fit in fitting if CARD_GIB in fit.tried}
    own = known.pop(winner.name, None)
    naive = known.pop("naive", None)
    if own is None or naive is None:
        return
    others = [f"{name} {fit.tried[CARD_GIB][0]:,}" for name, fit in known.items()]
    note = f"instead of {naive.tried[CARD_GIB][0]:,} of naive" + (f"; {', '.join(others)}" if others else "")
    how = ", predicted" if own.traced else ""
    yield KeyFigure(f"largest batch in {CARD_GIB} GiB{how}, {own.name}", f"{own.tried[CARD_GIB][0]:,}", note)


def _fastest(rows: Sequence[Row]) -> Row | None:
    return min((row for row in rows if row.milliseconds), key=lambda row: row.milliseconds or 0, default=None)


def _memory_note(comparison: Comparison, winner: Row) -> str:
    if winner.memory_ratio is None or comparison.naive is None:
        return "naive has no figure to compare with"
    arrow = "↓ less" if winner.memory_ratio < 1 else "↑ more"
    whole = memory(comparison.naive.record.peak_delta_bytes or 0, comparison.unit)
    return f"{arrow}: {times(winner.memory_ratio)} the {whole} of naive"


def _time_note(comparison: Comparison, winner: Row) -> str:
    naive, ratio = comparison.naive, winner.time_ratio
    if naive is None or naive.record.time_s is None or ratio is None:
        return "naive has no time to compare with"
    return (
        f"{SPEED_WORDS[ratio.verdict]}: {ratio_words(ratio)} the {duration(naive.record.time_s.median)} of naive"
    )


def _beside(beside: Row, winner: Row, unit: Unit) -> KeyFigure:
    speed = beside.record.throughput_img_s
    value = memory(beside.record.peak_delta_bytes or 0, unit)
    note = "for scale: another network on the same images"
    if speed is not None and winner.record.throughput_img_s is not None:
        quicker = winner.record.throughput_img_s / speed
        less = (winner.record.peak_delta_bytes or 0) / (beside.record.peak_delta_bytes or 1)
        note = f"at {number(speed)} img/s; {winner.name}: {times(less)} its memory, {times(quicker)} its speed"
    return KeyFigure(f"activation memory, {beside.name}", value, note)
