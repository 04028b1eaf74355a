"""Any module can be predicted, and is left as it was."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import densebench
from densebench.contenders import get_contender
from densebench.measure.memory import measure_peak
from densebench.workload import Workload
from tests.conftest import lack
from tests.prediction.table import TOLERANCE

CPU = torch.device("cpu")


def _monai(request: pytest.FixtureRequest, **options: Any) -> nn.Module:
    try:
        networks = importlib.import_module("monai.networks.nets")
    except ImportError:
        lack(request.config, "monai is not installed; pip install 'densebench[peers]'")
    short = {"init_features": 16, "growth_rate": 12, "block_config": (3, 4)}
    return networks.DenseNet(in_channels=1, out_channels=2, **{**short, **options})


def _error(network: nn.Module, input: Tensor, mode: str, autocast: torch.dtype | None = None) -> float:
    predicted = densebench.predict_memory(network, input.shape, mode=mode, device="cpu", autocast=autocast)
    measured = measure_peak(lambda: Workload(network, input, mode, autocast), CPU, repeats=1)
    # The network existed before: its parameters are in the prediction, and not in what was seen allocated.
    existing = sum(predicted.breakdown[name] for name in ("parameters", "buffers"))
    return predicted.peak_bytes / (measured.peak_allocated_bytes + existing + input.nbytes) - 1


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_three_dimensions(mode: str, request: pytest.FixtureRequest) -> None:
    network = _monai(request, spatial_dims=3)
    assert abs(_error(network, torch.randn(2, 1, 32, 32, 32), mode)) <= TOLERANCE


def test_three_dimensions_channels_last(request: pytest.FixtureRequest) -> None:
    network = _monai(request, spatial_dims=3).to(memory_format=torch.channels_last_3d)
    input = torch.randn(2, 1, 32, 32, 32)
    input = input.to(memory_format=torch.channels_last_3d)
    assert abs(_error(network, input, "train")) <= TOLERANCE


def test_monai_in_two_dimensions_with_dropout(request: pytest.FixtureRequest) -> None:
    network = _monai(request, spatial_dims=2, dropout_prob=0.2)
    assert abs(_error(network, torch.randn(8, 1, 96, 96), "train", torch.bfloat16)) <= TOLERANCE


class _Forked(nn.Module):
    """Two outputs in a dictionary, tied weights, and a frozen part."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.left = nn.Conv2d(16, 16, 3, padding=1)
        self.right = nn.Conv2d(16, 16, 3, padding=1)
        self.right.weight = self.left.weight
        self.stem.requires_grad_(False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x).relu()
        return {"left": self.left(x).mean((2, 3)), "right": self.right(x)}


def test_outputs_in_a_dictionary_tied_and_frozen_weights() -> None:
    prediction = densebench.predict_memory(_Forked(), (8, 3, 32, 32), device="cpu")
    convolution = 16 * 16 * 9 + 2 * 16
    assert prediction.breakdown["parameters"] == 4 * (3 * 16 * 9 + 16 + convolution)
    assert prediction.breakdown["gradients"] == 4 * convolution
    assert prediction.flops_model is None
    # The stem forward only; the others forward and for their weight, as nothing before them is trained.
    assert prediction.flops_executed == 2 * 8 * 32 * 32 * (3 * 16 * 9 + 2 * 2 * 16 * 16 * 9)


def test_the_network_is_left_as_it_was() -> None:
    network = densebench.densenet_bc(22, strategy="shared_buffer").eval()
    before = {name: (t.data_ptr(), t._version, t.dtype) for name, t in network.state_dict(keep_vars=True).items()}
    densebench.predict_memory(network, (4, 3, 32, 32), "fused", dtype="float64", memory_format="channels_last")
    after = {name: (t.data_ptr(), t._version, t.dtype) for name, t in network.state_dict(keep_vars=True).items()}
    assert after == before
    assert network.strategy == "shared_buffer"
    assert not network.training
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_module_keeps_its_own_strategy() -> None:
    shape = (4, 3, 32, 32)
    named = densebench.predict_memory("densenet_d2l", (4, 1, 64, 64), "shared_buffer", device="cpu")
    own = densebench.predict_memory(
        densebench.densenet_d2l(strategy="shared_buffer"),
        (4, 1, 64, 64),
        memory_format="channels_last",
        device="cpu",
    )
    assert own.peak_bytes == named.peak_bytes
    other = densebench.predict_memory(densebench.densenet_bc(22), shape, "checkpointed", device="cpu")
    assert other.activation_bytes < densebench.predict_memory(densebench.densenet_bc(22), shape).activation_bytes


def test_torchvision_costs_what_naive_does(request: pytest.FixtureRequest) -> None:
    contender = get_contender("torchvision")
    if missing := contender.missing():
        lack(request.config, missing)
    theirs = densebench.predict_memory(contender.build("densenet121"), (2, 3, 96, 96))
    ours = densebench.predict_memory("densenet121", (2, 3, 96, 96), memory_format="contiguous")
    assert theirs.peak_bytes == pytest.approx(ours.peak_bytes, rel=0.001)
    assert theirs.flops_executed == ours.flops_executed
