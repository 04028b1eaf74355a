"""How large a batch fits: the answers that were traced or tried, and estimates held to the same rules.

A traced answer leaves memory to the driver and counts in what cuBLAS keeps; no peak of a step knows of these, so
they are subtracted from the card's memory before a line of peaks is drawn on to it. Without that, an estimate of
one contender would stand above the traced answer of another that needs the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from densebench.capacities import GIB
from densebench.records import Case, Record
from densebench.report.selection import device_of
from densebench.report.style import Roster, display_name

BEYOND = 100  # times the largest known batch: from there on an estimate has
DIGITS = 2  # significant digits and no more


@dataclass(frozen=True)
class Affine:
    """Peak bytes as a function of the batch: `fixed + per_image * batch`, known up to a batch of `known`."""

    fixed: float
    per_image: float
    known: int = 0

    def largest(self, capacity: int) -> int:
        """The largest batch that a capacity in bytes holds; 0 if not even one image fits."""
        return max(0, math.floor((capacity - self.fixed) / self.per_image))

    def shown(self, capacity: int) -> int:
        """The same with as many digits as it deserves so far from what is known; rounded down, so that it fits."""
        batch = self.largest(capacity)
        if batch <= BEYOND * self.known:
            return batch
        unit = 10 ** max(0, len(str(batch)) - DIGITS)
        return batch // unit * unit


@dataclass(frozen=True)
class Fit:
    """One contender: what fits by capacity in GiB, and the estimate for where nothing was tried.

    Attributes:
        tried: the answers of all runs; the first one counts.
        traced: whether they were traced, and not run.
        source: what the estimate rests on, in words.
    """

    name: str
    strategy: str
    tried: dict[int, tuple[int, ...]]
    traced: bool
    estimate: Affine | None
    source: str

    def basis(self, capacities: Iterable[int]) -> str:
        """What the figures for some capacities rest on."""
        how = "traced" if self.traced else "run"
        if not self.tried:
            return self.source
        if all(capacity in self.tried for capacity in capacities):
            return how
        words = f"{how} at {', '.join(map(str, sorted(self.tried)))} GiB"
        return f"{words}; {self.source}" if self.estimate is not None else words

    def errors(self) -> dict[int, float]:
        """By capacity: how far the estimate is from an answer that was traced or tried, as a share of it."""
        if self.estimate is None:
            return {}
        found = {gib: (self.estimate.largest(gib * GIB), own[0]) for gib, own in self.tried.items()}
        return {gib: guess / batch - 1 for gib, (guess, batch) in found.items() if batch}


def fits(members: Sequence[Record], roster: Roster) -> list[Fit]:
    """One line for each contender (and memory format) of one network and setting, in the order of the roster."""
    groups: dict[tuple[int, str, str], list[Record]] = {}
    for record in members:
        case = record.case
        name = display_name(record, roster[case.strategy].family)
        groups.setdefault((roster.rank(case.strategy), case.model, name), []).append(record)
    return [_fit(name, own) for (_, _, name), own in sorted(groups.items(), key=lambda group: group[0])]


def _fit(name: str, own: Sequence[Record]) -> Fit:
    tried: dict[int, tuple[int, ...]] = {}
    answers = [record for record in own if _is_tried(record)]
    for record in answers:
        options = record.case.options
        tried[options["capacity_gib"]] = (*tried.get(options["capacity_gib"], ()), options["largest_batch"])
    steps = _telling([record for record in own if record.case.kind == "step"])
    traced = all(record.case.source == "predicted" for record in answers)
    return Fit(name, own[0].case.strategy, tried, traced, affine(steps), _source(steps))


def _telling(steps: Sequence[Record]) -> list[Record]:
    """The steps to estimate from: of one source, device and run, those that come nearest to a GPU's answer.

    What ran on a GPU, else what was predicted, else what ran on a CPU; of these the run with the largest batch.
    """
    places: dict[tuple[int, str, str], list[Record]] = {}
    for record in steps:
        places.setdefault((_rank(record.case), record.run, device_of(record)), []).append(record)
    if not places:
        return []
    return places[min(places, key=lambda place: (place[0], -max(r.case.batch for r in places[place])))]


def affine(records: Sequence[Record]) -> Affine | None:
    """Memory that a card needs against batch, from steps of one contender that differ in the batch alone.

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
    peak = (last.peak_allocated_bytes or 0) + _on_top(last.case)
    return Affine(peak - slope * last.case.batch, slope, last.case.batch) if slope > 0 else None


def driver_bytes() -> int:
    """What traced answers leave to the driver."""
    from densebench.prediction.cuda import CONTEXT_BYTES  # imports torch: seconds

    return CONTEXT_BYTES


def workspace_bytes() -> int:
    """What traced answers count in for cuBLAS in a training step."""
    from densebench.prediction.cuda import cublas_bytes

    return cublas_bytes(None, "train")


def _on_top(case: Case) -> int:
    """What a card needs beyond a step's peak; where the step ran on a GPU, its peak holds the workspaces."""
    held = case.source == "measured" and case.device == "cuda"
    return driver_bytes() + (0 if held else workspace_bytes())


def _source(steps: Sequence[Record]) -> str:
    if not steps:
        return ""
    batches = sorted({record.case.batch for record in steps})
    batch = f"batch {' and '.join(map(str, dict.fromkeys([batches[0], batches[-1]])))}"
    case = steps[0].case
    if case.source == "predicted":
        return f"{batch}, predicted"
    return f"{batch} on {'a CPU' if case.device == 'cpu' else device_of(steps[0])}"


def _is_tried(record: Record) -> bool:
    options = record.case.options
    numbers = (options.get("capacity_gib"), options.get("largest_batch"))
    return record.case.kind == "fit" and all(isinstance(number, int) for number in numbers)


def _rank(case: Case) -> int:
    if case.source == "predicted":
        return 1
    return 0 if case.device == "cuda" else 2


def _image_bytes(case: Case) -> int:
    itemsize = {"float64": 8, "float16": 2, "bfloat16": 2}.get(case.dtype, 4)
    return itemsize * math.prod(case.input_shape)
