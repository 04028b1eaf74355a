"""Memory and time of a step on a GPU: what is left of it, and what comes after it did not fit."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from densebench.measure.timing import host_seconds
from densebench.models import build_model
from densebench.registry import get_strategy
from tests.comparison import assert_same, buffers
from tests.gpu.runs import CPU, CUDA, busy_network, lone_stage, repeatable, scarce_memory, train_step
from tests.networks import with_strategy

NAIVE_FLOAT32 = 1e-3  # a fault shows in the first digit; how exact float32 is, other tests say


def _ends_without_memory(step: Callable[[], object]) -> bool:
    try:
        step()
    except torch.OutOfMemoryError:
        return True
    return False


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_42_after_a_forward_that_did_not_fit(strategy: str, device: torch.device, share: float) -> None:
    """Buffers are as before, nothing stays allocated, and the next smaller step is right.

    A strategy that calls the layers one by one has moved those of the layers before, as plain modules do.
    """
    network, x = lone_stage(strategy, device)
    few, trial = x[: len(x) // 4], copy.deepcopy(network)
    train_step(trial, x)  # what is compiled or kept once is there from now on
    trial.zero_grad()
    before, after, allocated = buffers(network), buffers(trial), _allocated(device)
    with repeatable():
        with scarce_memory(device, share, lambda: trial(x)):
            failed = _ends_without_memory(lambda: network(x))
        assert failed, "it fitted: the limit limits nothing"
        assert _allocated(device) == allocated
        for name, value in buffers(network).items():
            unmoved = torch.equal(value, before[name])
            layer_by_layer = get_strategy(strategy).bypasses != "stage"
            assert unmoved or (layer_by_layer and torch.equal(value, after[name])), name
        expected = train_step(with_strategy(copy.deepcopy(network), "naive"), few)
        assert_same(train_step(network, few), expected, NAIVE_FLOAT32)


@pytest.mark.parametrize("share", [0.6, 0.9])
def test_42_after_a_backward_that_did_not_fit(strategy: str, device: torch.device, share: float) -> None:
    """The forward has moved the running statistics; from there on a smaller step is right."""
    network, x = lone_stage(strategy, device)
    few, trial = x[: len(x) // 4], copy.deepcopy(network)
    train_step(trial, x)
    trial.zero_grad()
    allocated = _allocated(device)
    with repeatable():
        with scarce_memory(device, share, lambda: _whole_step(trial, x)):
            failed = _ends_without_memory(lambda: _whole_step(network, x))
        assert failed, "it fitted: the limit limits nothing"
        network.zero_grad()
        assert _allocated(device) == allocated
        expected = train_step(with_strategy(copy.deepcopy(network), "naive"), few)
        assert_same(train_step(network, few), expected, NAIVE_FLOAT32)


def _whole_step(network: nn.Module, x: Tensor) -> None:
    """A step that leaves nothing behind when it succeeds."""
    train_step(network, x)
    network.zero_grad()


def _allocated(device: torch.device) -> int:
    gc.collect()
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_42_nothing_is_left_allocated_after_a_step(strategy: str, autocast: torch.dtype | None) -> None:
    network, x = busy_network(strategy, CUDA)
    for _ in range(2):  # cuBLAS takes a workspace once
        train_step(network, x, autocast)
    network.zero_grad()
    before = _allocated(CUDA)
    train_step(network, x, autocast)
    network.zero_grad()
    assert _allocated(CUDA) == before
    with torch.no_grad():
        network.eval()(x)
    assert _allocated(CUDA) == before


@pytest.mark.gpu
@pytest.mark.nightly
def test_host_is_faster_than_the_device(record_property: Any) -> None:
    """A fused step of DenseNet-121 at batch 64 in bfloat16: the device need not wait for its launches.

    How much faster is measured in benchmarks/ (`host_time_s`).
    """
    network = build_model("densenet121", strategy="fused").to(CUDA, memory_format=torch.channels_last)
    x = torch.randn(64, 3, 224, 224, device=CUDA).to(memory_format=torch.channels_last)
    gradient = torch.randn(64, 1000, device=CUDA)

    def step() -> None:
        network.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            output = network(x)
        output.backward(gradient.to(output.dtype))

    for _ in range(3):
        step()
    host = host_seconds(step, CUDA)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(5):
        step()
    torch.cuda.synchronize()
    whole = (time.perf_counter() - start) / 5
    record_property("host_ms", 1e3 * (host or 0))
    record_property("step_ms", 1e3 * whole)
    assert host is not None
    assert host < whole


def test_scarcity_ends_a_step_that_would_succeed() -> None:
    network, x = lone_stage("naive", CPU)
    with scarce_memory(CPU, 0.5, lambda: network(x)):
        assert _ends_without_memory(lambda: network(x))
    assert not _ends_without_memory(lambda: network(x))
