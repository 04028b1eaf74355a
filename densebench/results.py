"""The record of one measured case, and the store of records: one JSON line each, appended as it is measured.

The dataclasses here are the schema. Units stand in the names, bytes are integers, and what is unknown is
None, never 0 or NaN.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import sys
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, get_args, get_type_hints

from densebench.counting import counted

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 1
Status = Literal[
    "ok", "oom", "error", "timeout", "crash", "incorrect", "noisy", "skipped", "unsupported"
]  # fmt: skip
STATUSES: tuple[str, ...] = get_args(Status)


class RecordError(ValueError):
    """A record or a file of records cannot be read; the message says which and why."""


@dataclass(frozen=True)
class Case:
    """What was run: the key of a record.

    Attributes:
        kind: "step" (a whole network), "depth" (one block of a chosen depth), "timeline" or "kernel".
        model: a name of `densebench.list_models()`, or of an operator for kernels.
        strategy: a strategy's name, or that of another contender.
        mode: "train" (forward and backward), "forward" (with graph) or "infer" (without).
        batch: images; `input_shape` is that of one image, [C, H, W], or of a volume, [C, D, H, W].
        dtype: of parameters and input; `autocast` the dtype of autocast, or None.
        source: "measured" on `device`, or "predicted" for it without running.
        options: whatever else makes the case, e.g. {"depth": 48}.
    """

    kind: str
    model: str
    strategy: str
    mode: str
    batch: int
    input_shape: tuple[int, ...]
    dtype: str = "float32"
    autocast: str | None = None
    memory_format: str = "contiguous"
    compiled: str | None = None
    cuda_graph: bool = False
    device: str = "cpu"
    source: str = "measured"
    options: dict[str, Any] = field(default_factory=dict)

    def key(self) -> str:
        """A short name that is the same for the same case and different for any other."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def label(self) -> str:
        """The case in words, for progress lines."""
        size = "x".join(map(str, (self.batch, *self.input_shape)))
        precision = self.autocast or self.dtype
        graph = " as a CUDA graph" if self.cuda_graph else ""
        blocks = f" {'-'.join(map(str, self.options['block_config']))}" if "block_config" in self.options else ""
        words = (self.model + blocks, self.strategy, self.mode, size, precision, self.memory_format)
        return " ".join(words) + graph


@dataclass(frozen=True)
class Timing:
    """Seconds a repetition, and every sample in the order taken."""

    median: float
    q1: float
    q3: float
    min: float
    n: int
    samples: tuple[float, ...]


@dataclass(frozen=True)
class Timeline:
    """Live bytes over one step: `bytes[category][i]` after event `events[i]`."""

    events: tuple[int, ...]
    bytes: dict[str, tuple[int, ...]]
    forward_end: int  # the event with which forward ended


