"""Kernels against what the device can do: records of kind "kernel", and the machine code they became.

A record's case names the operator (`model`), who runs it (`strategy`: "ours", "eager", ...) and the shape
(`options`). The device's ceilings stand in the environment: `copy_gb_s` and `matmul_tflops`.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from densebench.records import Record
from densebench.report.answer import ratio_words
from densebench.report.selection import device_of, need_names
from densebench.report.tables import Column, Table, build
from densebench.report.units import STATUS_WORDS, number, precision, times
from densebench.statistics import ratio_of

BASELINE = "eager"
SHAPE = ("block", "layer", "rows", "columns", "outputs")


@dataclass(frozen=True)
class Run:
    """One kernel on one shape.

    Attributes:
        seconds: the median.
        against: its time over that of eager on the same shape, in words; and as a number.
        copy_share, matmul_share: of the device's measured rates; `roof_share` that of the nearer one:
            the time that the ceilings allow over the time taken.
    """

    record: Record
    seconds: float
    ratio: float | None
    against: str | None
    copy_share: float | None
    matmul_share: float | None

    @property
    def contender(self) -> str:
        return self.record.case.strategy

    @property
    def gb_s(self) -> float | None:
        moved = self.record.bytes_moved
        return None if not moved else moved / self.seconds / 1e9

    @property
    def tflop_s(self) -> float | None:
        return _tflop_s(self.record)

    @property
    def roof_share(self) -> float | None:
        return max((s for s in (self.copy_share, self.matmul_share) if s is not None), default=None)


@dataclass(frozen=True)
class Operator:
    """All runs of one operator in one mode, precision and place; `setting` says which."""

    name: str
    setting: str
    runs: tuple[Run, ...]

    @property
    def contenders(self) -> list[str]:
        """Ours first, the baseline second, then by name."""
        order = {"ours": 0, BASELINE: 1}
        return sorted({run.contender for run in self.runs}, key=lambda name: (order.get(name, 2), name))

    def by(self, contender: str) -> list[Run]:
        return [run for run in self.runs if run.contender == contender]


def operators(records: Iterable[Record]) -> list[Operator]:
    """Timed kernels by operator, in the order of the records."""
    groups: dict[tuple[str, ...], list[Record]] = {}
    timed = [record for record in records if record.case.kind == "kernel" and record.time_s is not None]
    for record in timed:
        case = record.case
        key = (case.model, case.mode, precision(case), device_of(record), record.run)
        groups.setdefault(key, []).append(record)
    run_shown = need_names(timed)
    found = []
    for (name, mode, dtype, device, run), members in groups.items():
        setting = f"{mode}, {dtype}, {device}" + (f", run {run}" if run_shown else "")
        baseline = {_shape(r): r for r in members if r.case.strategy == BASELINE}
        found.append(Operator(name, setting, tuple(_run(r, baseline.get(_shape(r))) for r in members)))
    return found


def failures(records: Iterable[Record]) -> tuple[str, ...]:
    """One line for each operator, contender and reason without a time; kernels that are wrong are among them."""
    counts: Counter[str] = Counter()
    for record in records:
        if record.case.kind == "kernel" and record.time_s is None:
            status = STATUS_WORDS.get(record.status, record.status)
            reason = f" ({record.reason})" if record.reason else ""
            counts[f"{record.case.model}, {record.case.strategy}: {status}{reason}"] += 1
    return tuple(f"{line}, on {count} shape{'s' if count > 1 else ''}" for line, count in counts.items())


def operator_table(operator: Operator) -> Table:
    """One row a shape and contender."""

    def option(name: str) -> Column[Run]:
        return Column(name, lambda run: _text(run.record.case.options.get(name)))

    columns = [
        *(option(name) for name in SHAPE),
        Column[Run]("contender", lambda run: run.contender, numeric=False),
        Column[Run]("time, µs", lambda run: number(run.seconds * 1e6)),
        Column[Run]("GB/s", lambda run: _number(run.gb_s)),
        Column[Run]("TFLOP/s", lambda run: _number(run.tflop_s)),
        Column[Run]("of copy rate", lambda run: share(run.copy_share)),
        Column[Run]("of matmul rate", lambda run: share(run.matmul_share)),
        Column[Run]("time against eager", lambda run: run.against),
    ]
    order = {name: at for at, name in enumerate(operator.contenders)}
    runs = sorted(operator.runs, key=lambda run: (_shape_order(run.record), order[run.contender]))
    caption = f"{operator.name}: {operator.setting}"
    return build(caption, columns, runs, strong=lambda run: run.contender == "ours")


def overview_table(found: Sequence[Operator]) -> Table:
    """One row an operator and contender: medians over the shapes."""
    pairs = [(operator, contender) for operator in found for contender in operator.contenders]

    def median(pair: tuple[Operator, str], field: str) -> float | None:
        values = [getattr(run, field) for run in pair[0].by(pair[1])]
        return statistics.median(known) if (known := [v for v in values if v is not None]) else None

    def column(title: str, field: str, words: Any) -> Column[tuple[Operator, str]]:
        def cell(pair: tuple[Operator, str]) -> str | None:
            value = median(pair, field)
            return None if value is None else str(words(value))

        return Column(title, cell)

    several = len({operator.setting for operator in found}) > 1
    columns = [
        Column[tuple[Operator, str]]("operator", lambda pair: pair[0].name, numeric=False),
        Column[tuple[Operator, str]]("case", lambda pair: pair[0].setting if several else None, numeric=False),
        Column[tuple[Operator, str]]("contender", lambda pair: pair[1], numeric=False),
        Column[tuple[Operator, str]]("shapes", lambda pair: str(len(pair[0].by(pair[1])))),
        column("GB/s", "gb_s", number),
        column("TFLOP/s", "tflop_s", number),
        column("of the nearer ceiling", "roof_share", share),
        column("time against eager", "ratio", times),
    ]
    caption = "Kernels, medians over all shapes" + ("" if several else f": {found[0].setting}")
    return build(caption, columns, pairs, strong=lambda pair: pair[1] == "ours")


def code_table(kernels: Sequence[dict[str, Any]]) -> Table:
    """What the compiler made of each kernel; columns as the file has them."""
    names = list(dict.fromkeys(name for kernel in kernels for name in kernel))

    def column(name: str) -> Column[dict[str, Any]]:
        numeric = all(isinstance(kernel.get(name), int | float | None) for kernel in kernels)
        return Column(name.replace("_", " "), lambda kernel: _text(kernel.get(name)), numeric)

    return build("Machine code of the kernels", [column(name) for name in names], kernels)


def share(value: float | None) -> str | None:
    """A share of a ceiling: 87 %."""
    return None if value is None else f"{100 * value:.0f} %"


def _run(record: Record, baseline: Record | None) -> Run:
    assert record.time_s is not None
    seconds = record.time_s.median
    ratio, against = _against(record, baseline)
    copy, matmul = _ceilings(record)
    tflop_s = _tflop_s(record)
    return Run(
        record,
        seconds,
        ratio,
        against,
        record.bytes_moved / seconds / 1e9 / copy if copy and record.bytes_moved else None,
        tflop_s / matmul if matmul and tflop_s else None,
    )


def _against(record: Record, baseline: Record | None) -> tuple[float | None, str | None]:
    if baseline is None or baseline is record or record.time_s is None or baseline.time_s is None:
        return None, None
    ratio = ratio_of(record, baseline)
    if ratio is not None:
        return ratio.median, ratio_words(ratio)
    plain = record.time_s.median / baseline.time_s.median
    return plain, times(plain)


def _tflop_s(record: Record) -> float | None:
    if record.flops_executed and record.time_s is not None:
        return record.flops_executed / record.time_s.median / 1e12
    return record.tflops_s or None


def _ceilings(record: Record) -> tuple[float | None, float | None]:
    facts = record.environment.get("ceilings")
    facts = facts if isinstance(facts, dict) else record.environment
    rates = (facts.get("copy_gb_s"), facts.get("matmul_tflops"))
    copy, matmul = (float(rate) if isinstance(rate, int | float) and rate > 0 else None for rate in rates)
    return copy, matmul


def _shape(record: Record) -> str:
    return json.dumps([record.case.options, record.case.batch, record.case.input_shape], sort_keys=True)


def _shape_order(record: Record) -> tuple[float, ...]:
    values = (record.case.options.get(name) for name in SHAPE)
    return tuple(value if isinstance(value, int | float) else -1 for value in values)


def _text(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key}={item}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def _number(value: float | None) -> str | None:
    return None if value is None else number(value)
