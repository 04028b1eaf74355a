"""The rest of the report: kernels, the machines and their software, and what each column means."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from densebench.records import Record
from densebench.report.blocks import Block, Folded, Items, Plot, Prose, Section, Sheet
from densebench.report.figure_kernels import kernels_picture
from densebench.report.glossary import explain
from densebench.report.kernel_tables import CODE_CAPTION, code_table, operator_table, overview_table
from densebench.report.kernel_words import beyond, clauses, code_words, finding, gist
from densebench.report.kernels import Machine, failures, machines
from densebench.report.sources import MAKE_SOME as COMMAND
from densebench.report.tables import Column, Table, build
from densebench.report.units import memory, number

KERNELS_FOR = (
    "The fused strategies run these operators in place of PyTorch's layers, forward and backward. Here each is "
    "timed alone, on the shapes of a network's layers and with its operands out of the cache, so that a gain or a "
    "loss can be traced to its kernel. Shares are of the rates that PyTorch's own copy and matrix product reached "
    "on the machine in the same run; they are no bound of it. Timed were:"
)
_RATES = {"copy_gb_s": ("copy by PyTorch", "GB/s"), "matmul_tflops": ("matmul by PyTorch", "TFLOP/s")}


def kernels_section(records: Sequence[Record], code: Sequence[dict[str, Any]]) -> Section:
    """Kernels beside PyTorch: the first machine in full view, the others folded; then the compiled code."""
    id, title = "kernels", "Kernels"
    found = machines(records)
    blocks: list[Block] = []
    for at, machine in enumerate(found):
        shown = _machine_blocks(machine, "kernels" if at == 0 else f"kernels-{at + 1}")
        if at == 0:
            said = finding(machine)
            blocks += [*([Prose(said)] if said else []), Prose(KERNELS_FOR), Items(clauses(found)), *shown]
        else:
            blocks.append(Folded(f"{machine.name}{gist(machine)}", shown))
    if code:
        if not found:
            blocks.append(Prose(f"Not timed: no record of a kernel. On a machine with a GPU: {COMMAND}"))
        timed = any(run.record.case.device != "cpu" for machine in found for run in machine.runs)
        blocks.append(
            Folded("Machine code of the kernels", (Prose(code_words(code, timed)), Sheet(code_table(code))))
        )
    if failed := failures(records):
        blocks.append(Items(failed))
    if not blocks:
        why = "No kernel was timed: that takes a GPU."
        return Section(id, title, absent=why, command=f"{COMMAND} --densebench-device cuda")
    return Section(id, title, tuple(blocks))


def _machine_blocks(machine: Machine, name: str) -> tuple[Block, ...]:
    """A machine's picture, what must be said of it, and every shape of every operator, folded."""
    picture = kernels_picture(machine, name)
    said = beyond(machine)
    return (
        Sheet(overview_table(machine)) if picture is None else Plot(picture),
        *([Prose(said)] if said else []),
        Folded(
            f"Every shape on {machine.name}",
            tuple(Folded(machine.title(one), (Sheet(operator_table(one)),)) for one in machine.operators),
        ),
    )


def environment_section(records: Sequence[Record]) -> Section:
    """Where each run was made."""
    runs: dict[str, list[Record]] = {}
    for record in records:
        runs.setdefault(record.run, []).append(record)
    blocks = (Sheet(runs_table(runs)), Folded("Everything known of each run", (Sheet(environment_table(runs)),)))
    return Section("environment", "Environment", blocks)


def runs_table(runs: dict[str, list[Record]]) -> Table:
    """One row a run: where, when, with what."""
    facts = {run: run_facts(members) for run, members in runs.items()}

    def column(name: str, title: str | None = None) -> Column[str]:
        return Column(title or name, lambda run: facts[run].get(name), numeric=False)

    columns = [
        Column[str]("run", lambda run: run or "(unnamed run)", numeric=False),
        *(column(name) for name in ("device", "measured (UTC)", "torch", "triton")),
        Column[str]("commit", lambda run: _short(facts[run].get("commit")), numeric=False),
        column("records"),
    ]
    return build("Runs", columns, runs)


