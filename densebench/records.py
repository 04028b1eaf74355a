"""The record of one measured case, one line of JSON.

The dataclasses here are the schema. Units stand in the names, bytes are integers, and what is unknown is
None, never 0 or NaN.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

SCHEMA = 1
Status = Literal[
    "ok", "oom", "error", "timeout", "crash", "incorrect", "noisy", "skipped", "unsupported"
]  # fmt: skip
STATUSES: tuple[str, ...] = get_args(Status)


class RecordError(ValueError):
    """A line is not a record; the message says why."""


@dataclass(frozen=True)
class Case:
    """What was run: the key of a record.

    Attributes:
        kind: "step" (a whole network), "depth" (one block of a chosen depth), "timeline" or "kernel"; "fit" (the
            largest batch that a card holds) and "deepest" (the most layers) are predicted only.
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
            if "\\ud" in line.lower():  # half a character, as names of files may hold: no page can
                whole = json.dumps(data, ensure_ascii=False).encode(errors="replace")
                data = json.loads(whole)
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


# Of the facts in a record's environment: what tells machines and code apart.
_MACHINE = ("device", "threads", "flags", "allocator", "cpu_kernels")
_CODE = ("source", "python", "packages", "torch_git", "cuda", "compilers", "assembler")
_GPU = ("driver", "cudnn")  # not which board of a model: what is timed in turns, and so compared, is on one


def identity(facts: Mapping[str, Any]) -> str:
    """What must agree for two records to count as measured in the same place, on the same code.

    The code is known by its hash: a commit that changes none of it, or is not known, changes no measurement.
    """
    gpu = facts.get("gpu", {})
    same = [*(facts.get(name) for name in (*_MACHINE, *_CODE)), *(gpu.get(name) for name in _GPU)]
    return json.dumps(same, sort_keys=True)


def differences(facts: Mapping[str, Any], others: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Names of the facts that give two environments another `identity`: those of the machine, and of the code."""
    gpu, other_gpu = facts.get("gpu", {}), others.get("gpu", {})
    machine = [name.replace("_", " ") for name in _MACHINE if facts.get(name) != others.get(name)]
    machine += [f"GPU {name}" for name in _GPU if gpu.get(name) != other_gpu.get(name)]
    return machine, [name.replace("_", " ") for name in _CODE if facts.get(name) != others.get(name)]


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
