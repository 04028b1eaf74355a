"""Bars: activation memory and time of each contender of one comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from densebench.report.answer import SPEED_WORDS
from densebench.report.comparison_tables import main_table
from densebench.report.drawing import WIDE, Canvas, Picture, canvas, draw, text_width
from densebench.report.selection import Comparison, Row
from densebench.report.style import INK, MUTED, PAPER
from densebench.report.units import STATUS_WORDS, duration, memory, times

TITLE = "Activation memory and time of a step"
_ROW = 0.27  # inches
_NAME, _SMALL = 8.5, 8.0  # points


def strategies_picture(comparison: Comparison, name: str) -> Picture | None:
    """The picture of one comparison; None if nothing in it has a figure."""
    if not comparison.measured and not comparison.timed:
        return None
    described = "; ".join(
        f"{row.label} {_memory_text(row, comparison)}, {_time_text(row, comparison)}" for row in comparison.rows
    )
    alt = f"{TITLE}. {comparison.title}. {described}."
    caption = "Lower is better in both. Thin lines span the middle half of the times, q1 to q3."
    return draw(name, alt, caption, main_table(comparison), lambda width: paint_strategies(comparison, width))


def paint_strategies(comparison: Comparison, width: float = WIDE) -> Canvas:
    """Draw one row a contender: memory on the left and time on the right, or where narrow beneath."""
    rows = comparison.rows
    timed = bool(comparison.timed)
    panel = 0.5 + _ROW * len(rows)
    stacked = timed and width < WIDE
    page = canvas(TITLE, comparison.title, 2 * panel if stacked else panel, width)
    names = max(page.text_width(row.name, _NAME, _weight(row)) for row in rows) + 0.2
    inner = width - names - 0.1
    half = 0.44 * inner if timed and not stacked else inner
    memory = page.place(names, 0.12 + (panel if stacked else 0), 0.1 + inner - half, top=0.36)
    _frame(memory, len(rows), "activation memory  (← less)")
    _names(memory, rows)
    _memory_bars(memory, comparison)
    if timed:
        time = page.place(names + inner - half + (0 if stacked else 0.1), 0.12, 0.0, 0.36 + panel * stacked)
        _frame(time, len(rows), "time, median  (← faster)")
        _time_bars(time, comparison)
        if stacked:
            _names(time, rows)
    return page


def _names(axes: Axes, rows: Sequence[Row]) -> None:
    for at, row in enumerate(rows):
        axes.annotate(
            row.name,
            (0, at),
            (-6, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            va="center",
            size=_NAME,
            weight=_weight(row),
            color=INK,
        )


def _memory_bars(axes: Axes, comparison: Comparison) -> None:
    limit = device_memory(comparison)
    failed = any(row.record.status == "oom" for row in comparison.rows)
    texts = [_memory_text(row, comparison) for row in comparison.rows]
    ends = [
        float(limit if row.record.status == "oom" and limit else row.record.peak_delta_bytes or 0)
        for row in comparison.rows
    ]
    _fit(axes, ends, texts)
    if failed and limit:
        axes.axvline(limit, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)), zorder=1)
    for at, row in enumerate(comparison.rows):
        if row.record.peak_delta_bytes is not None:
            axes.barh(at, ends[at], zorder=2, **_bar(row))
        elif limit and ends[at]:
            axes.plot([limit], [at], marker="x", color=row.look.color, markersize=6, markeredgewidth=1.6)
        _write(axes, ends[at], at, texts[at], row is comparison.naive)


def _time_bars(axes: Axes, comparison: Comparison) -> None:
    texts = [_time_text(row, comparison) for row in comparison.rows]
    ends = [0.0 if row.record.time_s is None else row.record.time_s.q3 for row in comparison.rows]
    _fit(axes, ends, texts)
    for at, row in enumerate(comparison.rows):
        timing = row.record.time_s
        if timing is not None:
            axes.barh(at, timing.median, zorder=2, **_bar(row))
            span = [timing.q1, timing.q3]
            axes.plot(span, [at, at], color=INK, linewidth=1.1, solid_capstyle="butt", zorder=3)
        _write(axes, ends[at], at, texts[at], row is comparison.naive)


def device_memory(comparison: Comparison) -> int | None:
    """Bytes of the GPU that a comparison ran on; None on a CPU."""
    for row in comparison.rows:
        gpu = row.record.environment.get("gpu")
        if isinstance(gpu, dict) and isinstance(gpu.get("memory_bytes"), int):
            return int(gpu["memory_bytes"])
    return None


def _memory_text(row: Row, comparison: Comparison) -> str:
    if row.record.peak_delta_bytes is None:
        return STATUS_WORDS.get(row.record.status, row.record.status)
    words = [memory(row.record.peak_delta_bytes, comparison.unit)]
    if row.memory_ratio is not None and row is not comparison.naive:
        words.append(times(row.memory_ratio))
    if row.record.status != "ok":
        words.append(STATUS_WORDS.get(row.record.status, row.record.status))
    return "  ".join(words)


def _time_text(row: Row, comparison: Comparison) -> str:
    if row.record.time_s is None:
        return "" if row.record.peak_delta_bytes is None else "not timed"
    time = duration(row.record.time_s.median)
    if row is comparison.naive or row.time_ratio is None:
        return time
    if not row.usable:  # what computes something else is neither faster nor slower
        return f"{time}  {times(row.time_ratio.median)} {STATUS_WORDS.get(row.record.status, row.record.status)}"
    return f"{time}  {times(row.time_ratio.median)} {SPEED_WORDS[row.time_ratio.verdict]}"


def _fit(axes: Axes, ends: list[float], texts: list[str]) -> None:
    """Scale the axis from zero so that every bar leaves room for the text behind it."""
    figure = axes.figure
    assert isinstance(figure, Figure)
    room = axes.get_window_extent().width / figure.dpi
    scales = [
        end / max(room - text_width(figure, text, _SMALL, "bold") - 0.12, 0.15 * room)
        for end, text in zip(ends, texts, strict=True)
    ]
    axes.set_xlim(0, room * (max(scales) or 1))


def _write(axes: Axes, x: float, at: int, text: str, strong: bool) -> None:
    axes.annotate(
        text,
        (x, at),
        (5, 0),
        textcoords="offset points",
        va="center",
        size=_SMALL,
        color=INK,
        weight="bold" if strong else "normal",
        bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1},  # keeps the limit line off the text
        zorder=4,
    )


def _bar(row: Row) -> dict[str, Any]:
    """Strategies are solid, what people use instead is paler, other networks are outlines."""
    if row.look.hollow:
        return {"height": 0.56, "facecolor": PAPER, "edgecolor": row.look.color, "linewidth": 1.0}
    return {"height": 0.62, "color": row.look.color, "alpha": 1.0 if row.look.strong else 0.55, "linewidth": 0}


def _frame(axes: Axes, rows: int, title: str) -> None:
    axes.set_ylim(rows - 0.45, -0.55)
    axes.set_yticks([])
    axes.set_xticks([])
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    axes.annotate(title, (0, 1), (0, 4), xycoords="axes fraction", textcoords="offset points", color=MUTED)


def _weight(row: Row) -> str:
    return "bold" if row.look.strong else "normal"
