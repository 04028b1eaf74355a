"""Which records a report shows: those asked for, else the newest run, else samples; published runs always."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from densebench.results import Record, latest, read_records

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
    """

    records: list[Record]
    files: tuple[Path, ...] = ()
    samples: bool = False
    published: frozenset[str] = frozenset()
    code: list[dict[str, Any]] = field(default_factory=list)


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
        return Loaded(read(files), tuple(files), code=_code([file.parent for file in files]))
    newest = _newest(reports / "data")
    published = _runs(reports / "published")
    own = [newest] if newest is not None else _runs(reports / "samples")
    files = [*own, *published]
    shown = read(published)
    folders = [*(file.parent for file in files), reports / "samples"]
    records = [*read(own), *shown]
    samples = newest is None and bool(own)
    return Loaded(records, tuple(files), samples, frozenset(r.run for r in shown), _code(folders))


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
    records: list[Record] = []
    for file in files:
        try:
            found = read_records([file])
        except OSError as error:
            raise InputError(f"cannot read {file} ({error.strerror})") from None
        records += [r if r.run else dataclasses.replace(r, run=file.parent.name) for r in found]
    return latest(records)


def _runs(folder: Path) -> list[Path]:
    """The files of all runs in a folder, oldest first: their names begin with the date."""
    return sorted(folder.glob(f"*/{RECORDS}"))


def _newest(folder: Path) -> Path | None:
    """The newest run with anything in it."""
    return next((file for file in reversed(_runs(folder)) if file.stat().st_size > 0), None)


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
