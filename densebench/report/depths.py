"""Activation memory against depth: the curves of one network that differ in contender and source."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace

from densebench.records import Record
from densebench.report.selection import device_of, need_names
from densebench.report.style import Look, Roster
from densebench.report.units import MODES, setting_words

_DEPTH_OPTIONS = ("depth", "block_config")


def depth_of(record: Record) -> int | None:
    """Dense layers of a record of kind "depth"; None if it does not say."""
    options = record.case.options
    depth = options.get("depth", options.get("block_config"))
    layers = depth if isinstance(depth, list | tuple) else [depth]
    return sum(layers) if layers and all(isinstance(layer, int) for layer in layers) else None


@dataclass(frozen=True)
class DepthCurve:
    """Activation bytes of one contender against depth, by increasing depth."""

    name: str
    look: Look
    source: str
    points: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class DepthGroup:
    """The curves of one network that differ in contender and source.

    Attributes:
        setting: what they share, in words.
        key: the same but for run and machine, to tell whether two groups are of one network.
    """

    setting: str
    key: str
    curves: tuple[DepthCurve, ...]


def depth_groups(records: Iterable[Record], roster: Roster) -> list[DepthGroup]:
    """Records of kind "depth" by run and setting; the measured curves of each before the predicted ones."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        if record.case.kind == "depth" and record.peak_delta_bytes and depth_of(record) is not None:
            groups.setdefault(_depth_key(record), []).append(record)
    run_shown = need_names(members[0] for members in groups.values())
    return [_depth_group(members, roster, run_shown) for members in groups.values()]


def _depth_key(record: Record) -> str:
    return json.dumps([record.run, _network(record)])


def _network(record: Record) -> str:
    case = record.case
    options = {key: value for key, value in case.options.items() if key not in _DEPTH_OPTIONS}
    shared = (case.model, case.mode, case.batch, case.input_shape, case.dtype, case.autocast, case.device)
    return json.dumps([*shared, options], sort_keys=True)


def _depth_group(members: list[Record], roster: Roster, run_shown: bool) -> DepthGroup:
    points: dict[tuple[str, str], dict[int, int]] = {}
    for record in members:
        key = (record.case.source, record.case.strategy)
        points.setdefault(key, {})[depth_of(record) or 0] = record.peak_delta_bytes or 0
    curves = [
        DepthCurve(name, roster[name].look, source, tuple(sorted(points[source, name].items())))
        for source, name in sorted(points, key=lambda key: (key[0], roster.rank(key[1])))
    ]
    first = min(members, key=lambda record: record.case.source)
    options = {key: value for key, value in first.case.options.items() if key not in _DEPTH_OPTIONS}
    case = replace(first.case, options=options)
    run = f", run {first.run}" if run_shown else ""
    setting = f"{MODES.get(case.mode, case.mode)}: {setting_words(case, device_of(first))}{run}"
    return DepthGroup(setting, _network(first), tuple(curves))
