"""Small cases and records that the tests of this folder share."""

from __future__ import annotations

import dataclasses
from typing import Any

from densebench.records import Case, Record, Timing
from densebench.statistics import summarize

OPTIONS: dict[str, Any] = {"block_config": [2, 2], "growth_rate": 4, "stem": "cifar", "num_classes": 10}


def small_case(strategy: str = "naive", **changes: Any) -> Case:
    """A training step of a DenseNet of four layers."""
    case = Case("step", "densenet_x", strategy, "train", 4, (3, 16, 16), options=OPTIONS)
    return dataclasses.replace(case, **changes)


def fault_case(name: str, **changes: Any) -> Case:
    """A case that runs a contender of `tests.measure.faults`."""
    return small_case(name, model="fault", options={}, **changes)


def small_record(**fields: Any) -> Record:
    return Record(fields.pop("case", small_case()), fields.pop("status", "ok"), **fields)


def small_timing() -> Timing:
    return summarize([0.1, 0.2, 0.3])
