"""Which records a report shows: those asked for, else the newest run, else samples; published runs always."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from densebench.records import Record, identity
from densebench.store import latest, read_records

REPORTS = Path("reports")
RECORDS, KERNELS = "cases.jsonl", "kernels.json"
MAKE_SOME = "pytest benchmarks/ --benchmark-only"


class InputError(Exception):
    """An input that was named does not exist or cannot be read; the message is one line."""


@dataclass(frozen=True)
class Loaded:
    """Records and what belongs to them.

    Attributes:
        files: that were read.
        samples: whether the newest run had to be replaced by committed samples.
        published: names of the runs that are published ones.
        code: what the compiler made of each kernel.
        left_out: records in whose place a later one of the same case and run, from another machine or other code,
            is shown.
    """

    records: list[Record]
    files: tuple[Path, ...] = ()
    samples: bool = False
    published: frozenset[str] = frozenset()
    code: list[dict[str, Any]] = field(default_factory=list)
    left_out: tuple[Record, ...] = ()


def load(paths: Sequence[Path] = (), reports: Path = REPORTS) -> Loaded:
    """Read the records to show; none at all is an empty list.

    Args:
        paths: runs (folders) or files of records; without any, the newest run in `reports`.
        reports: the folder with data/, samples/ and published/.

    Raises:
        InputError: if one of the paths does not exist or cannot be read.
    """
    if paths:
        files = [file for path in paths for file in files_of(path)]
        records, left_out = _shown(files)
        return Loaded(records, tuple(files), code=_code([file.parent for file in files]), left_out=left_out)
    newest = _newest(reports / "data")
    published = _runs(reports / "published")
    own = [newest] if newest is not None else _runs(reports / "samples")
    files = [*own, *published]
    records, left_out = _shown(own)
    others, more_left_out = _shown(published)
    folders = [*(file.parent for file in files), reports / "samples"]
    samples = newest is None and bool(own)
    runs, left_out = frozenset(r.run for r in others), left_out + more_left_out
    return Loaded([*records, *others], tuple(files), samples, runs, _code(folders), left_out)


def files_of(path: Path) -> list[Path]:
    """The files of records that a path stands for: itself, a run's, or those of all runs in a folder.

    Raises:
        InputError: if it does not exist.
    """
    if path.is_dir():
        return [path / RECORDS] if (path / RECORDS).is_file() else _runs(path)
    if not path.exists():
        raise InputError(f"{path} does not exist")
    return [path]


def read(files: Sequence[Path]) -> list[Record]:
    """The last record of each case and run; a record without a run belongs to its folder.

    Raises:
        InputError: if a file cannot be read.
    """
    return latest(_all(files))


def _all(files: Sequence[Path]) -> list[Record]:
    """All records of some files, each with the name of its run."""
    records: list[Record] = []
    for file in files:
        try:
            found = read_records([file])
        except OSError as error:
            raise InputError(f"cannot read {file} ({error.strerror})") from None
        records += [r if r.run else dataclasses.replace(r, run=file.parent.name) for r in found]
    return records


def _shown(files: Sequence[Path]) -> tuple[list[Record], tuple[Record, ...]]:
    """What `read` returns, and what it leaves out: the last record of each case in every other environment."""
    found = _all(files)
    shown = latest(found)
    by_case = {(record.run, record.case.key()): record for record in shown}
    out: dict[tuple[str, str, str], Record] = {}
    for record in found:
        key = (record.run, record.case.key())
        if record.environment != by_case[key].environment:
            own = identity(record.environment)
            if own != identity(by_case[key].environment):
                out[(*key, own)] = record
    return shown, tuple(out.values())


def _runs(folder: Path) -> list[Path]:
    """The files of all runs in a folder, newest first: their names begin with the date."""
    return sorted(folder.glob(f"*/{RECORDS}"), reverse=True)


def _newest(folder: Path) -> Path | None:
    """The newest run with anything in it."""
    return next((file for file in _runs(folder) if file.stat().st_size > 0), None)


def _code(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """The first readable list of compiled kernels beside the records or the samples."""
    for folder in dict.fromkeys(folders):
        file = folder / KERNELS
        if not file.is_file():
            continue
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            print(f"densebench: {file}: left out, not JSON ({error})", file=sys.stderr)
            continue
        if isinstance(found, list) and all(isinstance(kernel, dict) for kernel in found):
            return found
        print(f"densebench: {file}: left out, not a list of kernels", file=sys.stderr)
    return []
