"""Kernels in one picture: how near each comes to the rates of PyTorch, and its time against eager."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from matplotlib.axes import Axes

from densebench.report.drawing import WIDE, Canvas, Picture, canvas, draw
from densebench.report.kernel_tables import overview_table
from densebench.report.kernel_words import probe
from densebench.report.kernels import BASELINE, Machine, Operator, Run
from densebench.report.style import BLACK, GREEN, INK, MUTED, ORANGE, PURPLE, SKY_BLUE, YELLOW, Look
from densebench.report.units import CROSS, times

TITLE = "Kernels beside PyTorch"
LEAST, MOST = 0.25, 4.0  # ratios within the axis; a single one of 12 would press all others together
MOST_SHARE = 2.0
_ROW = 0.17  # inches
_BOTTOM, _TOP = 0.5, 0.5  # of a panel: room for ticks and name of its axis
_SIZE = 8.0  # of the numbers beyond the edge
Line = tuple[Operator, str | None]  # None: the line that names the operator

# Ours and eager look as the fused and the naive strategy do: it is the same code that runs.
_LOOKS = {
    "ours": Look(GREEN, "D", strong=True),
    BASELINE: Look(BLACK, "o"),
    "compiled": Look(SKY_BLUE, "p"),
    "given_statistics": Look(ORANGE, "h"),
    "cudnn": Look(PURPLE, "s"),
}
_OTHER = Look(YELLOW, "P")


@dataclass(frozen=True)
class Scale:
    """What one of the panels shows, and its axis.

    Attributes:
        low, high: its ends; values beyond are drawn at the edge, with their numbers.
        ticks: choices of them, the finest first.
    """

    name: str
    value: Callable[[Run], float | None]
    words: Callable[[float], str]
    low: float
    high: float
    ticks: tuple[tuple[float, ...], ...]
    log: bool = False

    def values(self, line: Line) -> list[float]:
        return [value for value, _ in self.points(line)]

    def points(self, line: Line) -> list[tuple[float, bool]]:
        """The values of a line, and whether they are noisy."""
        operator, contender = line
        runs = [] if contender is None else operator.by(contender)
        return [(value, run.noisy) for run in runs if (value := self.value(run)) is not None]

    def beyond(self, line: Line) -> str:
        """The values of a line that lie beyond the ends, in words; empty if there are none."""
        values = self.values(line)
        sides = ("←", [v for v in values if v < self.low]), ("→", [v for v in values if v > self.high])
        return "  ".join(f"{arrow} {self._range(side)}" for arrow, side in sides if side)

    def _range(self, values: list[float]) -> str:
        return " to ".join(dict.fromkeys(self.words(end) for end in (min(values), max(values))))


def kernels_picture(machine: Machine, name: str = "kernels") -> Picture | None:
    """The picture of a machine's operators; None if nothing is known beyond their times."""
    if all(run.rate_share is None and run.ratio is None for run in machine.runs):
        return None
    words = []
    for operator in machine.operators:
        if ratios := operator.ratios("ours"):
            words.append(f"{machine.title(operator)}, ours: {times(statistics.median(ratios))} the time of eager")
    alt = f"{TITLE}. {machine.name}. Medians over the shapes: {'; '.join(words) or 'no ratio known'}."
    return draw(name, alt, _caption(machine), overview_table(machine), lambda width: paint_kernels(machine, width))


def _caption(machine: Machine) -> str:
    rates = f" ({known})" if (known := probe(machine)) else ""
    return (
        "One point a shape, a bar at the median. First panel: share of the rate that PyTorch's own copy or matmul "
        f"reached on this machine{rates}, whichever share is larger; further right is better. Second: time over "
        "that of eager, on a logarithmic scale; further left is faster. Arrows and numbers at the edge: what lies "
        "beyond." + (" Hollow: noisy." if any(run.noisy for run in machine.runs) else "")
    )


def paint_kernels(machine: Machine, width: float = WIDE) -> Canvas:
    """Draw one line a contender under the name of its operator, in two panels."""
    lines: list[Line] = []
    for operator in machine.operators:
        lines += [(operator, None), *((operator, name) for name in operator.contenders)]
    scales = (_share_scale(machine.runs), _ratio_scale(machine.runs))
    panel = _BOTTOM + _TOP + _ROW * len(lines)
    stacked = width < WIDE
    page = canvas(TITLE, machine.name, 2 * panel if stacked else panel, width)
    names = 0.25 + max(page.text_width(name or "", 8.5, "bold") for _, name in lines)
    # Right of each panel: the numbers of what lies beyond it, or half a tick's label.
    rooms = [
        max(0.3, 0.15 + max(page.text_width(scale.beyond(line), _SIZE) for line in lines)) for scale in scales
    ]
    gap = 0.2  # left of the second panel: half a tick's label
    half = (width - names - sum(rooms) - gap) / 2
    lefts = (names, names if stacked else names + half + rooms[0] + gap)
    for at, (scale, left, room) in enumerate(zip(scales, lefts, rooms, strict=True)):
        above = panel if stacked and at == 1 else 0.0
        below = panel if stacked and at == 0 else 0.0
        right = room if stacked else width - left - half
        axes = page.place(left, _BOTTOM + below, right, _TOP + above)
        _panel(page, axes, scale, lines)
        if stacked or at == 0:
            _names(axes, machine, lines)
    return page


