"""Which runs say the same of one network and setting: one of them is shown, of the others a sentence tells.

Byte for byte they do not agree even where nothing was run: scratch of the fused strategies depends on the caches
of the processor that a step was traced on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from densebench.counting import counted
from densebench.records import Record
from densebench.report.selection import device_of, setting_of

ALIKE = 0.02  # a run whose figures are further off is shown by itself

Value = Callable[[Record], float]
Point = Callable[[Record], Hashable]


@dataclass(frozen=True)
class Same:
    """A run that is not shown, and how far its figures are at most from those that are, as a share of them."""

    run: str
    device: str
    difference: float


@dataclass(frozen=True)
class Gathered:
    """The records of one network and setting that one run made, and the other runs that they stand for."""

    members: tuple[Record, ...]
    same: tuple[Same, ...]


@dataclass(frozen=True)
class _Run:
    members: tuple[Record, ...]
    values: Mapping[Hashable, float]


def case_key(record: Record) -> str:
    return record.case.key()


def gathered(
    records: Iterable[Record], setting: Callable[[Record], str], value: Value, point: Point = case_key
) -> list[Gathered]:
    """The records to show of each network and setting: those of the first run that has it whole.

    Args:
        setting: a network and its setting, the same in every run.
        value: the figure of a record.
        point: what tells the figures of one setting apart.
    """
    settings: dict[str, dict[str, list[Record]]] = {}
    for record in records:
        settings.setdefault(setting(record), {}).setdefault(record.run, []).append(record)
    found: list[Gathered] = []
    for runs in settings.values():
        found += _told_apart([_Run(tuple(own), {point(r): value(r) for r in own}) for own in runs.values()])
    return found


def _told_apart(runs: Sequence[_Run]) -> list[Gathered]:
    found: list[Gathered] = []
    while runs:
        shown = max(runs, key=lambda run: len(run.values))  # the first of those with the most
        others = {at: _difference(shown, run) for at, run in enumerate(runs) if run is not shown}
        alike = {at for at, difference in others.items() if difference <= ALIKE}
        same = (Same(runs[at].members[0].run, device_of(runs[at].members[0]), others[at]) for at in sorted(alike))
        found.append(Gathered(shown.members, tuple(same)))
        runs = [run for at, run in enumerate(runs) if at in others and at not in alike]
    return found


def _difference(shown: _Run, other: _Run) -> float:
    """The largest difference of two runs' figures; infinite if the other has one that the shown run lacks."""
    if not other.values.keys() <= shown.values.keys():
        return math.inf
    return max(relative(value, shown.values[point]) for point, value in other.values.items())


def relative(value: float, reference: float) -> float:
    """How far a figure is from another, as a share of that."""
    if value == reference:
        return 0.0
    return abs(value / reference - 1) if reference else math.inf


def within(share: float) -> str:
    """A bound in percent, rounded up so that it stays one: 0.61 %."""
    return f"{math.ceil(1e4 * share - 1e-9) / 100:.2f} %"


def same_words(group: Gathered, figures: str) -> str | None:
    """On which other runs and machines some figures are those that are shown, and how nearly; None without any."""
    if not group.same:
        return None
    first = group.members[0]
    difference = max(other.difference for other in group.same)
    nearly = f"the same within {within(difference)}" if difference else "exactly the same"
    runs = counted(len(group.same), "other run")
    others = "; ".join(f"run {other.run}, {other.device}" for other in group.same)
    shown = f"Shown is run {first.run}, {device_of(first)}"
    return f"{shown}; {figures} of {runs} are {nearly}: {others}."


def once(records: Iterable[Record]) -> list[Record]:
    """Predicted steps that several runs agree on, once: no machine is in them. All other records as they are."""
    records = list(records)
    shown = {id(record) for group in predicted_steps(records) for record in group.members}
    return [record for record in records if not _is_predicted_step(record) or id(record) in shown]


def predicted_steps(records: Iterable[Record]) -> list[Gathered]:
    """Predicted steps by setting, each from the first run that has it whole."""
    steps = (record for record in records if _is_predicted_step(record))
    return gathered(steps, setting_of, lambda record: record.peak_delta_bytes or 0)


def _is_predicted_step(record: Record) -> bool:
    return record.case.kind == "step" and record.case.source == "predicted"