def _short(commit: str | None) -> str | None:
    """Ten digits, and what was said after the forty."""
    return None if commit is None else re.sub(r"\b([0-9a-f]{10})[0-9a-f]{30}\b", r"\1", commit)


def environment_table(runs: dict[str, list[Record]]) -> Table:
    """One column a run, one row a fact."""
    facts = {run: run_facts(members) for run, members in runs.items()}
    names = list(dict.fromkeys(name for known in facts.values() for name in known))

    def column(run: str) -> Column[str]:
        return Column(run or "(unnamed run)", lambda name: facts[run].get(name), numeric=False)

    columns = [Column[str]("fact", lambda name: name, numeric=False), *map(column, facts)]
    return build("Environment of each run", columns, names)


def run_facts(records: Sequence[Record]) -> dict[str, str]:
    """What is known of where a run was made, in words; values that changed within the run are all given."""
    found: dict[str, dict[str, None]] = {}
    for record in records:
        for name, value in _facts(record.environment):
            found.setdefault(name, {})[value] = None
    dates = sorted(record.created[:16].replace("T", " ") for record in records if record.created)
    span = " to ".join(dict.fromkeys([dates[0], dates[-1]])) if dates else "unknown"
    counts = {"records": f"{len(records)}", "measured (UTC)": span}
    return {**counts, **{name: "; ".join(values) for name, values in found.items()}}


def _facts(environment: dict[str, Any]) -> list[tuple[str, str]]:
    facts = []
    for key, value in environment.items():
        if value in (None, {}, [], ""):
            continue
        if key == "commit":
            changed = " with changes not committed" if environment.get("dirty") else ""
            facts.append(("commit", f"{value}{changed}"))
        elif key == "argv" and isinstance(value, list):
            facts.append(("command", " ".join(_without_folder(str(part)) for part in value)))
        elif key == "gpu" and isinstance(value, dict):
            facts += [(f"GPU {name}", _fact(name, item)) for name, item in value.items() if item is not None]
        elif key == "ceilings" and isinstance(value, dict):
            facts += [_rate(name, rate) for name, rate in value.items()]
        elif isinstance(value, dict):
            label = {"packages": "", "flags": "flag "}.get(key, f"{key} ")
            facts += [(f"{label}{name}", _fact(name, item)) for name, item in value.items()]
        elif key != "dirty":
            facts.append((key.replace("_bytes", "").replace("_", " "), _fact(key, value)))
    return facts


def _fact(name: str, value: Any) -> str:
    if name.endswith("bytes") and isinstance(value, int):
        return memory(value)
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return number(value)
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _rate(name: str, value: Any) -> tuple[str, str]:
    """A probed rate, which the records call a ceiling, with its unit."""
    fact, unit = _RATES.get(name, (name.replace("_", " "), ""))
    return fact, f"{_fact(name, value)} {unit}".rstrip()


def _without_folder(word: str) -> str:
    """A program by its name: where somebody's home lies is no concern of the reader's."""
    return re.sub(r"^/.*/", "", word)


def glossary_section(sections: Iterable[Section], beside_the_answer: Table | None = None) -> Section:
    """Every column of every table of the report, in the order of appearance."""
    tables = [] if beside_the_answer is None else [beside_the_answer]
    tables += [table for section in sections if section.id != "environment" for table in section.tables()]
    columns = dict.fromkeys((name, table.caption == CODE_CAPTION) for table in tables for name in table.columns)
    entries = dict(explain(name, of_code) for name, of_code in columns)
    rows = [Column[str]("column", lambda name: name, numeric=False), Column[str]("meaning", entries.get, False)]
    return Section("glossary", "Glossary", (Sheet(build("What each column means", rows, entries)),))
