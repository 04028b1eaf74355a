"""The table at the end of a benchmark run, at most 80 columns wide."""

from __future__ import annotations

from collections.abc import Iterable

from densebench.capacities import MIB
from densebench.records import Record
from densebench.report.style import Roster
from densebench.statistics import ratio_of

_ROW = "{:<25}{:>10}{:>9}{:>9}{:>9}{:>18}"


def summary_table(records: Iterable[Record]) -> list[str]:
    """One table a run, network and setting: activation memory, time, throughput, FLOPs, and time against naive.

    Naive in the faster of its memory formats, of those timed in the same group, is what a row is compared with.
    """
    runs: dict[str, list[Record]] = {}
    for record in records:
        if record.case.kind == "step":
            runs.setdefault(record.run, []).append(record)
    lines: list[str] = []
    for run, steps in runs.items():
        lines += [*(["", f"run {run}"] if len(runs) > 1 else []), *_tables(steps)]
    return lines


def _tables(steps: list[Record]) -> list[str]:
    yardsticks = {entry.name for entry in Roster.of(steps) if entry.family == "yardstick"}
    models: dict[str, str] = {}  # of each setting, the first network: ResNet stands beside it
    for record in steps:
        if record.case.strategy not in yardsticks:
            models.setdefault(_setting(record), record.case.model)
    groups: dict[str, list[Record]] = {}
    for record in steps:
        own = record.case.strategy not in yardsticks
        model = record.case.model if own else models.get(_setting(record), record.case.model)
        groups.setdefault(_group(record, model), []).append(record)
    lines: list[str] = []
    for group, members in groups.items():
        lines += ["", group, _ROW.format("", "peak MiB", "ms", "img/s", "GFLOP", "x naive's time")]
        for record in members:
            name = record.case.model if record.case.strategy in yardsticks else record.case.strategy
            lines.append(_line(name, record, fastest_naive(members, record.group)))
    return lines


def fastest_naive(records: Iterable[Record], group: str | None) -> Record | None:
    """The record of naive with the least time in a group, over memory formats; None where it was not timed."""
    timed = [r for r in records if r.case.strategy == "naive" and r.time_s is not None and r.group == group]
    return min(timed, key=lambda r: r.time_s.median if r.time_s else 0, default=None)


def ended_in_words(record: Record) -> str:
    """How a case without figures ended: its status, and the reason where the record has one."""
    return f"{record.status}: {record.reason or 'no figures'}"


def _group(record: Record, model: str) -> str:
    """The title of a record's table: its setting, and the network that the table is about."""
    options = record.case.options
    depths = [f"{name}={value}" for name, value in sorted(options.items())]
    return " ".join([_setting(record), model, *depths])[:80]


def _setting(record: Record) -> str:
    case = record.case
    size = "x".join(map(str, (case.batch, *case.input_shape[1:])))
    source = "predicted: " if case.source == "predicted" else ""
    graph = " as a CUDA graph" if case.cuda_graph else ""
    return f"{source}{case.mode} {size} {case.autocast or case.dtype} {case.device}{graph}"


def _line(name: str, record: Record, baseline: Record | None) -> str:
    name += " (contiguous)" if record.case.memory_format == "contiguous" else ""
    if record.peak_delta_bytes is None and (record.time_s is None or record.reason is not None):
        return f"{name:<26}{ended_in_words(record)}"[:80]
    memory = "" if record.peak_delta_bytes is None else f"{record.peak_delta_bytes / MIB:.0f}"
    flops = "" if record.flops_executed is None else f"{record.flops_executed / 1e9:.0f}"
    if record.time_s is None:
        return _ROW.format(name, memory, "", "", flops, "")
    ratio = ""
    pair = None if baseline is None else ratio_of(record, baseline)
    if pair is not None:
        ratio = f"{pair.median:.2f} {pair.verdict if record is not baseline else ''}".strip()
    time = f"{record.time_s.median * 1e3:.1f}"
    return _ROW.format(name, memory, time, f"{record.throughput_img_s:.1f}", flops, ratio)
