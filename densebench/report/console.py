"""The table at the end of a benchmark run, at most 80 columns wide."""

from __future__ import annotations

from collections.abc import Iterable

from densebench.results import Record
from densebench.statistics import time_ratio

MIB = 2**20
_ROW = "{:<25}{:>10}{:>9}{:>9}{:>9}{:>18}"


def summary_table(records: Iterable[Record]) -> list[str]:
    """One table a group: activation memory, time, throughput, FLOPs, and time against naive.

    Naive in the faster of its memory formats is what the others are compared with.
    """
    groups: dict[str, list[Record]] = {}
    for record in records:
        if record.case.kind == "step":
            groups.setdefault(_group(record), []).append(record)
    lines: list[str] = []
    for group, members in groups.items():
        lines += ["", group, _ROW.format("", "peak MiB", "ms", "img/s", "GFLOP", "x naive's time")]
        baseline = fastest_naive(members)
        lines += [_line(record, baseline) for record in members]
    return lines


def fastest_naive(records: Iterable[Record]) -> Record | None:
    """The record of naive with the least time, over memory formats; None where it was not timed."""
    timed = [r for r in records if r.case.strategy == "naive" and r.time_s is not None]
    return min(timed, key=lambda r: r.time_s.median if r.time_s else 0, default=None)


def _group(record: Record) -> str:
    case = record.case
    size = "x".join(map(str, (case.batch, *case.input_shape[1:])))
    source = "predicted: " if case.source == "predicted" else ""
    return f"{source}{case.mode} {size} {case.autocast or case.dtype} {case.device}"


def _line(record: Record, baseline: Record | None) -> str:
    case = record.case
    name = case.model if case.strategy == "eager" else case.strategy
    name += " (contiguous)" if case.memory_format == "contiguous" else ""
    if record.peak_delta_bytes is None:
        return f"{name:<26}{record.status}: {record.reason}"[:80]
    memory = f"{record.peak_delta_bytes / MIB:.0f}"
    flops = "" if record.flops_executed is None else f"{record.flops_executed / 1e9:.0f}"
    if record.time_s is None:
        return _ROW.format(name, memory, "", "", flops, "")
    ratio = ""
    if baseline is not None and baseline.time_s is not None and record.group == baseline.group:
        pair = time_ratio(record.time_s.samples, baseline.time_s.samples)
        ratio = f"{pair.median:.2f} {pair.verdict if record is not baseline else ''}".strip()
    time = f"{record.time_s.median * 1e3:.1f}"
    return _ROW.format(name, memory, time, f"{record.throughput_img_s:.1f}", flops, ratio)
