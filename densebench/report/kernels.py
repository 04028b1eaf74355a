"""Kernels beside what PyTorch reached on the machine: what records of kind "kernel" say.

A record's case names the operator (`model`), who runs it (`strategy`: "ours", "eager", ...) and the shape
(`options`). The rates of PyTorch's own copy and matmul, probed in the same run, stand in the environment as
`ceilings`: `copy_gb_s` and `matmul_tflops`. The probe is of one size, so they bound nothing: shares of them may
exceed 1.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from densebench.records import Record
from densebench.report.answer import ratio_words
from densebench.report.selection import device_of, need_names
from densebench.report.units import STATUS_WORDS, precision, times
from densebench.statistics import ratio_of

BASELINE = "eager"


@dataclass(frozen=True)
class Run:
    """One kernel on one shape.

    Attributes:
        seconds: the median.
        against: its time over that of eager on the same shape, in words; and as a number.
        copy_share, matmul_share: of the rates of PyTorch's copy and matmul; `rate_share` is the larger one.
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
    def noisy(self) -> bool:
        return self.record.status == "noisy"

    @property
    def gb_s(self) -> float | None:
        moved = self.record.bytes_moved
        return None if not moved else moved / self.seconds / 1e9

    @property
    def tflop_s(self) -> float | None:
        return _tflop_s(self.record)

    @property
    def rate_share(self) -> float | None:
        return max((s for s in (self.copy_share, self.matmul_share) if s is not None), default=None)


@dataclass(frozen=True)
class Operator:
    """All runs of one operator in one mode on one machine; `place` says where and in which precision."""

    name: str
    mode: str
    place: str
    runs: tuple[Run, ...]

    @property
    def setting(self) -> str:
        return f"{self.mode}, {self.place}"

    @property
    def contenders(self) -> list[str]:
        """Ours first, the baseline second, then by name."""
        return sorted({run.contender for run in self.runs}, key=_rank)

    def by(self, contender: str) -> list[Run]:
        return [run for run in self.runs if run.contender == contender]

    def ratios(self, contender: str, baseline: str = BASELINE) -> list[float]:
        """Its time over that of a baseline, on each shape that both ran."""
        if baseline == BASELINE:
            return [run.ratio for run in self.by(contender) if run.ratio is not None]
        others = {_shape(run.record): run.record for run in self.by(baseline)}
        found = (_against(run.record, others.get(_shape(run.record)))[0] for run in self.by(contender))
        return [ratio for ratio in found if ratio is not None]


@dataclass(frozen=True)
class Machine:
    """All operators of one machine in one precision; `name` says both, and the run where it must."""

    name: str
    operators: tuple[Operator, ...]

    @property
    def contenders(self) -> list[str]:
        return sorted({name for operator in self.operators for name in operator.contenders}, key=_rank)

    @property
    def runs(self) -> list[Run]:
        return [run for operator in self.operators for run in operator.runs]

    def title(self, operator: Operator) -> str:
        """An operator's name, with its mode where it was timed in two."""
        alike = [other for other in self.operators if other.name == operator.name]
        return f"{operator.name} ({operator.mode})" if len(alike) > 1 else operator.name


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
        place = f"{device}, {dtype}" + (f", run {run}" if run_shown else "")
        baseline = {_shape(r): r for r in members if r.case.strategy == BASELINE}
        found.append(Operator(name, mode, place, tuple(_run(r, baseline.get(_shape(r))) for r in members)))
    return found


def machines(records: Iterable[Record]) -> list[Machine]:
    """The same by machine and precision, in the order of the records."""
    places: dict[str, list[Operator]] = {}
    for operator in operators(records):
        places.setdefault(operator.place, []).append(operator)
    return [Machine(name, tuple(members)) for name, members in places.items()]


def failures(records: Iterable[Record]) -> tuple[str, ...]:
    """One line for each operator, contender and reason without a time; kernels that are wrong are among them."""
    counts: Counter[str] = Counter()
    for record in records:
        if record.case.kind == "kernel" and record.time_s is None:
            status = STATUS_WORDS.get(record.status, record.status)
            reason = f" ({record.reason})" if record.reason else ""
            counts[f"{record.case.model}, {record.case.strategy}: {status}{reason}"] += 1
    return tuple(f"{line}, on {count} shape{'s' if count > 1 else ''}" for line, count in counts.items())


def _rank(contender: str) -> tuple[int, str]:
    return {"ours": 0, BASELINE: 1}.get(contender, 2), contender


def _run(record: Record, baseline: Record | None) -> Run:
    assert record.time_s is not None
    seconds = record.time_s.median
    ratio, against = _against(record, baseline)
    copy, matmul = rates(record)
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


def rates(record: Record) -> tuple[float | None, float | None]:
    """What PyTorch's copy (GB/s) and matmul (TFLOP/s) reached on the record's machine."""
    facts = record.environment.get("ceilings")
    facts = facts if isinstance(facts, dict) else record.environment
    known = (facts.get("copy_gb_s"), facts.get("matmul_tflops"))
    copy, matmul = (float(rate) if isinstance(rate, int | float) and rate > 0 else None for rate in known)
    return copy, matmul


def _shape(record: Record) -> str:
    return json.dumps([record.case.options, record.case.batch, record.case.input_shape], sort_keys=True)
