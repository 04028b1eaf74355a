"""The frame of every figure, and its files: an SVG for the page, an SVG and a PNG to send."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import quoteattr

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from densebench.report.style import CSS_VARIABLES, MUTED, PAPER, RC
from densebench.report.tables import Table
from densebench.report.units import Unit, number

WIDE = 7.6  # inches; at 72 points an inch the page shows it half as large again
NARROW = 4.3  # for phones: the same figure laid out anew, so that its text keeps its size
_DPI = 150
_BETWEEN_TICKS = 0.1  # inches that the labels of an axis keep apart at least


@dataclass(frozen=True)
class Picture:
    """A drawn figure.

    Attributes:
        name: of its files, and prefix of its ids in the page.
        alt: what it shows, for those who cannot see it.
        caption: what to look for.
        svg: on a white ground.
        inline: the same for the page: transparent, colors as CSS variables, ids made unique.
        narrow: the same laid out for a narrow screen.
        table: its data.
    """

    name: str
    alt: str
    caption: str
    svg: str
    inline: str
    narrow: str
    png: bytes
    table: Table


@dataclass(frozen=True)
class Canvas:
    """A figure with its heading; distances are in inches, from the edges of what is beneath the heading."""

    figure: Figure
    width: float
    heading: float

    @property
    def narrow(self) -> bool:
        return self.width < WIDE

    def place(self, left: float, bottom: float, right: float, top: float = 0.4) -> Axes:
        """Axes that leave so much room on each side; `top` by default enough for the name of the y axis."""
        height = self.figure.get_size_inches()[1]
        span = (self.width - left - right) / self.width, (height - self.heading - top - bottom) / height
        return self.figure.add_axes((left / self.width, bottom / height, *span))

    def text_width(self, text: str, size: float = 8.5, weight: str = "normal") -> float:
        return text_width(self.figure, text, size, weight)

    def label_ticks(
        self, axes: Axes, choices: Sequence[Sequence[float]], words: Callable[[float], str], both: bool = False
    ) -> None:
        """Label the x axis, whose limits are final, with the first choice of ticks whose labels keep apart.

        Args:
            choices: places of ticks, the finest first; the last is taken where none keeps apart.
            both: whether to label the top, too; a reader of a tall figure sees one end of it at a time.
        """
        low, high = axes.get_xlim()
        shown = ([value for value in choice if low <= value <= high] for choice in choices)
        ticks = next((ticks for ticks in shown if self._apart(axes, ticks, words)), None)
        axes.xaxis.set_major_locator(FixedLocator(choices[-1] if ticks is None else ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: words(value)))
        axes.tick_params(axis="x", labeltop=both)

    def _apart(self, axes: Axes, ticks: Sequence[float], words: Callable[[float], str]) -> bool:
        ends = []
        for tick in ticks:
            middle = axes.transData.transform((tick, 0))[0] / self.figure.dpi
            half = (self.text_width(words(tick)) + _BETWEEN_TICKS) / 2
            ends.append((middle - half, middle + half))
        return all(one[1] <= other[0] for one, other in itertools.pairwise(ends))


Paint = Callable[[float], Canvas]


def draw(name: str, alt: str, caption: str, table: Table, paint: Paint) -> Picture:
    """Make a picture of what `paint` draws at a width in inches; the same input gives the same bytes."""
    with matplotlib.rc_context(RC):
        figure = paint(WIDE).figure
        svg = _svg(figure)
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=_DPI, facecolor=PAPER, metadata={"Software": None})
        narrow = _svg(paint(NARROW).figure)
    background = f'<rect width="100%" height="100%" fill="{PAPER}"/>'
    standalone = re.sub(r"(<svg[^>]*>)", rf"\1\n {background}", svg, count=1)
    standalone = standalone.replace("<svg", f'<svg role="img" aria-label={quoteattr(alt)}', 1)
    inline, small = _for_page(svg, name, alt, "wide"), _for_page(narrow, f"{name}-narrow", alt, "narrow")
    return Picture(name, alt, caption, standalone, inline, small, png.getvalue(), table)


def canvas(title: str, subtitle: str, body: float, width: float) -> Canvas:
    """An empty figure with a title and, in smaller type, the setting; `body` is the height beneath these."""
    figure = Figure((width, body), dpi=_DPI)
    FigureCanvasAgg(figure)
    size = 8.5 if width == WIDE else 8.0
    lines = _wrapped(figure, subtitle, size, width - 0.12)
    heading = 0.3 + 0.15 * len(lines)
    height = heading + body
    figure.set_size_inches(width, height)
    figure.text(0, 1 - 0.06 / height, title, size=10.5, weight="bold", va="top", ha="left")
    for at, line in enumerate(lines):
        y = 1 - (0.29 + 0.15 * at) / height
        figure.text(0, y, line, size=size, color=MUTED, va="top", ha="left")
    return Canvas(figure, width, heading)


def _wrapped(figure: Figure, text: str, size: float, room: float) -> list[str]:
    """A text broken at spaces into lines that fit."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and text_width(figure, longer, size) <= room:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def name_axes(axes: Axes, x: str = "", y: str = "") -> None:
    """Name the axes: x below, y above its axis, where it is read without turning the head."""
    axes.set_xlabel(x)
    if y:
        axes.annotate(
            y, (0, 1), (0, 7), xycoords="axes fraction", textcoords="offset points", ha="left", va="bottom"
        )


