"""Live memory over one training step by category, one panel a strategy, all on one scale."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from densebench.records import Record, Timeline
from densebench.report.drawing import WIDE, Canvas, Picture, canvas, draw, memory_ticks
from densebench.report.style import BLUE, INK, MUTED, ORANGE, PAPER
from densebench.report.tables import Column, Table, build
from densebench.report.units import Unit, memory, memory_unit

TITLE = "Live memory over one step, by category"
_PANEL = 1.75  # inches
CONSTANT = "parameters, gradients, buffers, input"
BANDS = {  # from the ground up; what is constant is one band
    CONSTANT: (("parameters", "gradients", "buffers", "input"), MUTED, 0.55),
    "activations kept for backward": (("activations",), BLUE, 0.75),
    "temporaries": (("temporaries",), ORANGE, 0.85),
}


def timeline_picture(records: Sequence[Record], setting: str, name: str) -> Picture:
    """The picture of the timelines of several strategies; each record has one."""
    peaks = "; ".join(f"{r.case.strategy} peaks at {memory(_peak(r)[1])}" for r in records)
    caption = (
        "Operations from left to right, all panels on one scale; the dashed line marks where forward ends. "
        "Temporaries are what is released again within forward, or made by backward."
    )
    alt = f"{TITLE}. {setting}. {peaks}."
    table = timeline_table(records, setting)
    return draw(name, alt, caption, table, lambda width: paint_timelines(records, setting, width))


def paint_timelines(records: Sequence[Record], setting: str, width: float = WIDE) -> Canvas:
    """Draw the panels, three in a row or where narrow two, on one shared y axis."""
    across = min(len(records), 3 if width == WIDE else 2)
    rows = -(-len(records) // across)
    key = 0.3 if width == WIDE else 0.66
    body = key + _PANEL * rows
    page = canvas(TITLE, setting, body, width)
    unit = memory_unit(_peak(record)[1] for record in records)
    top = 1.2 * max(_peak(record)[1] for record in records)
    left, gap = 0.62, 0.25
    span = (width - left - 0.05 - gap * (across - 1)) / across
    for at, record in enumerate(records):
        row, column = divmod(at, across)
        x = left + column * (span + gap)
        above = key + row * _PANEL + 0.3
        axes = page.place(x, body - above - 1.2, width - x - span, above)
        _panel(page, axes, record, top, unit)
        if column:
            axes.set_yticklabels([])
        else:
            axes.annotate(
                unit.name, (0, 1), (-4, 5), xycoords="axes fraction", textcoords="offset points", ha="right"
            )
    _legend(page)
    return page


def timeline_table(records: Sequence[Record], setting: str) -> Table:
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
    return build(f"Memory at the peak of the step. {setting}", columns, records)


def _panel(page: Canvas, axes: Axes, record: Record, top: float, unit: Unit) -> None:
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
    _mark_peak(page, axes, record)
    axes.set_title(record.case.strategy, loc="left", size=8.5, weight="bold", pad=4)
    axes.set_xticks([timeline.forward_end / 2, (timeline.forward_end + timeline.events[-1]) / 2])
    axes.set_xticklabels(["forward", "backward"], size=7.5)
    axes.tick_params(axis="x", length=0)
    memory_ticks(axes, unit)
    axes.set_ylim(0, top)


def _mark_peak(page: Canvas, axes: Axes, record: Record) -> None:
    """A point at the peak and its bytes beside it, clear of the panel's edge and of the line after forward."""
    timeline = _timeline(record)
    at, peak = _peak(record)
    event, last = timeline.events[at], timeline.events[-1]
    axes.plot([event], [peak], marker="o", markersize=3.5, color=INK, markeredgecolor=PAPER)
    text = memory(peak)
    span = last * (page.text_width(text, 8) + 0.06) / (axes.get_window_extent().width / page.figure.dpi)
    left_of_it = event + span > last
    if not left_of_it and event <= timeline.forward_end < event + span:
        event = timeline.forward_end
    if left_of_it and event - span < timeline.forward_end < event:
        event, left_of_it = max(0, timeline.forward_end), timeline.forward_end + span > last
    axes.annotate(
        text,
        (event, peak),
        (-4 if left_of_it else 4, 3),
        textcoords="offset points",
        ha="right" if left_of_it else "left",
        size=8,
    )


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


def _legend(page: Canvas) -> None:
    patches = [Patch(facecolor=color, alpha=alpha, label=name) for name, (_, color, alpha) in BANDS.items()]
    height = page.figure.get_size_inches()[1]
    page.figure.legend(
        handles=patches[::-1],
        loc="upper left",
        bbox_to_anchor=(-0.03 / page.width, 1 - (page.heading + 0.03) / height),
        ncols=1 if page.narrow else 3,
        frameon=False,
        fontsize=8,
        handlelength=1,
        handleheight=0.8,
        columnspacing=1.5,
        borderpad=0,
        borderaxespad=0.3,
    )
