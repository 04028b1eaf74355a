"""Live memory over one training step by category, one panel a strategy, all on one scale."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from densebench.report.drawing import WIDTH, Picture, canvas, draw, memory_ticks
from densebench.report.style import BLUE, INK, MUTED, ORANGE, PAPER
from densebench.report.tables import Column, Table, build
from densebench.report.units import Unit, memory, memory_unit
from densebench.results import Record, Timeline

TITLE = "Memory over one training step"
ACROSS = 3  # panels in a row
CONSTANT = "parameters, gradients, buffers, input"
BANDS = {  # from the ground up; what is constant is one band
    CONSTANT: (("parameters", "gradients", "buffers", "input"), MUTED, 0.55),
    "activations kept for backward": (("activations",), BLUE, 0.75),
    "temporaries": (("temporaries",), ORANGE, 0.85),
}


def timeline_picture(records: Sequence[Record], setting: str) -> Picture:
    """The picture of the timelines of several strategies; each record has one."""
    peaks = "; ".join(f"{r.case.strategy} peaks at {memory(_peak(r)[1])}" for r in records)
    caption = (
        "Operations from left to right, all panels on one scale; the dashed line marks where forward ends. "
        "Temporaries are what is released again within forward, or made by backward."
    )
    alt = f"{TITLE}. {setting}. {peaks}."
    table = timeline_table(records)
    return draw("timeline", alt, caption, table, lambda: paint_timelines(records, setting))


def paint_timelines(records: Sequence[Record], setting: str) -> Figure:
    """Draw the panels, at most three in a row, on one shared y axis."""
    rows = -(-len(records) // ACROSS)
    across = min(ACROSS, len(records))
    height = 1.2 + 1.75 * rows
    figure = canvas(TITLE, setting, height)
    unit = memory_unit(_peak(record)[1] for record in records)
    top = 1.2 * max(_peak(record)[1] for record in records)
    left, gap = 0.62, 0.25
    width = (WIDTH - left - 0.05 - gap * (across - 1)) / across
    for at, record in enumerate(records):
        row, column = divmod(at, across)
        bottom = height - 1.2 - 1.75 * row - 1.3
        x = left + column * (width + gap)
        axes = figure.add_axes((x / WIDTH, bottom / height, width / WIDTH, 1.3 / height))
        _panel(axes, record, top, unit)
        if column:
            axes.set_yticklabels([])
        else:
            axes.annotate(
                unit.name, (0, 1), (-4, 5), xycoords="axes fraction", textcoords="offset points", ha="right"
            )
    _legend(figure)
    return figure


def timeline_table(records: Sequence[Record]) -> Table:
    """Each strategy's memory at its peak, by category, and where the peak lies."""
    unit = memory_unit(_peak(record)[1] for record in records)

    def band(name: str) -> Column[Record]:
        return Column(f"{name}, {unit.name}", lambda record: unit.of(_bands(record)[name][_peak(record)[0]]))

    columns = [
        Column[Record]("contender", lambda record: record.case.strategy, numeric=False),
        Column[Record](f"peak, {unit.name}", lambda record: unit.of(_peak(record)[1])),
        *(band(name) for name in BANDS),
        Column[Record]("peak in", _half, numeric=False),
    ]
    return build("Memory at the peak of the step", columns, records)


def _panel(axes: Axes, record: Record, top: float, unit: Unit) -> None:
    timeline = _timeline(record)
    axes.set_xlim(0, timeline.events[-1])
    axes.set_ylim(0, top)
    ground = [0.0] * len(timeline.events)
    for name, values in _bands(record).items():
        _, color, alpha = BANDS[name]
        above = [a + b for a, b in zip(ground, values, strict=True)]
        axes.fill_between(timeline.events, ground, above, color=color, alpha=alpha, linewidth=0)
        ground = above
    axes.axvline(timeline.forward_end, color=INK, linewidth=0.8, linestyle=(0, (4, 2)))
    at, peak = _peak(record)
    axes.plot([timeline.events[at]], [peak], marker="o", markersize=3.5, color=INK, markeredgecolor=PAPER)
    late = timeline.events[at] > 0.5 * timeline.events[-1]
    axes.annotate(
        memory(peak),
        (timeline.events[at], peak),
        (-4 if late else 4, 3),
        textcoords="offset points",
        ha="right" if late else "left",
        size=8,
    )
    axes.set_title(record.case.strategy, loc="left", size=8.5, weight="bold", pad=4)
    axes.set_xticks([timeline.forward_end / 2, (timeline.forward_end + timeline.events[-1]) / 2])
    axes.set_xticklabels(["forward", "backward"], size=7.5)
    axes.tick_params(axis="x", length=0)
    memory_ticks(axes, unit)
    axes.set_ylim(0, top)


def _bands(record: Record) -> dict[str, tuple[int, ...]]:
    timeline = _timeline(record)
    empty = (0,) * len(timeline.events)
    return {
        name: tuple(map(sum, zip(*(timeline.bytes.get(c, empty) for c in categories), strict=True)))
        for name, (categories, _, _) in BANDS.items()
    }


def _peak(record: Record) -> tuple[int, int]:
    """The index of the highest point and its bytes."""
    totals = [sum(values) for values in zip(*_bands(record).values(), strict=True)]
    at = max(range(len(totals)), key=totals.__getitem__)
    return at, totals[at]


def _half(record: Record) -> str:
    timeline = _timeline(record)
    return "forward" if timeline.events[_peak(record)[0]] <= timeline.forward_end else "backward"


def _timeline(record: Record) -> Timeline:
    if record.timeline is None:
        raise ValueError("the record has no timeline")
    return record.timeline


def _legend(figure: Figure) -> None:
    patches = [Patch(facecolor=color, alpha=alpha, label=name) for name, (_, color, alpha) in BANDS.items()]
    height = figure.get_size_inches()[1]
    figure.legend(
        handles=patches[::-1],
        loc="upper left",
        bbox_to_anchor=(0.02 / WIDTH, 1 - 0.5 / height),
        ncols=3,
        frameon=False,
        fontsize=8,
        handlelength=1,
        handleheight=0.8,
        columnspacing=1.5,
        borderpad=0,
        borderaxespad=0.3,
    )
