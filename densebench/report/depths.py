"""Activation memory against depth: the curves of one network that differ in contender and source."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace

from densebench.records import Record
from densebench.report.agreement import Gathered, gathered, same_words
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
    """The curves of one network that differ in contender and source, contenders in the order of the roster.

    Attributes:
        setting: what they share, in words.
        same: on which other runs and machines they are the same, in a sentence.
    """

    setting: str
    curves: tuple[DepthCurve, ...]
    same: str | None = None


def depth_groups(records: Iterable[Record], roster: Roster) -> list[DepthGroup]:
    """Records of kind "depth" by setting, of the first run that has it whole; of runs that differ each its own."""
    known = (r for r in records if r.case.kind == "depth" and r.peak_delta_bytes and depth_of(r) is not None)
    groups = gathered(known, _network, lambda record: record.peak_delta_bytes or 0)
    run_shown = need_names(group.members[0] for group in groups)
    return [_depth_group(group, roster, run_shown) for group in groups]


def _network(record: Record) -> str:
    case = record.case
    options = {key: value for key, value in case.options.items() if key not in _DEPTH_OPTIONS}
    shared = (case.model, case.mode, case.batch, case.input_shape, case.dtype, case.autocast, case.device)
    return json.dumps([*shared, options], sort_keys=True)


def _depth_group(group: Gathered, roster: Roster, run_shown: bool) -> DepthGroup:
    points: dict[tuple[str, str], dict[int, int]] = {}
    for record in group.members:
        key = (record.case.strategy, record.case.source)
        points.setdefault(key, {})[depth_of(record) or 0] = record.peak_delta_bytes or 0
    curves = [
        DepthCurve(name, roster[name].look, source, tuple(sorted(points[name, source].items())))
        for name, source in sorted(points, key=lambda key: (roster.rank(key[0]), key[1]))
    ]
    first = min(group.members, key=lambda record: record.case.source)
    options = {key: value for key, value in first.case.options.items() if key not in _DEPTH_OPTIONS}
    case = replace(first.case, options=options)
    run = f", run {first.run}" if run_shown else ""
    setting = f"{MODES.get(case.mode, case.mode)}: {setting_words(case, device_of(first))}{run}"
    return DepthGroup(setting, tuple(curves), same_words(group, "the figures"))
