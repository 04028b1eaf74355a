"""The CUDA device between cases: its settings, its memory, and whether it still answers."""

from __future__ import annotations

import gc

import torch

from densebench.measure.outcome import first_line
from densebench.records import Case, Record

LOST = "the CUDA context was lost"


class DeviceLostError(RuntimeError):
    """A case left the device's context unusable: in this process nothing more can run on it.

    Attributes:
        case: whose doing it is.
    """

    def __init__(self, case: Case, said: str) -> None:
        super().__init__(f"{LOST}: {said}")
        self.case = case


def tune(device: str) -> None:
    """Set what every contender is run with on a device, in this process; call it before anything is measured.

    On CUDA cuDNN tries its algorithms on the first call of each shape (`torch.backends.cudnn.benchmark`): its
    heuristics choose badly for some of these shapes, and whoever trains a network of one shape switches it on.
    Without it, contenders that lean on cuDNN (naive more than ours) would look slower than they need to be.
    """
    if device == "cuda":
        torch.backends.cudnn.benchmark = True


def release_memory(device: str) -> str | None:
    """Give back what nothing holds; what the device says if its context is lost, None if it answers.

    Some errors of a kernel stick: from then on every call fails, these too.
    """
    gc.collect()
    if device != "cuda" or not torch.cuda.is_available():
        return None
    said = ""
    for _ in range(2):  # the first may still report what the case did; a context that lives answers the second
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            _give_back_pinned()
        except RuntimeError as error:
            said = first_line(error)
        else:
            return None
    return said


def _give_back_pinned() -> None:
    """Host memory that copies go through: what offloads keeps gigabytes of it. Not every build has this."""
    empty = getattr(torch._C, "_host_emptyCache", None)
    if empty is not None:
        empty()


def was_never_tried(record: Record) -> bool:
    """Whether a record was skipped only because another case had lost the device before its turn."""
    return record.status == "skipped" and str(record.reason).startswith(LOST)
