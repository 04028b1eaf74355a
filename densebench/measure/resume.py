"""What a run that goes on need not measure again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from itertools import chain

from densebench.counting import counted
from densebench.measure.device import was_never_tried
from densebench.measure.environment import environment
from densebench.measure.outcome import Fields
from densebench.records import Record, differences, identity
from densebench.store import latest

# A case that hung or took the process with it is left alone until the source changes; an error is tried again.
_FINAL = ("oom", "unsupported", "skipped", "incorrect", "timeout", "crash")
# Of a record, but for the figures of its case.
_STAMPS = ("case", "status", "reason", "environment", "run", "created", "schema", "seed")


def finished(records: Iterable[Record]) -> dict[str, Record]:
    """The records, by the keys of their cases, that stand: of this source and machine, and complete."""
    here = [record for record in records if _is_of_here(record)]  # first: another machine's may be the latest
    return {record.case.key(): record for record in latest(here) if is_complete(record)}


def memory_records(records: Iterable[Record]) -> dict[str, Record]:
    """The last record of each case with its memory but no time, of this source and machine."""
    return {
        r.case.key(): r
        for r in records
        if r.status in ("ok", "noisy") and r.peak_delta_bytes is not None and r.time_s is None and _is_of_here(r)
    }


def why_none_applies(records: Sequence[Record]) -> str | None:
    """One sentence where there are records and all are of another machine or other code; None otherwise."""
    tried = [record for record in records if record.environment]  # a case that was not even tried has none
    if not tried or any(_is_of_here(record) for record in tried):
        return None
    found = [differences(record.environment, environment(_made_on(record)[0])) for record in tried]
    machine, code = (", ".join(dict.fromkeys(chain.from_iterable(side))) for side in zip(*found, strict=True))
    reasons = [f"the machine or its settings differ ({machine})"] if machine else []
    reasons += [f"the code differs ({code})"] if code else []
    why = " and ".join(reasons) if all(all(sides) for sides in found) else " or ".join(reasons)
    number = counted(len(records), "record")
    return f"{number} found there, of which none applies: {why}; everything is measured anew"


def is_complete(record: Record) -> bool:
    """Whether nothing is left to be found out about the record's case."""
    if record.time_s is not None:
        return True
    if record.status == "error" or was_never_tried(record):
        return False
    timed = record.case.kind == "step" and record.case.source == "measured"
    return not timed or record.status in _FINAL


def figures(record: Record) -> Fields:
    """The fields of a record that are known, as an outcome has them."""
    known = {f.name: getattr(record, f.name) for f in dataclasses.fields(record) if f.name not in _STAMPS}
    return {name: value for name, value in known.items() if value is not None}


def _is_of_here(record: Record) -> bool:
    return any(identity(record.environment) == identity(environment(device)) for device in _made_on(record))


def _made_on(record: Record) -> tuple[str, ...]:
    """The devices whose environment a record may have: predictions for a GPU are made without one."""
    device = record.case.device
    return ("cpu", device) if record.case.source == "predicted" else (device,)