@dataclass(frozen=True)
class Record:
    """One case and what was found; see `Case`.

    Memory, in bytes. `baseline_allocated_bytes` is computed: parameters, gradients, buffers, input and
    optimizer state. `peak_allocated_bytes` is the highest the allocator went in a step whose gradients exist
    already, in bytes asked for (CUDA rounds each tensor up to 512); `peak_delta_bytes` is the difference, the
    activation bytes, library workspaces apart (`workspace_bytes`). `plain_peak_bytes` is the peak of a step that
    starts without gradients. `process_device_bytes` is NVML's figure for the process.

    Work: `flops_model` counts 2 x multiply-adds without recomputation, `flops_executed` with it.
    `group` names the cases that were timed together; samples pair up where `turns` agrees, too: it is different
    for every time that a group was timed (older records have none).
    """

    case: Case
    status: Status
    reason: str | None = None
    baseline_allocated_bytes: int | None = None
    peak_allocated_bytes: int | None = None
    peak_delta_bytes: int | None = None
    plain_peak_bytes: int | None = None
    workspace_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    process_device_bytes: int | None = None
    host_peak_rss_bytes: int | None = None
    predicted_peak_bytes: int | None = None
    time_s: Timing | None = None
    group: str | None = None
    turns: str | None = None
    throughput_img_s: float | None = None
    compile_s: float | None = None
    host_time_s: float | None = None
    flops_model: int | None = None
    flops_executed: int | None = None
    tflops_s: float | None = None
    bytes_moved: int | None = None
    energy_j: float | None = None
    sm_clock_mhz: float | None = None
    clock_event_reasons: tuple[str, ...] | None = None
    throttled: bool | None = None
    shared_gpu: bool | None = None
    max_error_vs_reference: float | None = None
    seed: int = 0
    timeline: Timeline | None = None
    unavailable: dict[str, str] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    run: str = ""
    created: str = ""
    schema: int = SCHEMA

    def to_json(self) -> str:
        """One line of JSON.

        Raises:
            ValueError: for NaN or infinity, which JSON does not have.
        """
        return json.dumps(dataclasses.asdict(self), allow_nan=False, sort_keys=True)

    @classmethod
    def from_json(cls, line: str) -> Record:
        """Read one line.

        Raises:
            RecordError: if it is not a record of this schema or an older one.
        """
        try:
            data = json.loads(line, parse_constant=_refuse_constant)
        except json.JSONDecodeError as error:
            raise RecordError(f"not JSON ({error.msg})") from None
        if not isinstance(data, dict) or "case" not in data:
            raise RecordError("not a record: it has no case")
        schema = data.get("schema")
        if type(schema) is not int:
            raise RecordError(f"schema is {schema!r}, not a number")
        if schema > SCHEMA:
            raise RecordError(f"schema {schema} is newer than {SCHEMA}; update densebench to read it")
        record: Record = _build(cls, data, "record")
        if record.status not in STATUSES:
            raise RecordError(f"unknown status {record.status!r}")
        return record


def _build(kind: Any, value: Any, where: str) -> Any:
    """`value`, as parsed from JSON, as the type `kind`; unknown fields of an older schema are dropped."""
    origin = typing.get_origin(kind)
    if origin is types.UnionType:
        if value is None:
            return None
        kind = next(option for option in get_args(kind) if option is not types.NoneType)
        return _build(kind, value, where)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, dict):
            raise RecordError(f"{where} is not an object")
        hints = get_type_hints(kind)
        known = {name: _build(hints[name], value[name], name) for name in hints if name in value}
        try:
            return kind(**known)
        except TypeError:
            missing = [f.name for f in dataclasses.fields(kind) if f.name not in known and _required(f)]
            raise RecordError(f"{where} lacks {', '.join(missing)}") from None
    if origin is tuple:
        _expect(isinstance(value, list), "a list", value, where)
        return tuple(_build(get_args(kind)[0], item, where) for item in value)
    if origin is dict:
        _expect(isinstance(value, dict), "an object", value, where)
        return {key: _build(get_args(kind)[1], item, where) for key, item in value.items()}
    if kind is float:
        _expect(type(value) in (int, float), "a number", value, where)
        return float(value)
    if kind in (int, str, bool):
        _expect(type(value) is kind, _IN_WORDS[kind], value, where)
    return value


_IN_WORDS = {int: "an integer", str: "a text", bool: "true or false"}


def _expect(fits: bool, wanted: str, value: Any, where: str) -> None:
    if not fits:
        raise RecordError(f"{where} is {str(value)[:40]!r}, not {wanted}")


def _refuse_constant(name: str) -> None:
    raise RecordError(f"it holds {name}, which is no JSON")


def _required(f: dataclasses.Field[Any]) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


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


# What tells code and machine apart, of a record's environment.
_SAME = ("source", "device", "threads", "packages", "torch_git", "cuda", "flags", "allocator")


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
    return all(record.environment.get(name) == older.environment.get(name) for name in _SAME)


def to_frame(records: Iterable[Record]) -> pd.DataFrame:
    """One row a record, one column a field; nested fields as `case.model`, `time_s.median`."""
    import pandas as pd

    return pd.json_normalize([dataclasses.asdict(record) for record in records], max_level=1)
