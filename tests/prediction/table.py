"""The combinations a prediction is held to, and the table of its errors.

`python -m tests.prediction.table` prints the table (all of it with `--nightly`).
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from densebench.measure.memory import measure_peak
from densebench.prediction import trace_case
from densebench.records import Case
from densebench.registry import list_strategies
from densebench.workload import build_workload

TOLERANCE = 0.02
MIB = 2**20


@dataclass(frozen=True)
class Comparison:
    """Predicted and measured bytes of one case: the whole peak, and what of it is not constant."""

    case: Case
    predicted: int
    measured: int
    predicted_activations: int
    measured_activations: int
    holder: str

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1

    @property
    def activation_error(self) -> float:
        return self.predicted_activations / self.measured_activations - 1

    def row(self) -> str:
        sizes = f"{self.measured / MIB:8.1f} {self.predicted / MIB:8.1f}"
        return f"{describe(self.case):<62}{sizes} {self.error:+8.2%} {self.activation_error:+8.2%}  {self.holder}"


HEADER = f"{'case':<62}{'measured':>8} {'predicted':>8} {'peak':>8} {'activ.':>8}  at the peak"


def compare(case: Case) -> Comparison:
    """Predict a case, run it, and put both side by side."""
    trace = trace_case(case)
    peak = measure_peak(lambda: build_workload(case), torch.device("cpu"), repeats=1)
    operation = trace.operations[trace.peak_event - 1]
    return Comparison(
        case,
        trace.peak_bytes,
        peak.peak_allocated_bytes,
        trace.activation_bytes,
        peak.peak_delta_bytes,
        operation.name,
    )


def describe(case: Case) -> str:
    """A case in words, as a test's name."""
    size = "x".join(map(str, (case.batch, *case.input_shape[1:])))
    options = "".join(f" {name}={value}" for name, value in case.options.items() if name != "block_config")
    layout = "" if case.memory_format == "channels_last" else " contiguous"
    return f"{case.model} {case.strategy} {case.mode} {size} {case.autocast or case.dtype}{layout}{options}"


# Small enough to run in a second, and still maps, not parameters, make the peak. Options of `densenet_x`.
_SHORT: dict[str, Any] = {"block_config": (4, 8), "growth_rate": 32, "num_classes": 10}
_VOLUMES: dict[str, Any] = {"spatial_dims": 3, "in_channels": 1}


def combinations() -> list[Case]:
    """All that every test run compares."""
    return [*_of_strategies(), *_of_networks()]


def nightly() -> list[Case]:
    """Full-size networks: DenseNet-121 at 224 under every strategy."""
    case = Case("step", "densenet121", "naive", "train", 8, (3, 224, 224), memory_format="channels_last")
    return [
        dataclasses.replace(case, strategy=name, mode=mode)
        for mode in ("train", "infer")
        for name in list_strategies()
    ]


def _of_strategies() -> Iterator[Case]:
    """Every registered strategy in every kind of setting."""
    base = Case(
        "step", "densenet_x", "naive", "train", 8, (3, 96, 96), memory_format="channels_last", options=_SHORT
    )
    settings: list[dict[str, Any]] = [
        {},
        {"memory_format": "contiguous"},
        {"autocast": "bfloat16", "batch": 16},
        {"dtype": "float64", "batch": 4},
        {"mode": "infer", "batch": 16},
        {"mode": "forward", "batch": 4},
        {"options": {**_SHORT, "bn_size": None}},
        {"options": {**_SHORT, "drop_rate": 0.2}},
        {"options": {**_SHORT, "block_config": (3, 6, 3), "output_stride": 8}},
        {"options": {**_SHORT, **_VOLUMES}, "input_shape": (1, 40, 40, 40), "batch": 2},
        {"options": {**_SHORT, **_VOLUMES}, "input_shape": (1, 40, 40, 40), "batch": 4, "mode": "infer"},
    ]
    for changes in settings:
        for name in list_strategies():
            yield dataclasses.replace(base, strategy=name, **changes)


def _of_networks() -> Iterator[Case]:
    """Networks that are not ours, and ours in other shapes."""
    case = Case("step", "densenet121", "naive", "train", 4, (3, 96, 96), memory_format="channels_last")
    cifar = dataclasses.replace(
        case, model="densenet_bc", batch=16, input_shape=(3, 32, 32), options={"depth": 40}
    )
    yield dataclasses.replace(case, dtype="bfloat16")
    yield cifar
    yield dataclasses.replace(cifar, autocast="bfloat16", strategy="shared_buffer")
    yield dataclasses.replace(case, model="resnet50", strategy="eager")
    yield dataclasses.replace(case, model="resnet18", strategy="eager", memory_format="contiguous", mode="infer")
    for peer in ("torchvision", "torchvision_checkpointed", "timm"):
        yield dataclasses.replace(case, strategy=peer)
    yield dataclasses.replace(case, strategy="torchvision", mode="infer", memory_format="contiguous")


if __name__ == "__main__":
    print(HEADER)
    for chosen in nightly() if "--nightly" in sys.argv else combinations():
        print(compare(chosen).row(), flush=True)
