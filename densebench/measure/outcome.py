"""What becomes of a case: figures, or what kept it from them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from densebench.measure.deadline import CaseTimeout
from densebench.measure.environment import environment
from densebench.measure.timing import Step
from densebench.measure.validation import NoReferenceError
from densebench.records import Case, Record, Status
from densebench.registry import UnsupportedError

Fields = dict[str, Any]


@dataclass
class Outcome:
    """A case on its way to a record.

    Attributes:
        status, reason, fields: of the record.
        step: what is timed, while it is.
        outputs: of the first step and of the latest.
    """

    case: Case
    status: Status = "ok"
    reason: str | None = None
    fields: Fields = dataclasses.field(default_factory=dict)
    step: Step | None = None
    outputs: list[Tensor] = dataclasses.field(default_factory=list)

    @property
    def key(self) -> str:
        return self.case.key()

    @property
    def has_memory(self) -> bool:
        return self.fields.get("peak_delta_bytes") is not None

    def doubt(self, status: Status, reason: str) -> None:
        """Note what is wrong with its figures; the first doubt counts."""
        if self.status == "ok":
            self.status, self.reason = status, reason

    def end(self, status: Status, reason: str) -> None:
        """Note what kept it from its figures, and let go of what it holds."""
        self.status, self.reason = status, reason
        self.step = None
        self.outputs.clear()

    def fail(self, error: Exception) -> None:
        """End as the error says."""
        if isinstance(error, UnsupportedError):
            self.end("unsupported", str(error))
        elif is_out_of_memory(error) and not isinstance(error, NoReferenceError):
            self.end("oom", first_line(error))
        elif isinstance(error, CaseTimeout):
            self.end("timeout", str(error))
        else:
            self.end("error", f"{type(error).__name__}: {first_line(error)}")

    def record(self) -> Record:
        facts = environment(self.case.device)
        return Record(self.case, self.status, self.reason, environment=facts, **self.fields)


_WORDS_FOR_NO_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    # PyTorch tries cuDNN's algorithms in turn, passes over those whose workspace does not fit, and says this when
    # none is left.
    "unable to find an engine to execute this computation",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error is a lack of memory, on the device or on the host (which PyTorch says in words alone)."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS_FOR_NO_MEMORY)


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
