"""The largest batch for memories of several sizes: searched for where it was, else estimated from peaks."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from densebench.records import Case, Record
from densebench.report.blocks import Prose, Section, Sheet
from densebench.report.deepest import deepest_blocks
from densebench.report.selection import device_of
from densebench.report.sources import MAKE_SOME
from densebench.report.style import Roster, display_name
from densebench.report.tables import Column, Table, build
from densebench.report.units import GIB, MODES, setting_words

CAPACITIES_GIB = (8, 16, 24, 40, 80)


@dataclass(frozen=True)
class Affine:
    """Peak bytes as a function of the batch: `fixed + per_image * batch`."""

    fixed: float
    per_image: float

    def largest(self, capacity: int) -> int:
        """The largest batch that a capacity in bytes holds; 0 if not even one image fits."""
        return max(0, math.floor((capacity - self.fixed) / self.per_image))


@dataclass(frozen=True)
class Fit:
    """One contender: the batches that were tried by capacity in GiB, and the estimate for the others."""

    name: str
    strategy: str
    tried: dict[int, int]
    estimate: Affine | None
    basis: str


def affine(records: Sequence[Record]) -> Affine | None:
    """Peak memory against batch, from records of one contender that differ in the batch alone.

    One batch: activations in proportion to the images, everything else fixed. Several: the straight line
    through the smallest and the largest. None if no peak is known.
    """
    known = sorted((r for r in records if r.peak_allocated_bytes), key=lambda record: record.case.batch)
    if not known:
        return None
    first, last = known[0], known[-1]
    if first.case.batch < last.case.batch:
        rise = (last.peak_allocated_bytes or 0) - (first.peak_allocated_bytes or 0)
        slope = rise / (last.case.batch - first.case.batch)
    elif last.peak_delta_bytes is not None:
        slope = _image_bytes(last.case) + last.peak_delta_bytes / last.case.batch
    else:
        return None
    return Affine((last.peak_allocated_bytes or 0) - slope * last.case.batch, slope) if slope > 0 else None


def capacity_section(records: Sequence[Record], roster: Roster) -> Section:
    """The largest batch of a training step for cards of several sizes, and the deepest network."""
    id, title = "capacity", "Largest batch for 8, 16, 24, 40 and 80 GiB"
    tables = [capacity_table(members, roster) for members in settings(records, roster)]
    if not tables:
        why = "No training step has a measured or predicted peak."
        return Section(id, title, absent=why, command=MAKE_SOME)
    text = (
        "A number with ≈ is an estimate: peak memory grows in proportion to the batch, and the line through the "
        "known peaks is drawn on to the card's memory. The device's context, library workspaces and "
        "fragmentation come on top, so expect a few percent less. A number without ≈ was found by tracing that "
        "very batch and the next larger one (or by running them), with the allocator's rounding, cuBLAS's "
        "workspaces and half a GiB for the driver counted in."
    )
    deepest = deepest_blocks(records, roster)
    most = (
        [Prose("With the batch fixed, depth grows instead. Found in the same way, without running.")]
        if deepest
        else []
    )
    return Section(id, title, (Prose(text), *map(Sheet, tables), *most, *deepest))


def settings(records: Iterable[Record], roster: Roster) -> list[list[Record]]:
    """Training records of one network that differ in contender and batch alone, with other networks for scale.

    Of each network the most telling source only: what was tried or measured on a GPU comes before what was
    predicted, and that before what ran on a CPU.
    """
    places: dict[str, list[Record]] = {}
    for record in records:
        case = record.case
        known = case.kind == "fit" or (case.kind == "step" and record.peak_allocated_bytes is not None)
        if known and case.mode == "train":
            place = (record.run, device_of(record), case.source, case.autocast, case.dtype, case.input_shape)
            places.setdefault(json.dumps(place), []).append(record)
    found: dict[str, list[tuple[int, list[Record]]]] = {}
    for members in places.values():
        others = [r for r in members if roster[r.case.strategy].family == "yardstick"]
        networks: dict[str, list[Record]] = {}
        for record in (r for r in members if r not in others):
            networks.setdefault(_network(record.case), []).append(record)
        for network, own in networks.items():
            found.setdefault(network, []).append((min(_rank(r.case) for r in own), [*own, *others]))
    return [members for own in found.values() for rank, members in own if rank == min(ranked[0] for ranked in own)]


def capacity_table(members: Sequence[Record], roster: Roster) -> Table:
    """The largest batch of each contender by capacity."""

    def column(capacity: int) -> Column[Fit]:
        def cell(fit: Fit) -> str | None:
            if capacity in fit.tried:
                return f"{fit.tried[capacity]:,}"
            return None if fit.estimate is None else f"≈ {fit.estimate.largest(capacity * GIB):,}"

        return Column(f"{capacity} GiB", cell)

    own = next((r for r in members if roster[r.case.strategy].family != "yardstick"), members[0])
    mode = MODES.get(own.case.mode, own.case.mode)
    case = replace(own.case, options=_model_options(own.case))
    caption = f"Largest batch. {mode}: {setting_words(case, device_of(own), with_batch=False)}"
    columns = [
        Column[Fit]("contender", lambda fit: fit.name, numeric=False),
        *(column(capacity) for capacity in CAPACITIES_GIB),
        Column[Fit]("known from", lambda fit: fit.basis, numeric=False),
    ]
    return build(caption, columns, fits(members, roster), strong=lambda fit: fit.strategy == "naive")


def fits(members: Sequence[Record], roster: Roster) -> list[Fit]:
    """One line for each contender (and memory format), in the order of the roster."""
    groups: dict[tuple[int, str, str], list[Record]] = {}
    for record in members:
        case = record.case
        name = display_name(record, roster[case.strategy].family)
        groups.setdefault((roster.rank(case.strategy), case.model, name), []).append(record)
    found = []
    for (_, _, name), own in sorted(groups.items()):
        tried = {r.case.options["capacity_gib"]: r.case.options["largest_batch"] for r in own if _is_tried(r)}
        steps = [record for record in own if record.case.kind == "step"]
        batches = sorted({record.case.batch for record in steps})
        basis = [f"tried at {', '.join(map(str, sorted(tried)))} GiB"] if tried else []
        basis += [f"batch {' and '.join(map(str, dict.fromkeys([batches[0], batches[-1]])))}"] if batches else []
        found.append(Fit(name, own[0].case.strategy, tried, affine(steps), "; ".join(basis)))
    return found


def _is_tried(record: Record) -> bool:
    options = record.case.options
    numbers = (options.get("capacity_gib"), options.get("largest_batch"))
    return record.case.kind == "fit" and all(isinstance(number, int) for number in numbers)


def _rank(case: Case) -> int:
    if case.source == "predicted":
        return 1
    return 0 if case.device == "cuda" or case.kind == "fit" else 2


def _network(case: Case) -> str:
    shared = (case.model, case.autocast, case.dtype, case.input_shape, _model_options(case))
    return json.dumps(shared, sort_keys=True)


def _model_options(case: Case) -> dict[str, object]:
    return {k: v for k, v in case.options.items() if k not in ("capacity_gib", "largest_batch")}


def _image_bytes(case: Case) -> int:
    itemsize = {"float64": 8, "float16": 2, "bfloat16": 2}.get(case.dtype, 4)
    return itemsize * math.prod(case.input_shape)
