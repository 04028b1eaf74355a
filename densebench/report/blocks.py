"""What a report is made of: sections of paragraphs, lists, tables and pictures, for page and Markdown alike."""

from __future__ import annotations

from collections.abc import Iterable
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
    """A picture with its table beneath, folded unless `open`."""

    kind: ClassVar[str] = "plot"
    picture: Picture
    open: bool = False


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
        command: what would fill it, as typed into a shell.
    """

    id: str
    title: str
    blocks: tuple[Block, ...] = field(default=())
    absent: str | None = None
    command: str | None = None

    def pictures(self) -> list[Picture]:
        return [block.picture for block in flat(self.blocks) if isinstance(block, Plot)]

    def tables(self) -> list[Table]:
        blocks = flat(self.blocks)
        return [
            *(block.picture.table for block in blocks if isinstance(block, Plot)),
            *(block.table for block in blocks if isinstance(block, Sheet)),
        ]


def flat(blocks: Iterable[Block]) -> list[Block]:
    """All blocks, those inside folded ones too."""
    found: list[Block] = []
    for block in blocks:
        found += flat(block.blocks) if isinstance(block, Folded) else [block]
    return found
