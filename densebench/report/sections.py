"""What was measured of whole networks and blocks, section by section; each without records says so."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from densebench.counting import counted
from densebench.records import Record
from densebench.report.agreement import predicted_steps, same_words
from densebench.report.answer import SPEED_WORDS, best
from densebench.report.blocks import Block, Folded, Plot, Prose, Section, Sheet
from densebench.report.comparison_tables import (
    extra_table,
    main_table,
    naive_table,
    predicted_table,
)
from densebench.report.depths import depth_groups
from densebench.report.figure_batch import batch_picture
from densebench.report.figure_depth import depth_picture, fitted
from densebench.report.figure_prediction import DECIMALS, both, error_of, extent, prediction_picture
from densebench.report.figure_strategies import strategies_picture
from densebench.report.figure_timeline import timeline_picture
from densebench.report.selection import Comparison, comparisons, ladders, naive_is_better
from densebench.report.sources import MAKE_SOME as COMMAND
from densebench.report.style import Roster
from densebench.report.timelines import timeline_groups
from densebench.report.units import percent, times

DEFAULT = f"{COMMAND} --densebench-profile default"
_PICTURED = 6  # comparisons with a picture; of the others the tables say enough


def strategies_section(comparisons: Sequence[Comparison]) -> Section:
    """Memory and time of every contender; the first comparison in full view, the others folded."""
    id, title = "strategies", "Memory and time by strategy"
    if not comparisons:
        return Section(id, title, absent="No whole network was measured.", command=COMMAND)
    blocks: list[Block] = [
        Prose(
            "Activation memory is the peak of one step beyond what is always there: parameters, gradients, "
            "buffers and input. Ratios of time are formed pair by pair between steps that were timed in turns."
        )
    ]
    for at, comparison in enumerate(comparisons):
        picture = strategies_picture(comparison, f"strategies-{at + 1}") if at < _PICTURED else None
        shown: Block = Sheet(main_table(comparison)) if picture is None else Plot(picture, open=True)
        extra = Sheet(extra_table(comparison))
        if at == 0:
            blocks += [shown, Folded("Every other figure that was recorded", (extra,))]
        else:
            blocks.append(Folded(f"{comparison.title}{_gist(comparison)}", (shown, extra)))
    return Section(id, title, tuple(blocks))


def _gist(comparison: Comparison) -> str:
    """The best strategy of a comparison in a few words."""
    winner = best(comparison)
    if winner is None or winner.memory_ratio is None:
        return ""
    ratio = winner.time_ratio
    time = "" if ratio is None else f", {times(ratio.median)} its time ({SPEED_WORDS[ratio.verdict]})"
    return f" — {winner.name}: {times(winner.memory_ratio)} the memory of naive{time}"


def depth_section(records: Iterable[Record], roster: Roster) -> Section:
    """How memory grows with the depth of a dense block."""
    id, title = "depth", "Memory against depth"
    blocks: list[Block] = []
    for at, group in enumerate(depth_groups(records, roster)):
        grows = "; ".join(f"{name} {power:.2f}" for name, power in fitted(group.curves).items())
        if grows:
            blocks.append(
                Prose(
                    "Activation memory grows as a power of the depth. Least squares through the logarithms gives "
                    f"the exponents: {grows}. 1 is linear, 2 quadratic."
                )
            )
        blocks.append(Plot(depth_picture(group, "depth" if at == 0 else f"depth-{at + 1}")))
        blocks += _prose(group.same)
    if not blocks:
        return Section(
            id, title, absent="No block was measured at several depths.", command=f"{COMMAND} -k memory"
        )
    return Section(id, title, tuple(blocks))


def timeline_section(records: Iterable[Record], roster: Roster) -> Section:
    """Memory over one step, by category."""
    id, title = "timeline", "Memory over one training step"
    groups = timeline_groups(records, roster)
    if not groups:
        command = f"{COMMAND} -k timeline"
        return Section(id, title, absent="No memory was recorded over time.", command=command)
    blocks: list[Block] = []
    for at, group in enumerate(groups):
        name = "timeline" if at == 0 else f"timeline-{at + 1}"
        blocks += [Plot(timeline_picture(group.members, group.setting, name)), *_prose(group.same)]
    return Section(id, title, tuple(blocks))


def _prose(text: str | None) -> list[Prose]:
    return [] if text is None else [Prose(text)]


def predicted_section(records: Sequence[Record], roster: Roster) -> Section:
    """Sizes that were not run."""
    id, title = "predicted", "Predicted at full size"
    groups = predicted_steps(records)
    predicted = comparisons([record for group in groups for record in group.members], roster, "predicted")
    if not predicted:
        command = f"{COMMAND} -k predicted"
        return Section(id, title, absent="Nothing was predicted in these records.", command=command)
    text = (
        "Predicted from the shapes of all tensors of a step, without running it. What a library allocates for "
        "itself is not in it; the section on predicted and measured peaks says how far off that is."
    )
    blocks: list[Block] = [Prose(text)]
    for comparison in predicted:
        group = next(group for group in groups if comparison.rows[0].record in group.members)
        blocks += [Sheet(predicted_table(comparison)), *_prose(same_words(group, "the figures"))]
    return Section(id, title, tuple(blocks))


def batch_section(comparisons: Sequence[Comparison]) -> Section:
    """Throughput against batch, up to where memory ends."""
    id, title = "batch", "Throughput against batch"
    pictures = [
        batch_picture(ladder, "batch" if at == 0 else f"batch-{at + 1}")
        for at, ladder in enumerate(ladders(comparisons))
    ]
    plots = tuple(Plot(picture) for picture in pictures if picture is not None)
    if not plots:
        why = "No network was timed at more than one batch; the default profile does so on a GPU."
        return Section(id, title, absent=why, command=DEFAULT)
    return Section(id, title, plots)


def prediction_section(comparisons: Sequence[Comparison]) -> Section:
    """How good the predictions are."""
    id, title = "prediction", "Predicted against measured peak"
    rows = both(comparisons)
    if not rows:
        why = "No record has both a predicted and a measured peak."
        return Section(id, title, absent=why, command=COMMAND)
    errors = [error_of(row) for _, row in rows]
    span = " to ".join(dict.fromkeys(percent(error, DECIMALS) for error in (min(errors), max(errors))))
    text = f"Both predicted and measured: {extent(rows)}. The prediction is off by {span}."
    return Section(id, title, (Prose(text), Plot(prediction_picture(rows))))


def naive_section(comparisons: Sequence[Comparison]) -> Section:
    """Where a strategy is not worth it."""
    id, title = "naive", "When naive is the better choice"
    compared = [c for c in comparisons if c.naive is not None and c.naive.record.time_s and c.strategies]
    if not compared:
        why = "Naive and a strategy were not timed together anywhere."
        return Section(id, title, absent=why, command=COMMAND)
    found = [comparison for comparison in compared if naive_is_better(comparison)]
    settings = counted(len(compared), "compared setting")
    if found:
        text = (
            f"In {len(found)} of {settings} naive fits, and every strategy is slower, or "
            "no faster and no smaller. Where memory is not what limits you, take naive there."
        )
    else:
        text = (
            f"In none of {settings}: everywhere a strategy is faster, or smaller and not found slower."
            f"{_closest(compared)}"
        )
    return Section(id, title, (Prose(text), *([Sheet(naive_table(found))] if found else [])))


def _closest(compared: Sequence[Comparison]) -> str:
    """Where the fastest strategy gains least, and what was not compared at all."""

    def gain(comparison: Comparison) -> float:
        return min((row.time_ratio.median for row in comparison.strategies if row.time_ratio), default=math.inf)

    least = max(compared, key=gain)
    batches = sorted({comparison.case.batch for comparison in compared})
    tried = " to ".join(str(batch) for batch in dict.fromkeys([batches[0], batches[-1]]))
    where = "" if any(c.case.device == "cuda" for c in compared) else ", none on a GPU"
    return f" The least gain: {times(gain(least))} naive's time, {least.title}. Batches were {tried}{where}."
