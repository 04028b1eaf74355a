"""Throughput and memory against the batch, up to where each contender runs out of memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter

from densebench.capacities import GIB
from densebench.report.drawing import (
    WIDE,
    Canvas,
    Picture,
    canvas,
    draw,
    log2_ticks,
    memory_ticks,
    name_axes,
    plain,
    round_step,
)
from densebench.report.figure_strategies import device_memory
from densebench.report.selection import Comparison, Row
from densebench.report.style import INK, MUTED
from densebench.report.tables import Column, Table, build
from densebench.report.units import CROSS, MODES, memory_unit, number, setting_words

TITLE = "Throughput and memory against batch"
Value = Callable[[Row], float | None]


def batch_picture(ladder: Sequence[Comparison], name: str) -> Picture | None:
    """The picture of comparisons that differ in the batch alone; None if none of them has a throughput."""
    if not any(comparison.timed for comparison in ladder):
        return None
    failures = first_failures(ladder)
    alt = f"{TITLE}. {_setting(ladder)}. " + "; ".join(
        f"{contender} does not fit at batch {batch}" for contender, (batch, _) in failures.items()
    )
    caption = "Each line ends where its contender was last run."
    if failures:
        caption += (
            " A cross stands at the first batch that did not fit: at no throughput, and at the memory limit."
        )
    return draw(name, alt, caption, batch_table(ladder), lambda width: paint_batches(ladder, width))


def paint_batches(ladder: Sequence[Comparison], width: float = WIDE) -> Canvas:
    """Draw throughput above memory, over one axis of batches; the key beside them, or beneath where narrow."""
    rows = {row.label: row for comparison in ladder for row in comparison.timed}
    failures = first_failures(ladder)
    handles = _key(list(rows.values()), bool(failures))
    beneath = 0.2 * -(-len(handles) // 2) + 0.1 if width < WIDE else 0.0
    page = canvas(TITLE, _setting(ladder), 5.4 + beneath, width)
    right = 0.25 if beneath else 0.62 + max(page.text_width(name, 8.5, "bold") for name in rows)
    upper = page.place(0.62, 3.1 + beneath, right)
    lower = page.place(0.62, 0.5 + beneath, right, top=2.75)
    _lines(upper, ladder, lambda row: row.record.throughput_img_s)
    _lines(lower, ladder, lambda row: row.record.peak_allocated_bytes)
    for axes in (upper, lower):
        log2_ticks(axes, [comparison.case.batch for comparison in ladder])
    _scale_throughput(upper, failures)
    _scale_memory(lower, ladder, failures)
    _draw_key(page, upper, handles, beneath)
    return page


def _scale_throughput(axes: Axes, failures: dict[str, tuple[int, Row]]) -> None:
    axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
    step = round_step(axes.get_ylim()[1] / 5)
    axes.yaxis.set_major_locator(FixedLocator([step * i for i in range(6)]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
    axes.set_xticklabels([])
    name_axes(axes, y="throughput, images a second  (↑ faster)")
    _crosses(axes, failures, 0)


def _scale_memory(axes: Axes, ladder: Sequence[Comparison], failures: dict[str, tuple[int, Row]]) -> None:
    """Memory from zero, with the device's limit where it was met or is near."""
    limit = max((device_memory(comparison) or 0 for comparison in ladder), default=0)
    peaks = [row.record.peak_allocated_bytes or 0 for comparison in ladder for row in comparison.rows]
    top = max([*peaks, limit if failures else 0])
    axes.set_ylim(0, 1.12 * top)
    unit = memory_unit([top])
    memory_ticks(axes, unit)
    name_axes(axes, "batch, images", f"peak memory, {unit.name}  (↓ less)")
    if not limit or limit > axes.get_ylim()[1]:
        return
    axes.axhline(limit, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
    text = f"{number(limit / GIB)} GiB: the device's memory"
    axes.annotate(
        text, (0, limit), (3, 3), xycoords=("axes fraction", "data"), textcoords="offset points", size=7.5
    )
    _crosses(axes, failures, limit)


def first_failures(ladder: Sequence[Comparison]) -> dict[str, tuple[int, Row]]:
    """The smallest batch at which each contender ran out of memory, by its name."""
    found: dict[str, tuple[int, Row]] = {}
    for comparison in ladder:
        for row in comparison.rows:
            if row.record.status == "oom":
                found.setdefault(row.name, (comparison.case.batch, row))
    return found


def batch_table(ladder: Sequence[Comparison]) -> Table:
    """Throughput by contender and batch."""
    names = list(dict.fromkeys(row.name for comparison in ladder for row in comparison.rows))

    def column(comparison: Comparison) -> Column[str]:
        def cell(name: str) -> str | None:
            row = next((row for row in comparison.rows if row.name == name), None)
            if row is None:
                return None
            speed = row.record.throughput_img_s
            return number(speed) if speed is not None else _why_not(row)

        return Column(f"img/s at batch {comparison.case.batch}", cell)

    columns = [Column[str]("contender", lambda name: name, numeric=False), *map(column, ladder)]
    return build(f"Throughput against batch. {_setting(ladder)}", columns, names)


def _why_not(row: Row) -> str | None:
    return "does not fit" if row.record.status == "oom" else row.record.status


def _setting(ladder: Sequence[Comparison]) -> str:
    first = ladder[0]
    words = setting_words(first.case, first.device, with_batch=False)
    return f"{MODES.get(first.case.mode, first.case.mode)}: {words}"


def _lines(axes: Axes, ladder: Sequence[Comparison], value: Value) -> None:
    points: dict[str, list[tuple[int, float]]] = {}
    rows: dict[str, Row] = {}
    for comparison in ladder:
        for row in comparison.rows:
            found = value(row)
            if found is not None:
                points.setdefault(row.name, []).append((comparison.case.batch, found))
                rows[row.name] = row
    for name, series in points.items():
        axes.plot(*zip(*series, strict=True), zorder=2 + rows[name].look.strong, **rows[name].look.line_style())


def _crosses(axes: Axes, failures: dict[str, tuple[int, Row]], height: float) -> None:
    """Crosses at one height; those of the same batch stand side by side."""
    batches = [batch for batch, _ in failures.values()]
    before: Counter[int] = Counter()
    for batch, row in failures.values():
        offset = 10 * (before[batch] - (batches.count(batch) - 1) / 2)
        before[batch] += 1
        axes.annotate(
            CROSS,
            (batch, height),
            (offset, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            size=12,
            weight="bold",
            color=row.look.color,
            annotation_clip=False,
            zorder=6,
        )


def _key(rows: list[Row], failed: bool) -> list[Line2D]:
    handles = [Line2D([], [], label=row.label, **row.look.line_style()) for row in rows]
    if failed:
        cross: dict[str, Any] = {"color": MUTED, "linestyle": "", "marker": "x", "markeredgewidth": 1.8}
        handles.append(Line2D([], [], label="did not fit", **cross))
    return handles


def _draw_key(page: Canvas, axes: Axes, handles: list[Line2D], beneath: float) -> None:
    """The key: beside the upper axes, or where the screen is narrow in two columns under everything."""
    shared: dict[str, Any] = {
        "handles": handles,
        "frameon": False,
        "handlelength": 2.4,
        "borderpad": 0,
        "labelspacing": 0.55,
    }
    if beneath:
        page.figure.legend(
            **shared, loc="lower left", ncols=2, bbox_to_anchor=(0.06 / page.width, 0), fontsize=8, columnspacing=1
        )
        return
    axes.legend(**shared, loc="upper left", bbox_to_anchor=(1.03, 1.02), labelcolor=INK)
