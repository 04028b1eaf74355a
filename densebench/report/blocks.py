"""What a report is made of: sections of paragraphs, lists, tables and pictures, for page and Markdown alike."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Union

from densebench.report.drawing import Picture
from densebench.report.tables import Table


@dataclass(frozen=True)
class Prose:
    """A paragraph."""

    kind: ClassVar[str] = "prose"
    text: str


@dataclass(frozen=True)
class Items:
    """A list of sentences."""

    kind: ClassVar[str] = "items"
    items: tuple[str, ...]


@dataclass(frozen=True)
class Sheet:
    """A table in full view."""

    kind: ClassVar[str] = "sheet"
    table: Table


@dataclass(frozen=True)
class Plot:
    """A picture with its table folded beneath, unless the table stands beside it already."""

    kind: ClassVar[str] = "plot"
    picture: Picture


@dataclass(frozen=True)
class Folded:
    """What only some readers want: a line to open."""

    kind: ClassVar[str] = "folded"
    summary: str
    blocks: tuple[Block, ...]


Block = Union["Prose", "Items", "Sheet", "Plot", "Folded"]


@dataclass(frozen=True)
class Section:
    """A part of the report with a place in its table of contents.

    Attributes:
        absent: why it is empty, in one line; such a section has no blocks.
    """

    id: str
    title: str
    blocks: tuple[Block, ...] = field(default=())
    absent: str | None = None

    def pictures(self) -> list[Picture]:
        return _pictures(self.blocks)


def _pictures(blocks: tuple[Block, ...]) -> list[Picture]:
    found: list[Picture] = []
    for block in blocks:
        if isinstance(block, Plot):
            found.append(block.picture)
        elif isinstance(block, Folded):
            found += _pictures(block.blocks)
    return found
