"""Kernels in tables: every shape of an operator, the medians of a machine, and the compiled code."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from densebench.records import Record
from densebench.report.kernels import Machine, Operator, Run
from densebench.report.tables import Column, Table, build
from densebench.report.units import STATUS_WORDS, number, times

CODE_CAPTION = "Machine code of the kernels"
SHAPE = ("block", "layer", "rows", "columns", "outputs")


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
        Column[Run]("notes", lambda run: STATUS_WORDS["noisy"] if run.noisy else None, numeric=False),
    ]
    order = {name: at for at, name in enumerate(operator.contenders)}
    runs = sorted(operator.runs, key=lambda run: (_shape_order(run.record), order[run.contender]))
    caption = f"{operator.name}: {operator.setting}"
    return build(caption, columns, runs, strong=lambda run: run.contender == "ours")


def overview_table(machine: Machine) -> Table:
    """One row an operator and contender: medians over the shapes."""
    pairs = [(operator, contender) for operator in machine.operators for contender in operator.contenders]

    def median(pair: tuple[Operator, str], field: str) -> float | None:
        values = [getattr(run, field) for run in pair[0].by(pair[1])]
        return statistics.median(known) if (known := [v for v in values if v is not None]) else None

    def column(title: str, field: str, words: Any) -> Column[tuple[Operator, str]]:
        def cell(pair: tuple[Operator, str]) -> str | None:
            value = median(pair, field)
            return None if value is None else str(words(value))

        return Column(title, cell)

    columns = [
        Column[tuple[Operator, str]]("operator", lambda pair: machine.title(pair[0]), numeric=False),
        Column[tuple[Operator, str]]("contender", lambda pair: pair[1], numeric=False),
        Column[tuple[Operator, str]]("shapes", lambda pair: str(len(pair[0].by(pair[1])))),
        column("GB/s", "gb_s", number),
        column("TFLOP/s", "tflop_s", number),
        column("of copy or matmul rate", "rate_share", share),
        column("time against eager", "ratio", times),
    ]
    caption = f"Kernels on {machine.name}: medians over all shapes"
    return build(caption, columns, pairs, strong=lambda pair: pair[1] == "ours")


def code_table(kernels: Sequence[dict[str, Any]]) -> Table:
    """What the compiler made of each kernel; columns as the file has them."""
    names = list(dict.fromkeys(name for kernel in kernels for name in kernel))

    def column(name: str) -> Column[dict[str, Any]]:
        numeric = all(isinstance(kernel.get(name), int | float | None) for kernel in kernels)
        return Column(name.replace("_", " "), lambda kernel: _text(kernel.get(name)), numeric)

    return build(CODE_CAPTION, [column(name) for name in names], kernels)


def share(value: float | None) -> str | None:
    """A share of a rate: 87 %."""
    return None if value is None else f"{100 * value:.0f} %"


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
