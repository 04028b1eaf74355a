"""What optimizers keep and need is what the table says, in the implementation that CUDA runs by default."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import densebench
from densebench.measure.memory import measure_peak
from densebench.prediction.optimizers import list_optimizers, optimizer_cost

REAL: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, foreach=True),
    "sgd_momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, foreach=True),
    "adam": lambda p: torch.optim.Adam(p, foreach=True),
    "adamw": lambda p: torch.optim.AdamW(p, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, foreach=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, foreach=True),
}


class _Training:
    """Optimizer steps on four layers with gradients, as something that can be measured."""

    def __init__(self, name: str) -> None:
        self.layers = nn.ModuleList(nn.Linear(256, 256, bias=False) for _ in range(4))
        for parameter in self.layers.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.optimizer = REAL[name](self.layers.parameters())

    def step(self) -> None:
        self.optimizer.step()

    def clear_gradients(self) -> None:
        """They stay: only the optimizer's own memory is looked at."""

    def constant_bytes(self) -> int:
        return 2 * sum(parameter.nbytes for parameter in self.layers.parameters())


def test_all_are_held() -> None:
    assert set(REAL) == set(list_optimizers())


@pytest.mark.parametrize("name", REAL)
def test_copies(name: str) -> None:
    parameters = 4 * 256 * 256 * 4
    peak = measure_peak(lambda: _Training(name), torch.device("cpu"), repeats=1)
    cost = optimizer_cost(name)
    expected = (cost.state + cost.temporaries) * parameters
    assert peak.peak_delta_bytes == pytest.approx(expected, abs=0.02 * parameters)


def test_state_is_in_the_peak_and_the_step_may_hold_it() -> None:
    shape = (2, 1, 64, 64)
    without = densebench.predict_memory("densenet_d2l", shape, device="cpu")
    with_state = densebench.predict_memory("densenet_d2l", shape, device="cpu", optimizer="adamw")
    parameters = without.breakdown["gradients"]
    assert with_state.breakdown["optimizer"] == 2 * parameters
    assert with_state.peak_bytes == without.peak_bytes + 2 * parameters

    wide = densebench.predict_memory(
        nn.Sequential(nn.Linear(2048, 2048)), (1, 2048), device="cpu", optimizer="adagrad"
    )
    assert wide.operation == "optimizer step"
    assert wide.breakdown["temporaries"] == 2 * wide.breakdown["gradients"]
    assert sum(wide.breakdown.values()) == wide.peak_bytes


def test_inference_has_no_optimizer() -> None:
    prediction = densebench.predict_memory("densenet_d2l", (2, 1, 64, 64), mode="infer", optimizer="adamw")
    assert prediction.breakdown["optimizer"] == 0
    assert prediction.optimizer is None
