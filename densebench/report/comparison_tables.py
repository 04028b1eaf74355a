"""The tables of a comparison: memory and time by contender, and everything else that was recorded."""

from __future__ import annotations

from collections.abc import Sequence

from densebench.records import Record
from densebench.report.answer import SPEED_WORDS, ratio_words
from densebench.report.selection import Comparison, Row
from densebench.report.tables import Column, Table, build
from densebench.report.units import MODES, STATUS_WORDS, Unit, condition_words, memory_unit, number, times


def main_table(comparison: Comparison) -> Table:
    """Memory and time of each contender, and both against naive."""
    unit = comparison.unit
    columns = [
        Column[Row]("contender", lambda row: row.name, numeric=False),
        Column[Row](f"activation memory, {unit.name}", lambda row: _bytes(row.record.peak_delta_bytes, unit)),
        Column[Row]("memory against naive", lambda row: _against(row.memory_ratio)),
        Column[Row]("time, ms", lambda row: _number(row.milliseconds)),
        Column[Row]("q1 to q3, ms", _quartiles),
        Column[Row]("img/s", lambda row: _number(row.record.throughput_img_s)),
        Column[Row]("time against naive", _time_ratio),
        Column[Row]("verdict", lambda row: _verdict(row, row is comparison.naive), numeric=False),
    ]
    return build(comparison.title, columns, comparison.rows, strong=lambda row: row is comparison.naive)


def elsewhere_table(answers: Sequence[tuple[Comparison, Row]], device: str) -> Table:
    """The strategy that other comparisons are won by; `device` is the answer's own."""
    unit = memory_unit(row.record.peak_delta_bytes or 0 for _, row in answers)
    columns = [
        Column[tuple[Comparison, Row]]("setting", lambda pair: _setting(pair[0]), numeric=False),
        Column[tuple[Comparison, Row]]("strategy", lambda pair: pair[1].name, numeric=False),
        Column[tuple[Comparison, Row]](
            f"activation memory, {unit.name}", lambda pair: _bytes(pair[1].record.peak_delta_bytes, unit)
        ),
        Column[tuple[Comparison, Row]]("memory against naive", lambda pair: _against(pair[1].memory_ratio)),
        Column[tuple[Comparison, Row]]("time against naive", lambda pair: _time_ratio(pair[1])),
        Column[tuple[Comparison, Row]]("verdict", lambda pair: _verdict_on(*pair), numeric=False),
        Column[tuple[Comparison, Row]]("device", lambda pair: _place(pair[0], device), numeric=False),
    ]
    return build("The same in other settings and on other machines", columns, answers)


def _place(comparison: Comparison, device: str) -> str:
    return "the same" if comparison.device == device else comparison.device


def _setting(comparison: Comparison) -> str:
    case = comparison.case
    return f"{MODES.get(case.mode, case.mode)}: {condition_words(case)}"


def extra_table(comparison: Comparison) -> Table:
    """Every other figure that was recorded; columns in which nothing is known are left out."""
    unit = memory_unit(row.record.peak_allocated_bytes or 0 for row in comparison.rows)

    def memory_column(title: str, field: str) -> Column[Row]:
        return Column(f"{title}, {unit.name}", lambda row: _bytes(getattr(row.record, field), unit))

    def scaled(title: str, field: str, scale: float) -> Column[Row]:
        return Column(title, lambda row: _number(getattr(row.record, field), scale))

    columns = [
        Column[Row]("contender", lambda row: row.name, numeric=False),
        memory_column("peak", "peak_allocated_bytes"),
        memory_column("constant", "baseline_allocated_bytes"),
        memory_column("peak without gradients", "plain_peak_bytes"),
        memory_column("workspace", "workspace_bytes"),
        memory_column("reserved", "peak_reserved_bytes"),
        memory_column("process", "process_device_bytes"),
        memory_column("host peak", "host_peak_rss_bytes"),
        Column[Row]("repetitions", lambda row: str(row.record.time_s.n) if row.record.time_s else None),
        Column[Row]("least time, ms", lambda row: _least(row.record)),
        scaled("host time, ms", "host_time_s", 1e-3),
        scaled("compile, s", "compile_s", 1),
        scaled("GFLOP, model", "flops_model", 1e9),
        scaled("GFLOP, executed", "flops_executed", 1e9),
        scaled("TFLOP/s", "tflops_s", 1),
        scaled("energy, J", "energy_j", 1),
        scaled("clock, MHz", "sm_clock_mhz", 1),
        Column[Row]("error against reference", _error),
        Column[Row]("notes", _notes, numeric=False),
        Column[Row]("reason", lambda row: row.record.reason, numeric=False),
    ]
    return build(f"Everything else. {comparison.title}", columns, comparison.rows)


