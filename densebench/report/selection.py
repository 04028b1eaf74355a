"""From records to what is compared with what: rows that differ in the contender and in nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from densebench.records import Case, Record
from densebench.report.console import fastest_naive
from densebench.report.style import Look, Roster, display_name
from densebench.report.units import MODES, Unit, device_words, memory_unit, setting_words
from densebench.statistics import Ratio, ratio_of

USABLE = ("ok", "noisy")


@dataclass(frozen=True)
class Row:
    """One contender in a comparison.

    Attributes:
        memory_ratio: its activation bytes over naive's; None where either is unknown.
        time_ratio: its time over naive's, pair by pair; None where the two were not timed in turns.
    """

    record: Record
    name: str
    family: str
    look: Look
    memory_ratio: float | None = None
    time_ratio: Ratio | None = None

    @property
    def usable(self) -> bool:
        """Whether its figures may be held up as what the contender achieves."""
        return self.record.status in USABLE

    @property
    def label(self) -> str:
        """The name for figures, with a warning where its results are wrong."""
        return f"{self.name} (incorrect)" if self.record.status == "incorrect" else self.name

    @property
    def milliseconds(self) -> float | None:
        return None if self.record.time_s is None else self.record.time_s.median * 1e3


@dataclass(frozen=True)
class Comparison:
    """One network in one setting under all its contenders, other networks in the same setting beside it.

    Attributes:
        case: of naive where it is there, else of any contender; its strategy does not matter.
        run_shown: whether the run's name is needed to tell this comparison from another.
    """

    case: Case
    run: str
    device: str
    rows: tuple[Row, ...]
    run_shown: bool = False

    @property
    def setting(self) -> str:
        """All that its rows share, in words, without the mode."""
        graph = ", as a CUDA graph" if self.case.cuda_graph else ""
        run = f", run {self.run}" if self.run_shown else ""
        return setting_words(self.case, self.device) + graph + run

    @property
    def title(self) -> str:
        return f"{MODES.get(self.case.mode, self.case.mode)}: {self.setting}"

    @cached_property
    def naive(self) -> Row | None:
        """The baseline: naive in the memory format in which it is faster, of the group with the most rows."""
        naives = [row for row in self.rows if row.record.case.strategy == "naive"]
        timed = [row for row in naives if row.record.time_s is not None]
        if timed:
            groups = [row.record.group for row in self.timed]
            most = max(dict.fromkeys(row.record.group for row in timed), key=groups.count)
            fastest = fastest_naive([row.record for row in timed], most)
            return next(row for row in timed if row.record is fastest)
        return min(naives, key=lambda row: row.record.peak_delta_bytes or float("inf"), default=None)

    @property
    def unit(self) -> Unit:
        """The unit for the activation memory of all its rows."""
        return memory_unit(row.record.peak_delta_bytes or 0 for row in self.rows)

    @property
    def strategies(self) -> list[Row]:
        """Strategies other than naive with results that count."""
        return [
            row
            for row in self.rows
            if row.family == "strategy" and row.record.case.strategy != "naive" and row.usable
        ]

    @property
    def measured(self) -> list[Row]:
        """Rows with a memory figure."""
        return [row for row in self.rows if row.record.peak_delta_bytes is not None]

    @property
    def timed(self) -> list[Row]:
        return [row for row in self.rows if row.record.time_s is not None]


def comparisons(records: Sequence[Record], roster: Roster, source: str = "measured") -> list[Comparison]:
    """All comparisons of whole networks, training first, the most telling ones before the others.

    Rows share run, mode, batch, image, precision, device, options and whether the step is a CUDA graph; a network
    that is a yardstick (ResNet) stands in each comparison of its setting.
    """
    steps = [r for r in records if r.case.kind == "step" and r.case.source == source]
    run_shown = need_names(steps, setting_of)
    settings: dict[str, list[Record]] = {}
    for record in steps:
        settings.setdefault(_setting_key(record), []).append(record)
    found: list[Comparison] = []
    for members in settings.values():
        yardsticks = [r for r in members if roster[r.case.strategy].family == "yardstick"]
        models = dict.fromkeys(r.case.model for r in members if r not in yardsticks)
        for model in models:
            own = [r for r in members if r.case.model == model and r not in yardsticks]
            found.append(_comparison(own, yardsticks, roster, run_shown))
        if not models:
            found.append(_comparison([], yardsticks, roster, run_shown))
    return sorted(found, key=_interest)


def _comparison(own: list[Record], others: list[Record], roster: Roster, run_shown: bool) -> Comparison:
    members = sorted([*own, *others], key=lambda r: (roster.rank(r.case.strategy), r.case.memory_format))
    shared = (own or others)[0]
    case = next((r.case for r in own if r.case.strategy == "naive"), shared.case)
    plain = Comparison(
        case, shared.run, device_of(shared), tuple(_row(record, roster) for record in members), run_shown
    )
    base = None if plain.naive is None else plain.naive.record
    rows = tuple(_row(record, roster, fastest_naive(members, record.group) or base) for record in members)
    return Comparison(case, plain.run, plain.device, rows, run_shown)


def _row(record: Record, roster: Roster, base: Record | None = None) -> Row:
    entry = roster[record.case.strategy]
    return Row(
        record,
        display_name(record, entry.family),
        entry.family,
        entry.look,
        _memory_ratio(record, base),
        _time_ratio(record, base),
    )


def _memory_ratio(record: Record, base: Record | None) -> float | None:
    if base is None or not base.peak_delta_bytes or record.peak_delta_bytes is None:
        return None
    return record.peak_delta_bytes / base.peak_delta_bytes


def _time_ratio(record: Record, base: Record | None) -> Ratio | None:
    return None if base is None else ratio_of(record, base)


def _setting_key(record: Record) -> str:
    return f"{record.run} {setting_of(record)}"


def setting_of(record: Record) -> str:
    """All that the rows of a comparison share but the run and the network, as a key."""
    case = record.case
    shared = (case.mode, case.batch, case.input_shape, case.dtype, case.autocast, case.cuda_graph)
    return json.dumps([*shared, case.device, _place(record), case.options], sort_keys=True)


def _place(record: Record) -> str:
    """Where a record was made; nothing that is predicted says where."""
    return "" if record.case.source == "predicted" else device_of(record)


def _interest(comparison: Comparison) -> tuple[object, ...]:
    """Sort key: what a reader asks first comes first. Images, training, a GPU, large ones, DenseNet-121.

    In float32 on a CPU, under autocast on a GPU, as is usual there. Of several runs, the one that the caller names
    first.
    """
    case = comparison.case
    pixels = case.input_shape[-1] * case.input_shape[-2]
    return (
        len(case.input_shape),
        case.mode != "train",
        case.device != "cuda",
        -pixels,
        case.model != "densenet121",
        case.model,
        (case.autocast is None) == (case.device == "cuda"),
        case.cuda_graph,
        bool(case.options.get("beside")),
        comparison.naive is None or comparison.naive.record.time_s is None,
        -case.batch,
    )


def device_of(record: Record) -> str:
    """The name of the device that a record was measured on, in words."""
    return device_words(str(record.environment.get("device") or record.case.device))


def need_names(records: Iterable[Record], title: Callable[[Record], str] = _place) -> bool:
    """Whether runs must be named: records of two of them come under one title.

    Titles say at least where: on which device, or that it is predicted.
    """
    runs: dict[str, set[str]] = {}
    for record in records:
        runs.setdefault(title(record), set()).add(record.run)
    return any(len(names) > 1 for names in runs.values())


def naive_is_better(comparison: Comparison) -> bool:
    """Whether naive fits and no strategy is faster, nor as fast (or undecided) with less memory."""
    naive, rivals = comparison.naive, [row for row in comparison.strategies if row.time_ratio is not None]
    if naive is None or not naive.usable or not rivals:
        return False
    return all(_loses(row) for row in rivals)


def _loses(row: Row) -> bool:
    verdict = None if row.time_ratio is None else row.time_ratio.verdict
    return verdict == "SLOW" or (verdict != "FAST" and (row.memory_ratio or 0) >= 1)


def ladders(found: Sequence[Comparison]) -> list[list[Comparison]]:
    """Comparisons that differ in the batch alone, by increasing batch; those of two batches or more."""
    groups: dict[str, list[Comparison]] = {}
    for comparison in found:
        case = comparison.case
        key = (comparison.run, comparison.device, case.model, case.mode, case.input_shape)
        text = json.dumps([*key, case.dtype, case.autocast, case.cuda_graph, case.options], sort_keys=True)
        groups.setdefault(text, []).append(comparison)
    ordered = [sorted(group, key=lambda c: c.case.batch) for group in groups.values()]
    return [group for group in ordered if len(group) > 1]
