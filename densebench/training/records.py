"""What a training run leaves behind for people and figures: a line of JSON a strategy and epoch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from densebench.store import append_durably, make_appendable
from densebench.training.errors import TrainingError

FILE = "training.jsonl"


@dataclass(frozen=True)
class EpochRecord:
    """One epoch of one strategy.

    Attributes:
        epoch: counts from 1.
        step_losses: mean cross-entropy of each step's batch, before its update.
        train_loss, train_accuracy: over the epoch's steps, as the weights were then; an accuracy is a share.
        test_loss, test_accuracy: after the epoch; a loss that is no number is None.
        seconds: of the epoch's steps, loading included and testing not.
        images_per_s: of one run, beside whatever else ran: no benchmark.
        peak_delta_bytes: activation memory of a step, see `densebench.records.Record`.
        options: of the run, `of_the_curve` in `densebench.training.settings`.
        images: what it was trained on.
        environment: see `densebench.measure.environment`.
        created: when, in UTC.
    """

    strategy: str
    epoch: int
    step_losses: tuple[float, ...]
    train_loss: float
    train_accuracy: float
    test_loss: float | None
    test_accuracy: float
    seconds: float
    images_per_s: float
    peak_delta_bytes: int
    options: dict[str, Any]
    images: dict[str, Any]
    environment: dict[str, Any]
    created: str

    def to_json(self) -> str:
        """One line; raises ValueError for NaN or infinity."""
        return json.dumps(dataclasses.asdict(self), allow_nan=False, sort_keys=True)

    @classmethod
    def from_json(cls, line: str) -> EpochRecord | None:
        """Read one line; None if it is no such record (a run that was killed may leave half of one)."""
        try:
            data = json.loads(line)
            known = {field.name: data[field.name] for field in dataclasses.fields(cls)}
            return cls(**{**known, "step_losses": tuple(known["step_losses"])})
        except (ValueError, KeyError, TypeError):
            return None


class RunFolder:
    """The folder that a run writes to.

    Args:
        folder: created if missing.
        strategies: to be trained by.
        options: of the run, as in `EpochRecord`.
        resume: go on with the run that is there, instead of refusing to.

    Raises:
        TrainingError: if it cannot be written, holds another run, or none to resume.
    """

    def __init__(self, folder: Path, strategies: Sequence[str], options: Mapping[str, Any], resume: bool) -> None:
        self.folder, self.path = folder, folder / FILE
        if resume and not self.path.is_file():
            raise TrainingError(f"--resume: there is no run in {folder}; leave --resume out to start one")
        written = (*(f"{name}{end}" for name in strategies for end in (".pt", ".checkpoint")), "curves.svg")
        taken = next((name for name in written if (folder / name).exists()), None)
        if taken is not None and not self.path.is_file():
            raise TrainingError(
                f"{folder} holds {taken}, which is no run's and would be written over; choose another --out"
            )
        try:
            make_appendable(self.path)
        except OSError as error:
            raise TrainingError(f"cannot write to {folder} ({error.strerror}); choose another --out") from None
        if not resume and self.path.stat().st_size:
            raise TrainingError(f"{folder} holds a run; go on with it by --resume, or choose another --out")
        for record in read_epochs(folder):
            _check_same(options, record.options)

    def append(self, record: EpochRecord) -> None:
        """Store one record; the disk has it when this returns.

        Raises:
            TrainingError: if the disk does not take it.
        """
        try:
            append_durably(self.path, (record.to_json() + "\n").encode())
        except OSError as error:
            raise TrainingError(f"cannot write to {self.path} ({error.strerror})") from None


def read_epochs(folder: Path) -> list[EpochRecord]:
    """The records of a run, each strategy's by epoch; an epoch that was run again replaces its older self."""
    with (folder / FILE).open(encoding="utf-8", errors="replace") as file:
        return ordered(record for line in file if (record := EpochRecord.from_json(line)) is not None)


def ordered(records: Iterable[EpochRecord]) -> list[EpochRecord]:
    """The last record of each strategy and epoch; strategies as they first come, epochs ascending."""
    found: dict[str, dict[int, EpochRecord]] = {}
    for record in records:
        found.setdefault(record.strategy, {})[record.epoch] = record
    return [epochs[number] for epochs in found.values() for number in sorted(epochs)]


def by_strategy(records: Iterable[EpochRecord]) -> dict[str, list[EpochRecord]]:
    """Records by the name of their strategy, in the order given."""
    found: dict[str, list[EpochRecord]] = {}
    for record in records:
        found.setdefault(record.strategy, []).append(record)
    return found


def _check_same(options: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if before.get(name) != value:
            option = f"--{name.replace('_', '-')}" if name != "data" else "DATA"
            raise TrainingError(
                f"--resume: {option} is {value} and was {before.get(name)}; give the same, or choose another --out"
            )
