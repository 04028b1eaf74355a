"""Throughput and memory against the batch, up to where each contender runs out of memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter

from densebench.report.drawing import (
    Picture,
    canvas,
    draw,
    log2_ticks,
    memory_ticks,
    name_axes,
    place,
    plain,
    round_step,
    text_width,
)
from densebench.report.figure_strategies import device_memory
from densebench.report.selection import Comparison, Row
from densebench.report.style import INK, MUTED
from densebench.report.tables import Column, Table, build
from densebench.report.units import CROSS, GIB, MODES, memory_unit, number, setting_words

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
    return draw(name, alt, caption, batch_table(ladder), lambda: paint_batches(ladder))


def paint_batches(ladder: Sequence[Comparison]) -> Figure:
    """Draw throughput above memory, over one axis of batches."""
    figure = canvas(TITLE, _setting(ladder), 5.8)
    looks = {row.label: row for comparison in ladder for row in comparison.timed}
    margin = 0.55 + max(text_width(figure, name, 8.5, "bold") for name in looks)
    upper = place(figure, 0.62, 3.3, margin)
    lower = place(figure, 0.62, 0.55, margin, top=3.15)
    _lines(upper, ladder, lambda row: row.record.throughput_img_s)
    _lines(lower, ladder, lambda row: row.record.peak_allocated_bytes)
    failures = first_failures(ladder)
    limit = max((device_memory(comparison) or 0 for comparison in ladder), default=0)
    if limit:
        lower.axhline(limit, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
        text = f"{number(limit / GIB)} GiB: the device's memory"
        lower.annotate(
            text, (0, limit), (3, 3), xycoords=("axes fraction", "data"), textcoords="offset points", size=7.5
        )
    peaks = [row.record.peak_allocated_bytes or 0 for comparison in ladder for row in comparison.rows]
    top = max([*peaks, limit if failures else 0])
    upper.set_ylim(0, 1.08 * upper.get_ylim()[1])
    lower.set_ylim(0, 1.12 * top)
    _crosses(upper, failures, 0)
    if limit:
        _crosses(lower, failures, limit)
    for axes in (upper, lower):
        log2_ticks(axes, [comparison.case.batch for comparison in ladder])
    step = round_step(upper.get_ylim()[1] / 5)
    upper.yaxis.set_major_locator(FixedLocator([step * i for i in range(6)]))
    upper.yaxis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
    upper.set_xticklabels([])
    unit = memory_unit([top])
    memory_ticks(lower, unit)
    name_axes(upper, y="throughput, images a second")
    name_axes(lower, "batch, images", f"peak memory, {unit.name}")
    _key(upper, list(looks.values()), bool(failures))
    return figure


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
    beside: dict[int, int] = {}
    for batch, row in failures.values():
        place_in_line = beside[batch] = beside.get(batch, -1) + 1
        axes.annotate(
            CROSS,
            (batch, height),
            (7.0 * place_in_line, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            size=13,
            weight="bold",
            color=row.look.color,
            annotation_clip=False,
            zorder=6,
        )


def _key(axes: Axes, rows: list[Row], failed: bool) -> None:
    handles = [Line2D([], [], label=row.label, **row.look.line_style()) for row in rows]
    if failed:
        handles.append(
            Line2D([], [], label="did not fit", color=MUTED, linestyle="", marker="x", markeredgewidth=1.8)
        )
    legend = axes.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(1.03, 1.02),
        frameon=False,
        handlelength=2.4,
        borderpad=0,
        labelspacing=0.55,
    )
    for text, row in zip(legend.get_texts(), rows, strict=False):
        text.set_fontweight("bold" if row.look.strong else "normal")
        text.set_color(INK)
