"""How each contender looks: one color, marker and line style in every figure.

Known names have fixed looks, so that figures of different runs can be laid side by side; a new name gets the
next free combination in the order of the registry.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from densebench.records import Record
from densebench.report.units import model_name

# Okabe and Ito's palette: distinct under the common forms of color blindness.
BLACK = "#010101"  # not quite: matplotlib leaves out pure black, and then no CSS variable stands in its place
ORANGE = "#e69f00"
SKY_BLUE = "#56b4e9"
GREEN = "#009e73"
YELLOW = "#f0e442"
BLUE = "#0072b2"
VERMILLION = "#d55e00"
PURPLE = "#cc79a7"

INK = "#1f2328"
MUTED = "#59636e"
GRID = "#dde2e7"
PAPER = "#ffffff"

# Each color is a CSS variable in the page, which gives it a second value for dark screens (page.css).
CSS_VARIABLES = {
    BLACK: "--black",
    ORANGE: "--orange",
    SKY_BLUE: "--sky",
    GREEN: "--green",
    YELLOW: "--yellow",
    BLUE: "--blue",
    VERMILLION: "--vermillion",
    PURPLE: "--purple",
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    PAPER: "--paper",
}

DASHED, DOTTED, DASH_DOT = (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2))
LONG_DASHED, DASH_DOT_DOT = (0, (9, 2)), (0, (6, 2, 1, 2, 1, 2))

RC: Any = {  # rcParams; Any, because matplotlib 3.11 types its keys and older ones do not
    "font.family": "DejaVu Sans",  # comes with matplotlib, so figures are the same everywhere
    "font.size": 8.5,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "hatch.linewidth": 0.6,
    "svg.fonttype": "none",  # text stays text: it can be read aloud, searched and copied
    "svg.hashsalt": "densebench",  # the same figure is the same bytes
}


@dataclass(frozen=True)
class Look:
    """How one contender is drawn.

    Attributes:
        hollow: another network (ResNet): drawn as an outline.
        strong: a strategy of this project, as opposed to what people use instead.
    """

    color: str
    marker: str
    line: Any = "-"
    hollow: bool = False
    strong: bool = False

    def marker_style(self, size: float = 6.5) -> dict[str, Any]:
        """Keywords of matplotlib's `plot` for the marker."""
        fill = PAPER if self.hollow else self.color
        edge = self.color if self.hollow else PAPER
        size = size if self.strong else 0.85 * size
        return {
            "color": self.color,
            "marker": self.marker,
            "markersize": size,
            "markerfacecolor": fill,
            "markeredgecolor": edge,
            "markeredgewidth": 1.3 if self.hollow else 0.6,
        }

    def line_style(self) -> dict[str, Any]:
        """Keywords of matplotlib's `plot` for line and marker."""
        width = 1.8 if self.strong else 1.1
        return {**self.marker_style(5.5), "linestyle": self.line, "linewidth": width}


_FIXED = {
    "naive": Look(BLACK, "o", "-", strong=True),
    "checkpointed": Look(ORANGE, "s", DASHED, strong=True),
    "shared_buffer": Look(BLUE, "^", DASH_DOT, strong=True),
    "fused": Look(GREEN, "D", "-", strong=True),
    "fused_recompute": Look(VERMILLION, "v", LONG_DASHED, strong=True),
    "torchvision": Look(PURPLE, "p", DOTTED),
    "torchvision_checkpointed": Look(PURPLE, "<", DASHED),
    "timm": Look(PURPLE, ">", DASH_DOT),
    "monai": Look(PURPLE, "d", DASH_DOT_DOT),
    "compiled": Look(SKY_BLUE, "p", DOTTED),
    "compiled_budget": Look(SKY_BLUE, "<", DASHED),
    "offloaded": Look(SKY_BLUE, "d", DASH_DOT),
    "checkpointed_blocks": Look(SKY_BLUE, "8", LONG_DASHED),
    "eager": Look(BLACK, "s", DOTTED, hollow=True),
}
_SPARE_LINES = (DASH_DOT_DOT, LONG_DASHED)
_SPARE = {
    "strategy": [
        Look(color, marker, line, strong=True)
        for marker, line, color in product("8Ph", _SPARE_LINES, (PURPLE, SKY_BLUE, YELLOW, ORANGE, GREEN))
    ],
    "peer": [
        Look(color, marker, line)
        for marker, line, color in product("8HP", (LONG_DASHED, "-"), (SKY_BLUE, PURPLE, YELLOW))
    ],
    "yardstick": [Look(BLACK, marker, line, hollow=True) for marker, line in product("Dpv^", (DOTTED, DASHED))],
}


@dataclass(frozen=True)
class Entry:
    """A contender as the report shows it: its name, what it is ("strategy", "peer" or "yardstick"), its look."""

    name: str
    family: str
    summary: str
    look: Look


_FAMILIES = ("strategy", "peer", "yardstick")


class Roster:
    """All contenders of some records: strategies, what people use instead, other networks.

    Within each of these the order is that of the registry, unknown names last.

    Args:
        names: contenders to show; a name that the registry does not know counts as a peer.
    """

    def __init__(self, names: Iterable[str]) -> None:
        # Imports torch, which takes a second or two: only once there is something to draw.
        from densebench.contenders import get_contender, list_contenders

        wanted = set(names)
        known = [name for name in list_contenders() if name in wanted]
        entries = []
        taken = set(_FIXED.values())
        spare = {
            family: itertools.cycle([look for look in looks if look not in taken])
            for family, looks in _SPARE.items()
        }
        for name in [*known, *sorted(wanted - set(known))]:
            family: str = "peer"
            summary = "not registered in this version"
            if name in known:
                family, summary = get_contender(name).family, get_contender(name).summary
            look = _FIXED.get(name) or next(spare[family])
            entries.append(Entry(name, family, summary, look))
        ordered = sorted(entries, key=lambda entry: _FAMILIES.index(entry.family))
        self._entries = {entry.name: entry for entry in ordered}

    @classmethod
    def of(cls, records: Iterable[Record]) -> Roster:
        return cls(record.case.strategy for record in records)

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def rank(self, name: str) -> int:
        """The place of a contender in tables."""
        return list(self._entries).index(name)


def display_name(record: Record, family: str) -> str:
    """A contender in tables and figures; another network goes by its own name."""
    case = record.case
    name = model_name(case.model) if family == "yardstick" else case.strategy
    extras = ["contiguous"] if case.memory_format == "contiguous" else []
    extras += ["CUDA graph"] if case.cuda_graph else []
    return f"{name} ({', '.join(extras)})" if extras else name
