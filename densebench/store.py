"""The folder of a run: its records, appended as they are measured, and read again."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import sys
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING

from densebench.counting import counted
from densebench.records import Record, RecordError, identity

if TYPE_CHECKING:
    import pandas as pd


class StoreError(OSError):
    """A folder of records cannot be written; the message names it and the remedy."""


class RunStore:
    """The folder of one run; records are appended to its `cases.jsonl`, each flushed to the disk at once.

    Args:
        folder: created if missing, and tried before anything is measured.

    Raises:
        StoreError: if the folder cannot be created or written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "cases.jsonl"
        self._claim: IO[bytes] | None = None
        try:
            make_appendable(self.path)
        except OSError as error:
            raise StoreError(
                f"cannot write results to {folder} ({error.strerror}); choose another with --densebench-out"
            ) from None

    def claim(self) -> None:
        """Keep other runs out of this folder until this process ends, or `release`.

        Raises:
            StoreError: if another run has it.
        """
        self._claim = self.path.open("rb")
        try:
            fcntl.flock(self._claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise StoreError(
                f"another run is writing to {self.folder}; wait for it, or choose another with --densebench-out"
            ) from None
        except OSError:  # a file system without locks
            return

    def release(self) -> None:
        """Let other runs in."""
        if self._claim is not None:
            self._claim.close()
            self._claim = None

    def append(self, record: Record) -> Record:
        """Store one record, stamped with the run and the time; returns it as stored.

        Raises:
            ValueError: if it holds NaN or infinity; nothing is written then.
            StoreError: if the disk does not take it; what is there already stays readable.
        """
        created = datetime.now(UTC).isoformat(timespec="seconds")
        record = dataclasses.replace(record, run=self.folder.name, created=created)
        line = (record.to_json() + "\n").encode()
        try:
            append_durably(self.path, line)
        except OSError as error:
            raise StoreError(
                f"cannot write to {self.path} ({error.strerror}); what was measured before is there, "
                "and --densebench-resume goes on from it"
            ) from None
        return record

    def read(self) -> list[Record]:
        return read_records([self.path])


def append_durably(path: Path, line: bytes) -> None:
    """Append a line and wait until the disk has it; a line that was cut short is taken back."""
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        try:
            while line:  # a write may be cut short; the next one then says why
                line = line[file.write(line) :]
            os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(size)
            raise


def make_appendable(path: Path) -> None:
    """Make a file of lines, and its folder, if there is none; end a line that a killed process left unfinished."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab"):
        pass
    with path.open("rb+") as file:
        if file.seek(0, os.SEEK_END) and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
            file.write(b"\n")


def read_records(paths: Iterable[Path]) -> list[Record]:
    """All readable records of some files; what cannot be read is reported on stderr, a line a file."""
    records: list[Record] = []
    for path in paths:
        problems = []
        for number, line in _lines(path):
            try:
                records.append(Record.from_json(line))
            except RecordError as error:
                problems.append(f"line {number}: {error}")
        if problems:
            more = f" (and {counted(len(problems) - 1, 'more line')})" if len(problems) > 1 else ""
            print(f"densebench: {path}: left out {problems[0]}{more}", file=sys.stderr)
    return records


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line


def latest(records: Iterable[Record]) -> list[Record]:
    """The last record of each case and run: a case that was measured again replaces its older self.

    A time stays where the same code on the same machine came to none later: that run was cut short before it
    timed the case, or it failed. A result that turned out wrong has no time.
    """
    found: dict[tuple[str, str], Record] = {}
    for record in records:
        key = (record.run, record.case.key())
        if key not in found or not _only_lacks_the_time(record, found[key]):
            found[key] = record
    return list(found.values())


def _only_lacks_the_time(record: Record, older: Record) -> bool:
    if older.time_s is None or record.time_s is not None or record.status == "incorrect":
        return False
    return identity(record.environment) == identity(older.environment)


def to_frame(records: Iterable[Record]) -> pd.DataFrame:
    """One row a record, one column a field; nested fields as `case.model`, `time_s.median`."""
    import pandas as pd

    return pd.json_normalize([dataclasses.asdict(record) for record in records], max_level=1)