def _share_scale(runs: Sequence[Run]) -> Scale:
    shares = [run.rate_share for run in runs if run.rate_share is not None]
    high = min(MOST_SHARE, max([1.0, *shares]))
    ticks = tuple(
        tuple(step * i for i in range(round(MOST_SHARE / step) + 1)) for step in (0.1, 0.2, 0.25, 0.5, 1)
    )
    return Scale("of copy or matmul rate  (→ better)", lambda run: run.rate_share, _share_words, 0.0, high, ticks)


def _share_words(value: float) -> str:
    return f"{100 * value:.0f} %"


def _ratio_scale(runs: Sequence[Run]) -> Scale:
    """From the least to the most, within bounds; around 1 in any case, or equal times would fill the panel."""
    ratios = [run.ratio for run in runs if run.ratio is not None]
    low, high = max(LEAST, min([0.8, *ratios])), min(MOST, max([1.25, *ratios]))
    ticks = (
        (0.25, 0.3, 0.4, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0),
        (0.25, 0.5, 1.0, 2.0, 4.0),
        (0.25, 1.0, 4.0),
        (1.0,),
    )
    return Scale("time against eager  (← faster)", lambda run: run.ratio, times, low, high, ticks, log=True)


def _panel(page: Canvas, axes: Axes, scale: Scale, lines: Sequence[Line]) -> None:
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.set_yticks([])
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)
    if scale.log:
        axes.set_xscale("log")
        axes.set_xlim(scale.low / 1.05, scale.high * 1.05)
    else:
        axes.set_xlim(scale.low, scale.high + 0.05)
    words = (lambda value: f"{value:g}{CROSS}") if scale.log else scale.words  # 0.5 and 1, not 0.50 and 1.00
    page.label_ticks(axes, scale.ticks, words, both=True)
    axes.axvline(1, color=MUTED, linewidth=0.8)
    axes.set_xlabel(scale.name)
    axes.annotate(
        scale.name,
        (0.5, 1),
        (0, 19),
        xycoords="axes fraction",
        textcoords="offset points",
        ha="center",
        va="bottom",
    )
    for at, line in enumerate(lines):
        if points := scale.points(line):
            _points(axes, scale, at, _LOOKS.get(line[1] or "", _OTHER), points)
        if beyond := scale.beyond(line):
            axes.annotate(
                beyond,
                (1, at),
                (5, 0),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                va="center",
                size=_SIZE,
            )


def _points(axes: Axes, scale: Scale, at: int, look: Look, points: Sequence[tuple[float, bool]]) -> None:
    """A point a value, hollow if noisy; arrows at the edge for those beyond; a bar at the median, if within."""
    values = [value for value, _ in points]
    for hollow in (True, False):
        within = [value for value, noisy in points if noisy == hollow and scale.low <= value <= scale.high]
        style = replace(look, hollow=hollow).marker_style(7)
        axes.plot(within, [at] * len(within), linestyle="", alpha=0.75, clip_on=False, **style)
    for edge, arrow, is_there in (
        (scale.low, "<", min(values) < scale.low),
        (scale.high, ">", max(values) > scale.high),
    ):
        if is_there:
            style = look.marker_style(7) | {"marker": arrow}
            axes.plot([edge], [at], linestyle="", clip_on=False, **style)
    middle = statistics.median(values)
    if scale.low <= middle <= scale.high:
        axes.plot([middle] * 2, [at - 0.4, at + 0.4], color=MUTED, linewidth=1.4, zorder=1.5)


def _names(axes: Axes, machine: Machine, lines: Sequence[Line]) -> None:
    for at, (operator, name) in enumerate(lines):
        weight = "bold" if name in (None, "ours") else "normal"
        axes.annotate(
            machine.title(operator) if name is None else name,
            (0, at),
            (0, 0) if name is None else (-8, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="left" if name is None else "right",
            va="center",
            color=MUTED if name is None else INK,
            weight=weight,
            zorder=5,
        )
