"""Activation memory against the depth of a dense block, and the exponents of its growth."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from densebench.report.drawing import (
    WIDTH,
    Picture,
    canvas,
    draw,
    log2_ticks,
    memory_ticks,
    name_axes,
    place,
    text_width,
)
from densebench.report.labels import spread
from densebench.report.selection import DepthCurve
from densebench.report.style import INK
from densebench.report.tables import Column, Table, build
from densebench.report.units import Unit, memory_unit, number

TITLE = "Activation memory against depth"


def exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """The p of bytes ~ depth^p: the slope of a least-squares line through the logarithms.

    None with fewer than two depths.
    """
    if len({depth for depth, _ in points}) < 2:
        return None
    xs = [math.log(depth) for depth, _ in points]
    ys = [math.log(value) for _, value in points]
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    above = sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True))
    return above / sum((x - x_mean) ** 2 for x in xs)


def fitted(curves: Sequence[DepthCurve]) -> dict[str, float]:
    """The exponent of each contender, from what was measured; of what was predicted where nothing was."""
    found: dict[str, float] = {}
    for curve in sorted(curves, key=lambda curve: curve.source == "measured"):
        power = exponent(curve.points)
        if power is not None:
            found[curve.name] = power
    return found


def depth_picture(curves: Sequence[DepthCurve], setting: str) -> Picture:
    """The picture of all curves; `setting` says what they share."""
    powers = fitted(curves)
    grows = "; ".join(f"{name} as depth to the power {power:.2f}" for name, power in powers.items())
    both = len({curve.source for curve in curves}) > 1
    caption = "Left from zero, right with both axes logarithmic, where the slope is the exponent."
    if both:
        caption += " Markers are measured, lines predicted."
    alt = f"{TITLE}. {setting}. Growth: {grows}."
    return draw("depth", alt, caption, depth_table(curves), lambda: paint_depth(curves, setting))


def paint_depth(curves: Sequence[DepthCurve], setting: str) -> Figure:
    """Draw the curves twice: how much it is, and how it grows."""
    figure = canvas(TITLE, setting, 3.9)
    powers = fitted(curves)
    names = list(dict.fromkeys(curve.name for curve in curves))
    texts = {name: f"{name}: {powers[name]:.2f}" if name in powers else name for name in names}
    margin = max(text_width(figure, text, 8.5, "bold") for text in texts.values()) + 0.3
    gap, left = 0.75, 0.62
    half = (WIDTH - left - margin - gap) / 2
    linear = place(figure, left, 0.55, WIDTH - left - half)
    logarithmic = place(figure, left + half + gap, 0.55, margin)
    unit = memory_unit(bytes for curve in curves for _, bytes in curve.points)
    depths = sorted({depth for curve in curves for depth, _ in curve.points})
    for axes in (linear, logarithmic):
        _plot(axes, curves)
        log2_ticks(axes, depths)
    memory_ticks(linear, unit)
    name_axes(linear, "layers of the block", f"activation memory, {unit.name}")
    _decades(logarithmic, unit)
    name_axes(logarithmic, "layers of the block", "the same, logarithmic")
    _name_ends(logarithmic, curves, texts)
    return figure


def depth_table(curves: Sequence[DepthCurve]) -> Table:
    """Bytes by contender and depth, and the exponent."""
    unit = memory_unit(bytes for curve in curves for _, bytes in curve.points)
    depths = sorted({depth for curve in curves for depth, _ in curve.points})

    def column(depth: int) -> Column[DepthCurve]:
        return Column(
            f"{depth} layers, {unit.name}",
            lambda curve: unit.of(dict(curve.points)[depth]) if depth in dict(curve.points) else None,
        )

    def power(curve: DepthCurve) -> str | None:
        value = exponent(curve.points)
        return None if value is None else f"{value:.2f}"

    columns = [
        Column[DepthCurve]("contender", lambda curve: curve.name, numeric=False),
        Column[DepthCurve]("source", lambda curve: curve.source, numeric=False),
        *(column(depth) for depth in depths),
        Column[DepthCurve]("exponent", power),
    ]
    return build(TITLE, columns, curves)


def _plot(axes: Axes, curves: Sequence[DepthCurve]) -> None:
    sources = {(curve.name, curve.source) for curve in curves}
    for curve in curves:
        style = curve.look.line_style()
        if curve.source == "measured" and (curve.name, "predicted") in sources:
            style["linestyle"] = ""
        if curve.source == "predicted" and (curve.name, "measured") in sources:
            style["marker"] = ""
        axes.plot(*zip(*curve.points, strict=True), **style)


def _decades(axes: Axes, unit: Unit) -> None:
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    ticks = [factor * 10.0**power * unit.bytes for power in range(-3, 7) for factor in (1, 2, 5)]
    axes.yaxis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value / unit.bytes, 1)))


def _name_ends(axes: Axes, curves: Sequence[DepthCurve], texts: dict[str, str]) -> None:
    """Name each curve at its right end, with its exponent; names make room for each other."""
    ends = {curve.name: curve for curve in curves}
    figure = axes.figure
    assert isinstance(figure, Figure)
    scale = 72 / figure.dpi
    box = axes.get_window_extent()
    wanted = [(axes.transData.transform(curve.points[-1])[1] - box.y0) * scale for curve in ends.values()]
    heights = spread(wanted, 12.5, 0, box.height * scale)
    axes.annotate(
        "contender: exponent",
        (1, 1),
        (10, 7),
        xycoords="axes fraction",
        textcoords="offset points",
        size=7.5,
    )
    for curve, at, height in zip(ends.values(), wanted, heights, strict=True):
        axes.annotate(
            texts[curve.name],
            (1, at / (box.height * scale)),
            (10, height - at),
            xycoords="axes fraction",
            textcoords="offset points",
            va="center",
            color=INK,
            weight="bold" if curve.look.strong else "normal",
            arrowprops={
                "arrowstyle": "-",
                "color": curve.look.color,
                "linewidth": 0.8,
                "shrinkA": 1,
                "shrinkB": 0,
                "relpos": (0, 0.5),
            },
        )
