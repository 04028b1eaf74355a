"""The picture at the top: activation memory against throughput, one point a contender."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter
from matplotlib.transforms import Bbox

from densebench.report.comparison_tables import main_table
from densebench.report.drawing import (
    WIDE,
    Canvas,
    Picture,
    canvas,
    draw,
    memory_ticks,
    name_axes,
    plain,
    round_step,
)
from densebench.report.labels import MARKER, Label, place_labels
from densebench.report.selection import Comparison, Row
from densebench.report.style import GRID, MUTED
from densebench.report.units import memory, number

TITLE = "Activation memory against throughput"
_CORNER = "less memory, faster than naive"


def answer_picture(comparison: Comparison) -> Picture | None:
    """The picture of one comparison; None with fewer than two points."""
    rows = _points(comparison)
    if len(rows) < 2:
        return None
    described = "; ".join(
        f"{row.label} {memory(_memory(row), comparison.unit)} at {number(row.record.throughput_img_s or 0)} "
        "images a second"
        for row in rows
    )
    alt = f"{TITLE}. {comparison.title}. {described}."
    return draw(
        "answer", alt, _caption(comparison), main_table(comparison), lambda width: paint_answer(comparison, width)
    )


def _caption(comparison: Comparison) -> str:
    rows = _points(comparison)
    caption = (
        "One point a contender: further down needs less memory, further right is faster; thin lines span q1 to q3."
    )
    if len(_front(rows)) > 1:
        caption += " The line joins those that none beats at both."
    if any(row.family == "strategy" and row is not comparison.naive for row in rows):
        caption += " The shaded corner beats naive at both."
    if any(row.family == "yardstick" for row in rows):
        caption += " Hollow: another network on the same images."
    for row in rows:
        if row.record.status == "incorrect":
            caption += f" Incorrect: {row.name}, {row.record.reason or 'for reasons not recorded'}."
    absent = [row.name for row in comparison.rows if row.record.status == "oom"]
    if absent:
        caption += f" Not shown, because it did not fit in memory: {', '.join(absent)}."
    return caption


def paint_answer(comparison: Comparison, width: float = WIDE) -> Canvas:
    """Draw the picture; its labels are the texts of its axes that carry a contender's name."""
    rows = _points(comparison)
    page = canvas(TITLE, comparison.title, 4.1, width)
    axes = page.place(0.62, 0.55, 0.12)
    _limits(axes, rows)
    unit = comparison.unit
    memory_ticks(axes, unit)
    name_axes(axes, "throughput, images a second  (→ faster)", f"activation memory, {unit.name}  (↓ less)")
    axes.grid(axis="x")
    corner = _shade_corner(page, axes, comparison)
    path = [(_speed(row), _memory(row)) for row in _front(rows)]
    axes.plot(*zip(*path, strict=True), color=MUTED, linewidth=1.0, zorder=1.5) if path else None
    spans = [box for row in rows if (box := _quartiles(axes, row)) is not None]
    for row in rows:
        style = row.look.marker_style(9)
        axes.plot([_speed(row)], [_memory(row)], linestyle="", zorder=3 + row.look.strong, **style)
    place_labels(axes, _labels(axes, rows), path, avoid=[*corner, *spans])
    return page


def _front(rows: list[Row]) -> list[Row]:
    """Those of the same network that no other beats at memory and speed both, by increasing memory."""
    able = [row for row in rows if row.usable and row.family != "yardstick"]
    front = [
        row
        for row in able
        if not any(_memory(o) <= _memory(row) and _speed(o) >= _speed(row) and o is not row for o in able)
    ]
    return sorted(front, key=_memory)


def _labels(axes: Axes, rows: list[Row]) -> list[Label]:
    """A label for each point; of peers that lie on one another one for all, at the last."""
    reach = 2 * MARKER * axes.figure.dpi / 72
    groups: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: (not row.look.strong, _speed(row))):
        x, y = _pixels(axes, row)
        last = _pixels(axes, groups[-1][-1]) if groups and not row.look.strong else None
        if last is not None and not groups[-1][-1].look.strong and abs(x - last[0]) < reach > abs(y - last[1]):
            groups[-1].append(row)
        else:
            groups.append([row])
    return [
        Label(_speed(at[-1]), _memory(at[-1]), ", ".join(row.label for row in at), at[-1].look.strong)
        for at in groups
    ]


def _pixels(axes: Axes, row: Row) -> tuple[float, float]:
    x, y = axes.transData.transform((_speed(row), _memory(row)))
    return float(x), float(y)


def _points(comparison: Comparison) -> list[Row]:
    return [row for row in comparison.measured if row.record.throughput_img_s is not None]


def _memory(row: Row) -> int:
    return row.record.peak_delta_bytes or 0


def _speed(row: Row) -> float:
    return row.record.throughput_img_s or 0.0


def _span(row: Row) -> tuple[float, float]:
    """Throughput at q3 and at q1."""
    timing = row.record.time_s
    return (
        (_speed(row),) * 2
        if timing is None
        else (row.record.case.batch / timing.q3, row.record.case.batch / timing.q1)
    )


def _quartiles(axes: Axes, row: Row) -> Bbox | None:
    """Draw the middle half; returns what it covers, in pixels, where it shows beside the marker."""
    low, high = _span(row)
    axes.plot([low, high], [_memory(row)] * 2, color=row.look.color, linewidth=1.2, zorder=2)
    (x0, y), (x1, _) = axes.transData.transform([(low, _memory(row)), (high, _memory(row))])
    return Bbox.from_extents(x0, y - 2, x1, y + 2) if x1 - x0 > 2 * MARKER * axes.figure.dpi / 72 else None


def _limits(axes: Axes, rows: list[Row]) -> None:
    """Memory from zero; throughput over the range that occurs, with room for labels at either end."""
    speeds = [speed for row in rows for speed in (_speed(row), *_span(row))]
    width = max(max(speeds) - min(speeds), 0.1 * max(speeds))
    low, high = max(0.0, min(speeds) - 0.25 * width), max(speeds) + 0.3 * width
    axes.set_xlim(low, high)
    axes.set_ylim(0, 1.15 * max(_memory(row) for row in rows))
    step = round_step((high - low) / 7)
    first = int(low / step) + 1
    axes.xaxis.set_major_locator(FixedLocator([step * i for i in range(first, int(high / step) + 1)]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))


def _shade_corner(page: Canvas, axes: Axes, comparison: Comparison) -> list[Bbox]:
    """Shade where a point beats naive at both memory and speed; returns what its name covers, in pixels."""
    naive = comparison.naive
    if naive is None or not naive.record.throughput_img_s or not naive.record.peak_delta_bytes:
        return []
    right = axes.get_xlim()[1]
    axes.add_patch(
        Rectangle(
            (_speed(naive), 0), right - _speed(naive), _memory(naive), color=GRID, alpha=0.45, zorder=0, lw=0
        )
    )
    start, end = (axes.transData.transform((x, 0))[0] for x in (_speed(naive), right))
    if (end - start) / page.figure.dpi < page.text_width(_CORNER, 7.5) + 0.15:
        return []
    text = axes.annotate(
        _CORNER, (1, 0), (-5, 5), xycoords="axes fraction", textcoords="offset points", ha="right", size=7.5
    )
    text.set_color(MUTED)
    return [text.get_window_extent()]