def memory_ticks(axes: Axes, unit: Unit) -> None:
    """Label the y axis, whose data are in bytes, in round numbers of a unit, from zero."""
    axes.set_ylim(bottom=0)
    high = axes.get_ylim()[1] / unit.bytes
    step = round_step(high / 6)
    axes.yaxis.set_major_locator(FixedLocator([i * step * unit.bytes for i in range(int(high / step) + 1)]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: plain(value / unit.bytes)))


def log2_ticks(axes: Axes, values: list[int]) -> None:
    """A logarithmic x axis to base 2 with ticks where there are measurements."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(values))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def round_step(rough: float) -> float:
    """The least of 1, 2, 2.5, 5 times a power of ten that is not below `rough`."""
    power = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))


def plain(value: float) -> str:
    """A tick's number: whole where it is whole, and else with all its digits, few as they are: 12.5."""
    return f"{value:,.0f}" if abs(value - round(value)) < 1e-9 else number(value, 6).rstrip("0")


def text_width(figure: Figure, text: str, size: float, weight: str = "normal") -> float:
    """The width of a text in inches."""
    probe = figure.text(0, 0, text, size=size, weight=weight)
    figure_canvas = figure.canvas
    assert isinstance(figure_canvas, FigureCanvasAgg)
    width = probe.get_window_extent(figure_canvas.get_renderer()).width / figure.dpi
    probe.remove()
    return float(width)


def _svg(figure: Figure) -> str:
    raw = io.BytesIO()
    figure.savefig(raw, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = raw.getvalue().decode("utf-8")
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"font-family: [^;\"]*", "font-family: 'DejaVu Sans', Verdana, sans-serif", text)
    text = re.sub(r" transform=\"rotate\(-0 [^\"]*\)\"", "", text)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    return re.sub(r"<[^>]+>", _rounded, text)


def _rounded(tag: re.Match[str]) -> str:
    """A tag with its coordinates in tenths of a point, which are plenty; texts are not in tags, and stay."""
    return re.sub(r"(\d+\.\d)\d+", r"\1", tag[0])


def _for_page(svg: str, name: str, alt: str, layout: str) -> str:
    """An SVG as part of a page: ids its own, colors from the page's variables, and a name for screen readers."""
    used = set(re.findall(r"(?:href=\"|url\()#([^\")]+)", svg))
    svg = re.sub(r"\s*<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="([^"]*)"', lambda match: f' id="{name}-{match[1]}"' if match[1] in used else "", svg)
    svg = re.sub(r"(xlink:href=\")#", rf"\1#{name}-", svg).replace("xlink:href", "href")
    svg = svg.replace("url(#", f"url(#{name}-")
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)
    for color, variable in CSS_VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    view = re.search(r'viewBox="([^"]*)"', svg)
    assert view is not None
    start = f'<svg role="img" aria-label={quoteattr(alt)} viewBox="{view[1]}" class="plot {layout}">'
    return re.sub(r"<svg[^>]*>", lambda _: start, svg, count=1)