def predicted_table(comparison: Comparison) -> Table:
    """Predicted memory and work of each contender."""
    unit = memory_unit(row.record.peak_allocated_bytes or 0 for row in comparison.rows)
    columns = [
        Column[Row]("contender", lambda row: row.name, numeric=False),
        Column[Row](f"activation memory, {unit.name}", lambda row: _bytes(row.record.peak_delta_bytes, unit)),
        Column[Row]("memory against naive", lambda row: _against(row.memory_ratio)),
        Column[Row](f"peak, {unit.name}", lambda row: _bytes(row.record.peak_allocated_bytes, unit)),
        Column[Row]("GFLOP, executed", lambda row: _number(row.record.flops_executed, 1e9)),
    ]
    return build(comparison.title, columns, comparison.rows, strong=lambda row: row is comparison.naive)


def naive_table(comparisons: Sequence[Comparison]) -> Table:
    """Naive and the quickest strategy of each comparison."""

    def naive(comparison: Comparison) -> Row:
        assert comparison.naive is not None
        return comparison.naive

    def quickest(comparison: Comparison) -> Row:
        timed = [row for row in comparison.strategies if row.time_ratio is not None]
        return min(timed, key=lambda row: row.time_ratio.median if row.time_ratio else 0)

    unit = memory_unit(naive(comparison).record.peak_delta_bytes or 0 for comparison in comparisons)
    columns = [
        Column[Comparison]("case", lambda c: c.title, numeric=False),
        Column[Comparison](
            f"activation memory of naive, {unit.name}", lambda c: _bytes(naive(c).record.peak_delta_bytes, unit)
        ),
        Column[Comparison]("time of naive, ms", lambda c: _number(naive(c).milliseconds)),
        Column[Comparison]("quickest strategy", lambda c: quickest(c).name, numeric=False),
        Column[Comparison]("memory against naive", lambda c: _against(quickest(c).memory_ratio)),
        Column[Comparison]("time against naive", lambda c: _time_ratio(quickest(c))),
        Column[Comparison]("verdict", lambda c: _verdict(quickest(c), False), numeric=False),
    ]
    return build("Where naive is the better choice", columns, comparisons)


def measured_peak(record: Record) -> int | None:
    """The measured peak, library workspaces apart: no prediction knows them."""
    if record.peak_allocated_bytes is None:
        return None
    return record.peak_allocated_bytes - (record.workspace_bytes or 0)


def prediction_error(record: Record) -> float | None:
    """Predicted over measured peak, less one."""
    measured = measured_peak(record)
    if not measured or record.predicted_peak_bytes is None:
        return None
    return record.predicted_peak_bytes / measured - 1


def _bytes(value: int | None, unit: Unit) -> str | None:
    return None if value is None else unit.of(value)


def _number(value: float | None, scale: float = 1) -> str | None:
    return None if value is None else number(value / scale)


def _against(ratio: float | None) -> str | None:
    return None if ratio is None else times(ratio)


def _least(record: Record) -> str | None:
    return None if record.time_s is None else number(record.time_s.min * 1e3)


def _quartiles(row: Row) -> str | None:
    timing = row.record.time_s
    return None if timing is None else f"{number(timing.q1 * 1e3)} to {number(timing.q3 * 1e3)}"


def _time_ratio(row: Row) -> str | None:
    ratio = row.time_ratio
    return None if ratio is None else ratio_words(ratio)


def _verdict(row: Row, is_baseline: bool) -> str | None:
    words = [] if row.record.status == "ok" else [STATUS_WORDS.get(row.record.status, row.record.status)]
    if is_baseline and row.usable:
        words.append("the baseline")
    elif row.time_ratio is not None and row.usable:
        words.append(SPEED_WORDS[row.time_ratio.verdict])
    return "; ".join(words) or None


def _verdict_on(comparison: Comparison, row: Row) -> str | None:
    """A row's verdict, with what was wrong with the naive that it rests on."""
    naive = comparison.naive
    doubt = f"naive {STATUS_WORDS['noisy']}" if naive is not None and naive.record.status == "noisy" else None
    return "; ".join(words for words in (_verdict(row, False), doubt) if words) or None


def _error(row: Row) -> str | None:
    error = row.record.max_error_vs_reference
    return None if error is None else f"{error:.1e}"


def _notes(row: Row) -> str | None:
    record = row.record
    notes = ["throttled: " + ", ".join(record.clock_event_reasons or ())] if record.throttled else []
    notes += ["shared GPU"] if record.shared_gpu else []
    return "; ".join(notes) or None
