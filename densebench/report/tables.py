"""Tables as data, for page and Markdown alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Link:
    """A cell that leads to a source."""

    text: str
    url: str


Cell = str | Link


@dataclass(frozen=True)
class Table:
    """A table of finished texts.

    Attributes:
        caption: what its rows are.
        columns: names, with units; the glossary explains each.
        rows: as many cells as there are columns; an unknown is the empty text.
        numeric: indices of columns to align right.
        strong: indices of rows to set off.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    numeric: frozenset[int] = frozenset()
    strong: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Column(Generic[T]):
    """A column and how a row's cell is made; a cell of None is unknown."""

    name: str
    cell: Callable[[T], Cell | None]
    numeric: bool = True


def build(
    caption: str,
    columns: Sequence[Column[T]],
    rows: Iterable[T],
    strong: Callable[[T], bool] = lambda row: False,
) -> Table:
    """A table of some rows; a column in which nothing is known is left out."""
    rows = list(rows)
    cells = [[column.cell(row) for column in columns] for row in rows]
    shown = [i for i in range(len(columns)) if any(line[i] for line in cells)]
    return Table(
        caption,
        tuple(columns[i].name for i in shown),
        tuple(tuple(line[i] or "" for i in shown) for line in cells),
        frozenset(at for at, i in enumerate(shown) if columns[i].numeric),
        frozenset(at for at, row in enumerate(rows) if strong(row)),
    )
