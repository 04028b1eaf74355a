"""The largest batch for memories of several sizes: traced or tried where it was, else estimated from peaks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace

from densebench.capacities import CAPACITIES_GIB, GIB
from densebench.counting import counted
from densebench.records import Case, Record
from densebench.report.agreement import relative, within
from densebench.report.blocks import Block, Prose, Section, Sheet
from densebench.report.deepest import deepest_blocks
from densebench.report.fits import BEYOND, DIGITS, Fit, driver_bytes, fits, workspace_bytes
from densebench.report.sources import MAKE_SOME
from densebench.report.style import Roster
from densebench.report.tables import Column, Table, build
from densebench.report.units import MODES, condition_words, memory, percent

Setting = tuple[str, Sequence[Fit]]  # a network and its setting in words, and what fits of it


def capacity_section(records: Sequence[Record], roster: Roster) -> Section:
    """The largest batch of a training step for cards of several sizes, and the deepest network."""
    id, title = "capacity", "Largest batch for 8, 16, 24, 40 and 80 GiB"
    found = [(_words(members, roster), fits(members, roster)) for members in settings(records, roster)]
    if not found:
        why = "No training step has a measured or predicted peak."
        return Section(id, title, absent=why, command=MAKE_SOME)
    found.sort(key=lambda pair: not any(fit.tried for fit in pair[1]))
    deepest = deepest_blocks(records, roster)
    most = "With the batch fixed, depth grows instead. Found in the same way, without running."
    blocks: list[Block] = [Prose(_method(found)), Prose(_bound(found))]
    blocks += [Sheet(capacity_table(words, own)) for words, own in found]
    blocks += [Prose(most), *deepest] if deepest else []
    return Section(id, title, tuple(blocks))


def fits_of(case: Case, records: Iterable[Record], roster: Roster) -> list[Fit]:
    """The lines of the network and setting of a case; none if nothing is known of them."""
    found = [
        members for members in settings(records, roster) if _network(case) in {_network(r.case) for r in members}
    ]
    return fits(found[0], roster) if found else []


def _method(found: Sequence[Setting]) -> str:
    """How the figures were found, and in how many runs."""
    answers = [own for _, lines in found for fit in lines for own in fit.tried.values()]
    several = [own for own in answers if len(own) > 1]
    apart = max((relative(other, own[0]) for own in several for other in own), default=0.0)
    agree = f"differ by up to {within(apart)}" if apart else "agree"
    share = "All" if len(several) == len(answers) else f"{len(several)} of"
    runs = f" {share} {counted(len(answers), 'such number')} were found in several runs, which {agree}."
    return (
        "One table for each network and setting, over all runs. A number without ≈ was found by tracing that "
        "batch for a GPU, without running it (or by running it there), with the allocator's rounding, cuBLAS's "
        f"workspaces ({memory(workspace_bytes())}) and {memory(driver_bytes())} for the driver counted in."
        + (runs if several else "")
    )


def _bound(found: Sequence[Setting]) -> str:
    """What an estimate is, and how far estimates are off where the answer is known."""
    how = (
        "A number with ≈ is an estimate, where nothing was traced: the line through the known peaks (of one "
        "batch: its activations grow in proportion to the batch) is drawn on to the card's memory, less the same "
        f"driver and workspaces. Beyond {BEYOND} times the known batch it is rounded down to {DIGITS} digits. "
    )
    known = [(words, fit, fit.errors()) for words, lines in found for fit in lines]
    errors = [(error, fit.name, gib) for _, fit, by_gib in known for gib, error in by_gib.items()]
    if not errors:
        return how + "Nothing here was both traced and estimated, so how far off estimates are is not known."
    low, high = min(error for error, *_ in errors), max(error for error, *_ in errors)
    worst, name, gib = max(errors, key=lambda error: abs(error[0]))
    networks = "; ".join(dict.fromkeys(words for words, _, by_gib in known if by_gib))
    return how + (
        f"Where a number without ≈ is known, an estimate would be off by {percent(low)} to {percent(high)}: "
        f"{counted(len(errors), 'case')} of {networks}. The farthest is {name} at {gib} GiB, {percent(worst)}."
    )


def settings(records: Iterable[Record], roster: Roster) -> list[list[Record]]:
    """Training records of all runs that differ in contender, batch and source alone, by network and setting.

    Other networks in the same setting stand with each, for scale.
    """
    networks: dict[str, list[Record]] = {}
    yardsticks: dict[str, list[Record]] = {}
    for record in records:
        case = record.case
        known = case.kind == "fit" or (case.kind == "step" and record.peak_allocated_bytes is not None)
        if not known or case.mode != "train":
            continue
        if roster[case.strategy].family == "yardstick":
            yardsticks.setdefault(_shared(case), []).append(record)
        else:
            networks.setdefault(_network(case), []).append(record)
    return [[*own, *yardsticks.get(_shared(own[0].case), [])] for own in networks.values()]


def capacity_table(words: str, lines: Sequence[Fit]) -> Table:
    """The largest batch of each contender by capacity."""

    def column(capacity: int) -> Column[Fit]:
        return Column(f"{capacity} GiB", lambda fit: _cell(fit, capacity))

    columns = [
        Column[Fit]("contender", lambda fit: fit.name, numeric=False),
        *(column(capacity) for capacity in CAPACITIES_GIB),
        Column[Fit]("known from", lambda fit: fit.basis(CAPACITIES_GIB), numeric=False),
    ]
    caption = f"Largest batch. {MODES['train']}: {words}"
    return build(caption, columns, lines, strong=lambda fit: fit.strategy == "naive")


def _words(members: Sequence[Record], roster: Roster) -> str:
    """Network and setting; no device, since the figures are for cards of any make."""
    own = next(record for record in members if roster[record.case.strategy].family != "yardstick")
    return condition_words(replace(own.case, options=_model_options(own.case)), with_batch=False)


def _cell(fit: Fit, capacity: int) -> str | None:
    if capacity in fit.tried:
        return f"{fit.tried[capacity][0]:,}"
    return None if fit.estimate is None else f"≈ {fit.estimate.shown(capacity * GIB):,}"


def _network(case: Case) -> str:
    return f"{_shared(case)} {json.dumps([case.model, _model_options(case)], sort_keys=True)}"


def _shared(case: Case) -> str:
    return json.dumps([case.autocast, case.dtype, case.input_shape])


def _model_options(case: Case) -> dict[str, object]:
    return {k: v for k, v in case.options.items() if k not in ("capacity_gib", "largest_batch")}
