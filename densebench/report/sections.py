"""The measured part of the report, section by section; each says 'not run' where it has no records."""

from __future__ import annotations

from collections.abc import Sequence

from densebench.report.answer import SPEED_WORDS, best
from densebench.report.blocks import Block, Folded, Plot, Prose, Section, Sheet
from densebench.report.comparison_tables import batch_table, extra_table, main_table, predicted_table
from densebench.report.figure_batch import batch_picture
from densebench.report.figure_depth import depth_picture, depth_table, fitted
from densebench.report.figure_prediction import both, prediction_picture
from densebench.report.figure_strategies import strategies_picture
from densebench.report.figure_timeline import timeline_picture, timeline_table
from densebench.report.selection import (
    Comparison,
    DepthGroup,
    ladders,
)
from densebench.report.units import MODES, memory, percent, setting_words, times
from densebench.results import Record

NOT_RUN = "Not run."


def strategies_section(comparisons: Sequence[Comparison]) -> Section:
    """Memory and time of every contender; the first comparison in full view, the others folded."""
    id, title = "strategies", "Memory and time by strategy"
    if not comparisons:
        return Section(id, title, absent=f"{NOT_RUN} No whole network was measured.")
    blocks: list[Block] = []
    for at, comparison in enumerate(comparisons):
        picture = strategies_picture(comparison, f"strategies-{at + 1}")
        shown: list[Block] = [] if picture is None else [Plot(picture)]
        extra = Folded("Every other figure that was recorded", (Sheet(extra_table(comparison)),))
        if at == 0:
            blocks += [*shown, Sheet(main_table(comparison)), extra]
        else:
            shown += [Sheet(main_table(comparison)), extra] if picture is None else [extra]
            blocks.append(Folded(f"{comparison.title} {_gist(comparison)}", tuple(shown)))
    return Section(id, title, tuple(blocks))


def _gist(comparison: Comparison) -> str:
    """The best strategy of a comparison in a few words."""
    winner = best(comparison)
    if winner is None or winner.memory_ratio is None:
        return ""
    ratio = winner.time_ratio
    time = "" if ratio is None else f", {times(ratio.median)} its time ({SPEED_WORDS[ratio.verdict]})"
    return f"— {winner.name}: {times(winner.memory_ratio)} naive's memory{time}"


def depth_section(groups: Sequence[DepthGroup]) -> Section:
    """How memory grows with the depth of a block."""
    id, title = "depth", "Memory against depth"
    if not groups:
        return Section(id, title, absent=f"{NOT_RUN} No block was measured at several depths.")
    blocks: list[Block] = []
    for at, group in enumerate(groups):
        powers = fitted(group.curves)
        grows = "; ".join(f"{name} {power:.2f}" for name, power in powers.items())
        if grows:
            blocks.append(
                Prose(
                    "Activation memory grows as a power of the depth. Least squares through the logarithms gives "
                    f"the exponents: {grows}. 1 is linear, 2 quadratic."
                )
            )
        name = "depth" if at == 0 else f"depth-{at + 1}"
        blocks.append(Plot(depth_picture(group.curves, group.setting, name)))
        blocks.append(Sheet(depth_table(group.curves)))
    return Section(id, title, tuple(blocks))


def timeline_section(records: Sequence[Record]) -> Section:
    """Memory over one step; records with a timeline that differ in the strategy alone."""
    id, title = "timeline", "Memory over one training step"
    if not records:
        return Section(id, title, absent=f"{NOT_RUN} No memory was recorded over time.")
    case = records[0].case
    device = str(records[0].environment.get("device", case.device))
    setting = f"{MODES.get(case.mode, case.mode)}: {setting_words(case, device)}"
    picture = timeline_picture(records, setting)
    return Section(id, title, (Plot(picture), Sheet(timeline_table(records))))


def predicted_section(predicted: Sequence[Comparison]) -> Section:
    """Sizes that were not run."""
    id, title = "predicted", "Predicted at full size"
    if not predicted:
        return Section(id, title, absent=f"{NOT_RUN} Nothing was predicted in these records.")
    blocks: list[Block] = [
        Prose(
            "Predicted from the shapes of all tensors of a step, without running it. What a library allocates for "
            "itself is not in it; the section on predicted against measured peaks says how far off that is."
        )
    ]
    for comparison in predicted:
        blocks.append(Sheet(predicted_table(comparison)))
        estimate = Prose(
            "Estimated from the predicted peak, in proportion to the batch. The device's context, library workspaces "
            "and fragmentation come on top."
        )
        blocks.append(
            Folded("Largest batch for 8, 16, 24, 40 and 80 GiB", (estimate, Sheet(batch_table(comparison))))
        )
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
        return Section(id, title, absent=f"{NOT_RUN} No network was timed at more than one batch.")
    return Section(id, title, plots)


def prediction_section(comparisons: Sequence[Comparison]) -> Section:
    """How good the predictions are."""
    id, title = "prediction", "Predicted against measured peak"
    rows = both(comparisons)
    if not rows:
        return Section(id, title, absent=f"{NOT_RUN} No record has both a predicted and a measured peak.")
    picture = prediction_picture(rows)
    errors = [row.prediction_error or 0.0 for _, row in rows]
    text = (
        f"{len(rows)} cases were predicted and measured: the prediction is off by {percent(min(errors))} to "
        f"{percent(max(errors))}, and the largest measured peak was "
        f"{memory(max(row.measured_peak or 0 for _, row in rows))}."
    )
    return Section(id, title, (Prose(text), Plot(picture)))
