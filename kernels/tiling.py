"""Sizes of programs' tiles, and rows shared out among programs: what a kernel's speed on one device depends on.

Every kernel's file has a function that chooses its tile; `@choice` lets a search try another one in its place.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple, ParamSpec

# Asked hundreds of times a step, of few different things: looking the answer up takes a tenth of finding it.
_known = functools.lru_cache(maxsize=4096)


class Tile(NamedTuple):
    """Sizes of a program's tile, and how it is compiled and started.

    Attributes:
        rows, columns, outputs: of the tile; what a kernel has none of is 0.
        registers: a limit, where a few fewer let one more program run beside.
        programs: on each multiprocessor, where programs share the rows out.
    """

    rows: int
    columns: int
    outputs: int = 0
    warps: int = 4
    stages: int = 3
    registers: int | None = None
    programs: int = 1


class Share(NamedTuple):
    """Rows [0, M) in `parts` consecutive ranges of `rows` each (the last may be shorter)."""

    parts: int
    rows: int


Arguments = ParamSpec("Arguments")
Change = Callable[[Tile], Tile]
_changes: dict[str, Change] = {}


def choice(choose: Callable[Arguments, Tile]) -> Callable[Arguments, Tile]:
    """Decorates the function that chooses the tile of the kernel of a file."""
    kernel = choose.__module__.rsplit(".", 1)[-1]

    @functools.wraps(choose)
    def chosen(*arguments: Arguments.args, **named: Arguments.kwargs) -> Tile:
        tile = choose(*arguments, **named)
        change = _changes.get(kernel)
        return tile if change is None else change(tile)

    return chosen


@contextlib.contextmanager
def changing(kernel: str, change: Change) -> Iterator[None]:
    """Let launches of the kernel of a file take, instead of the tile that is chosen, what `change` makes of it.

    For a search. Whether a tile fits the device, and the values are right with it, is the caller's to find out.
    """
    before = _changes.get(kernel)
    _changes[kernel] = change
    try:
        yield
    finally:
        del _changes[kernel]
        if before is not None:
            _changes[kernel] = before


@_known
def elementwise_tile(columns: int, values: int = 32, stages: int = 1, programs: int = 1) -> Tile:
    """So many values a thread; 32 are four 16-byte loads of 2-byte values in flight from each operand."""
    block = power_of_two(columns, 16, 64)
    return Tile(128 * values // block, block, warps=4, stages=stages, programs=programs)


@_known
def parts_tile(parts: int) -> Tile:
    """For merging what so many programs found, all at once.

    Raises:
        ValueError: if they are more than a tile takes.
    """
    if parts > 4096:
        raise ValueError(f"{parts} partial results are more than the 4096 that are merged at once")
    return Tile(power_of_two(parts, 16, 4096), 8, warps=4, stages=1)


@_known
def share(rows: int, tile_rows: int, programs: int) -> Share:
    """Share rows out among at most so many programs, in whole tiles. It depends on nothing but its arguments,
    so the order of every sum does not either.

    Programs that take a whole multiprocessor each must not be more than there are, by rounding or otherwise:
    those left over would run alone, for as long as all the others together.
    """
    a_program = max(1, cdiv(cdiv(rows, tile_rows), max(1, programs))) * tile_rows  # of no rows, too
    return Share(cdiv(rows, a_program), a_program)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(value: int, least: int, most: int) -> int:
    """The next power of two, within limits that are powers of two."""
    return min(most, max(least, 1 << (value - 1).bit_length()))
