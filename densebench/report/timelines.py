"""Memory over one step: the timelines of one network and setting, which differ in the contender alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from densebench.records import Record
from densebench.report.agreement import gathered, same_words
from densebench.report.selection import device_of, need_names, setting_of
from densebench.report.style import Roster
from densebench.report.units import MODES, setting_words


@dataclass(frozen=True)
class TimelineGroup:
    """Records with a timeline that differ in the contender alone, in the order of the roster.

    Attributes:
        setting: what they share, in words.
        same: on which other runs and machines their peaks are the same, in a sentence.
    """

    setting: str
    members: tuple[Record, ...]
    same: str | None = None


def timeline_groups(records: Iterable[Record], roster: Roster) -> list[TimelineGroup]:
    """Records with a timeline by setting, of the first run that has it whole; of runs that differ each its own."""
    known = (record for record in records if record.timeline is not None and record.timeline.events)
    groups = gathered(known, lambda record: f"{setting_of(record)} {record.case.model}", _peak)
    run_shown = need_names(group.members[0] for group in groups)
    found = []
    for group in groups:
        members = tuple(sorted(group.members, key=lambda record: roster.rank(record.case.strategy)))
        case = members[0].case
        run = f", run {members[0].run}" if run_shown else ""
        setting = f"{MODES.get(case.mode, case.mode)}: {setting_words(case, device_of(members[0]))}{run}"
        found.append(TimelineGroup(setting, members, same_words(group, "the peaks")))
    return found


def _peak(record: Record) -> int:
    """The most bytes that are alive at once; where in the step depends on the scratch, too."""
    assert record.timeline is not None
    return max(map(sum, zip(*record.timeline.bytes.values(), strict=True)))
