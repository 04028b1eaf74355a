"""The deepest network that trains in memories of several sizes, from searches by `densebench.prediction`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace

from densebench.records import Record
from densebench.report.agreement import gathered, same_words
from densebench.report.blocks import Block, Prose, Sheet
from densebench.report.selection import device_of
from densebench.report.style import Roster, display_name
from densebench.report.tables import Column, Table, build
from densebench.report.units import setting_words

SEARCHED_FOR = ("capacity_gib", "depth")


def deepest_blocks(records: Iterable[Record], roster: Roster) -> list[Block]:
    """A table for each network that was searched: the most layers of each contender by capacity in GiB."""
    blocks: list[Block] = []
    for group in gathered(filter(_is_deepest, records), _network, _depth, _point):
        blocks.append(Sheet(_table(group.members, roster)))
        same = same_words(group, "the answers")
        blocks += [] if same is None else [Prose(same)]
    return blocks


def _is_deepest(record: Record) -> bool:
    options = record.case.options
    return record.case.kind == "deepest" and all(isinstance(options.get(name), int) for name in SEARCHED_FOR)


def _network(record: Record) -> str:
    case = record.case
    shared = (case.model, case.input_shape, case.batch, case.dtype, case.autocast, _fixed(record))
    return json.dumps(shared, sort_keys=True)


def _depth(record: Record) -> int:
    return int(record.case.options["depth"])


def _point(record: Record) -> tuple[str, str, int]:
    """Who was searched for and in how much memory; in the case's own key the answer stands, too."""
    return record.case.strategy, record.case.memory_format, record.case.options["capacity_gib"]


def _table(members: Sequence[Record], roster: Roster) -> Table:
    found: dict[str, dict[int, Record]] = {}
    for record in sorted(members, key=lambda record: roster.rank(record.case.strategy)):
        found.setdefault(record.case.strategy, {})[record.case.options["capacity_gib"]] = record

    def column(capacity: int) -> Column[dict[int, Record]]:
        return Column(f"{capacity} GiB", lambda row: _layers(row.get(capacity)))

    first = members[0]
    case = replace(first.case, options=_fixed(first))
    caption = f"Most layers. Training step: {setting_words(case, device_of(first))}"
    columns = [
        Column[dict[int, Record]]("contender", lambda row: _name(row, roster), numeric=False),
        *map(column, sorted({capacity for row in found.values() for capacity in row})),
    ]
    return build(caption, columns, list(found.values()), strong=lambda row: _strategy(row) == "naive")


def _layers(record: Record | None) -> str | None:
    """So many layers; the search ends somewhere, and says so in the record's reason."""
    if record is None:
        return None
    layers = f"{record.case.options['depth']:,}"
    return layers if record.reason is None else f"{layers} or more"


def _fixed(record: Record) -> dict[str, object]:
    """The options of the network that were not searched for."""
    return {name: value for name, value in record.case.options.items() if name not in SEARCHED_FOR}


def _strategy(row: dict[int, Record]) -> str:
    return next(iter(row.values())).case.strategy


def _name(row: dict[int, Record], roster: Roster) -> str:
    return display_name(next(iter(row.values())), roster[_strategy(row)].family)
