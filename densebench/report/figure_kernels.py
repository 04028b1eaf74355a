"""Kernels in one picture: how near each comes to the device's ceiling, and its time against eager."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from densebench.report.drawing import WIDE, Canvas, Picture, canvas, draw
from densebench.report.kernels import BASELINE, Operator, Run, overview_table
from densebench.report.style import BLACK, GREEN, INK, MUTED, ORANGE, PURPLE, SKY_BLUE, Look
from densebench.report.units import CROSS, times

TITLE = "Kernels against ceilings and eager"
_ROW, _HEAD = 0.21, 0.26  # inches: of one contender, of an operator's name
Line = tuple[Operator, str | None]  # None: the line that names the operator

# Ours and eager look as the fused and the naive strategy do: it is the same code that runs.
_LOOKS = {
    "ours": Look(GREEN, "D", strong=True),
    BASELINE: Look(BLACK, "o"),
    "compiled": Look(SKY_BLUE, "p"),
    "cudnn": Look(PURPLE, "s"),
}
_OTHER = Look(ORANGE, "h")


def kernels_picture(operators: Sequence[Operator]) -> Picture | None:
    """The picture of some operators; None if nothing is known beyond their times."""
    runs = [run for operator in operators for run in operator.runs]
    if all(run.roof_share is None and run.ratio is None for run in runs):
        return None
    words = []
    for operator in operators:
        ratios = [run.ratio for run in operator.by("ours") if run.ratio is not None]
        if ratios:
            words.append(f"{operator.name}, ours: {times(statistics.median(ratios))} the time of eager")
    alt = f"{TITLE}. {_setting(operators)}. Medians over the shapes: {'; '.join(words) or 'no ratio known'}."
    caption = (
        "One point a shape, a bar at the median. Left: the time that the measured copy and matmul rates allow "
        "over the time taken; further right is better. Right: time over that of eager; further left is faster."
    )
    table = overview_table(operators)
    return draw("kernels", alt, caption, table, lambda width: paint_kernels(operators, width))


def paint_kernels(operators: Sequence[Operator], width: float = WIDE) -> Canvas:
    """Draw one line a contender under the name of its operator, in two panels."""
    lines: list[Line] = []
    for operator in operators:
        lines += [(operator, None), *((operator, name) for name in operator.contenders)]
    panel = 0.85 + _ROW * len(lines)
    stacked = width < WIDE
    page = canvas(TITLE, _setting(operators), 2 * panel if stacked else panel, width)
    names = 0.25 + max(page.text_width(name or "", 8.5, "bold") for _, name in lines)
    inner = width - names - 0.25
    half = inner if stacked else (inner - 0.35) / 2
    roof = page.place(names, 0.5 + (panel if stacked else 0), width - names - half)
    ratio = page.place(width - 0.25 - half, 0.5, 0.25, 0.4 + (panel if stacked else 0))
    for axes in (roof, ratio):
        _frame(axes, len(lines))
    _names(roof, lines)
    if stacked:
        _names(ratio, lines)
    _points(roof, lines, lambda run: run.roof_share)
    _points(ratio, lines, lambda run: run.ratio)
    _scales(roof, ratio)
    return page


def _scales(roof: Axes, ratio: Axes) -> None:
    roof.set_xlim(0, max(1.05, roof.get_xlim()[1]))
    roof.axvline(1, color=MUTED, linewidth=0.8)
    roof.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
    roof.set_xlabel("of the nearer ceiling  (→ better)")
    ratio.set_xlim(0, max(1.15, 1.05 * ratio.get_xlim()[1]))
    ratio.axvline(1, color=MUTED, linewidth=0.8)
    ratio.xaxis.set_major_locator(MaxNLocator(5))
    ratio.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}{CROSS}"))
    ratio.set_xlabel("time against eager  (← faster)")


def _frame(axes: Axes, lines: int) -> None:
    axes.set_ylim(lines - 0.4, -0.6)
    axes.set_yticks([])
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)


def _names(axes: Axes, lines: Sequence[Line]) -> None:
    for at, (operator, name) in enumerate(lines):
        weight = "bold" if name in (None, "ours") else "normal"
        axes.annotate(
            operator.name if name is None else name,
            (0, at),
            (0, 0) if name is None else (-6, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="left" if name is None else "right",
            va="center",
            color=MUTED if name is None else INK,
            weight=weight,
            zorder=5,
        )


def _points(axes: Axes, lines: Sequence[Line], value: Callable[[Run], float | None]) -> None:
    for at, (operator, name) in enumerate(lines):
        if name is None:
            continue
        found = [v for run in operator.by(name) if (v := value(run)) is not None]
        if not found:
            continue
        look = _LOOKS.get(name, _OTHER)
        axes.plot(found, [at] * len(found), linestyle="", alpha=0.75, **look.marker_style(7))
        axes.plot([statistics.median(found)] * 2, [at - 0.38, at + 0.38], color=MUTED, linewidth=1.4, zorder=1.5)


def _setting(operators: Sequence[Operator]) -> str:
    return "; ".join(dict.fromkeys(operator.setting for operator in operators))
