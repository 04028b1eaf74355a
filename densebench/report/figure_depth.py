"""Activation memory against the depth of a dense block, and the exponents of its growth."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from densebench.counting import counted
from densebench.report.depths import DepthCurve, DepthGroup
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
from densebench.report.labels import spread
from densebench.report.style import INK
from densebench.report.tables import Column, Table, build
from densebench.report.units import Unit, memory_unit, number

TITLE = "Activation memory against depth"
LAYERS = "dense layers"
_FEWEST = 3  # depths


def exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """The p of bytes ~ depth^p: the slope of a least-squares line through the logarithms.

    None with fewer than three depths: a line goes through any two.
    """
    if len({depth for depth, _ in points}) < _FEWEST:
        return None
    xs = [math.log(depth) for depth, _ in points]
    ys = [math.log(value) for _, value in points]
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    above = sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True))
    return above / sum((x - x_mean) ** 2 for x in xs)


def fitted(curves: Sequence[DepthCurve]) -> dict[str, float]:
    """The exponent of each contender, from what was measured; of what was predicted where nothing was.

    In the order of the curves.
    """
    found: dict[str, float] = {}
    for curve in curves:
        power = exponent(curve.points)
        if power is not None and (curve.source == "measured" or curve.name not in found):
            found[curve.name] = power
    return found


def depth_picture(group: DepthGroup, name: str) -> Picture:
    """The picture of all curves of one setting."""
    powers = fitted(group.curves)
    grows = "; ".join(f"{contender} as depth to the power {power:.2f}" for contender, power in powers.items())
    caption = (
        "First with both axes linear and from zero, then with both logarithmic: there a power of the depth is a "
        "straight line, and its slope the exponent."
    )
    if len({curve.source for curve in group.curves}) > 1:
        caption += " Markers are measured, lines predicted."
    alt = f"{TITLE}. {group.setting}. Growth: {grows}."
    return draw(name, alt, caption, depth_table(group), lambda width: paint_depth(group, width))


def paint_depth(group: DepthGroup, width: float = WIDE) -> Canvas:
    """Draw the curves twice, side by side or where narrow one above the other: how much, and how it grows."""
    curves, powers = group.curves, fitted(group.curves)
    names = list(dict.fromkeys(curve.name for curve in curves))
    texts = {name: f"{name}: {powers[name]:.2f}" if name in powers else name for name in names}
    page = canvas(TITLE, group.setting, 3.4 if width == WIDE else 6.2, width)
    margin = max(page.text_width(text, 8.5, "bold") for text in texts.values()) + 0.3
    left, gap = 0.62, 0.75
    if page.narrow:
        linear, logarithmic = page.place(left, 3.7, 0.2), page.place(left, 0.5, margin, top=3.2)
    else:
        half = (width - left - margin - gap) / 2
        linear = page.place(left, 0.5, width - left - half)
        logarithmic = page.place(left + half + gap, 0.5, margin)
    unit = memory_unit(bytes for curve in curves for _, bytes in curve.points)
    depths = sorted({depth for curve in curves for depth, _ in curve.points})
    for axes in (linear, logarithmic):
        _plot(axes, curves)
    _from_zero(linear)
    memory_ticks(linear, unit)
    log2_ticks(logarithmic, depths)
    log2_ticks(logarithmic, _apart(page, logarithmic, depths))
    name_axes(linear, LAYERS, f"activation memory, {unit.name}")
    _decades(logarithmic, unit)
    name_axes(logarithmic, LAYERS, "both axes logarithmic")
    _name_ends(logarithmic, curves, texts)
    return page


def depth_table(group: DepthGroup) -> Table:
    """Bytes by contender and depth, and the exponent."""
    curves = group.curves
    unit = memory_unit(bytes for curve in curves for _, bytes in curve.points)
    depths = sorted({depth for curve in curves for depth, _ in curve.points})

    def column(depth: int) -> Column[DepthCurve]:
        return Column(
            f"{counted(depth, 'layer')}, {unit.name}",
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
    return build(f"{TITLE}. {group.setting}", columns, curves)


def _plot(axes: Axes, curves: Sequence[DepthCurve]) -> None:
    sources = {(curve.name, curve.source) for curve in curves}
    for curve in curves:
        style = curve.look.line_style()
        if curve.source == "measured" and (curve.name, "predicted") in sources:
            style["linestyle"] = ""
        if curve.source == "predicted" and (curve.name, "measured") in sources:
            style["marker"] = ""
        axes.plot(*zip(*curve.points, strict=True), **style)


def _from_zero(axes: Axes) -> None:
    """A linear x axis from zero, in round numbers of layers: on any other one, growth in proportion is a curve."""
    axes.set_xlim(left=0)
    high = axes.get_xlim()[1]
    step = max(1.0, round_step(high / 5))
    axes.xaxis.set_major_locator(FixedLocator([step * i for i in range(int(high / step) + 1)]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))


def _apart(page: Canvas, axes: Axes, depths: Sequence[int]) -> list[int]:
    """The depths with room for their numbers on the x axis as it is, the largest first."""
    kept: list[int] = []
    edge = math.inf
    for depth in reversed(depths):
        middle = axes.transData.transform((depth, 1))[0] / page.figure.dpi
        half = page.text_width(f"{depth:,}") / 2
        if middle + half < edge:
            kept.append(depth)
            edge = middle - half - 0.06
    return kept[::-1]


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
