"""Memory of a step on a GPU: what is left of it, and what comes after it did not fit."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from densebench.measure.outcome import is_out_of_memory
from densebench.registry import get_strategy
from tests.comparison import assert_same, buffers
from tests.gpu.runs import CPU, CUDA, busy_network, lone_stage, repeatable, scarce_memory, train_step
from tests.networks import with_strategy

NAIVE_FLOAT32 = 1e-3  # a fault shows in the first digit; how exact float32 is, other tests say
SHARES = [0.2, 0.4, 0.6]  # nearer to 1 it may fit: without a workspace cuDNN takes an algorithm that needs none


def _ends_without_memory(step: Callable[[], object]) -> bool:
    try:
        step()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return True
    return False


@pytest.mark.parametrize("share", SHARES)
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


@pytest.mark.parametrize("share", SHARES)
def test_42_after_a_backward_that_did_not_fit(strategy: str, device: torch.device, share: float) -> None:
    """The forward has moved the running statistics; from there on a smaller step is right."""
    network, x = lone_stage(strategy, device)
    few, trial = x[: len(x) // 4], copy.deepcopy(network)
    train_step(trial, x)
    trial.zero_grad()
    allocated = _allocated(device)
    with repeatable():
        backward, tried = _backward_of(network, x), _backward_of(trial, x)
        with scarce_memory(device, share, tried):
            failed = _ends_without_memory(backward)
        assert failed, "it fitted: the limit limits nothing"
        del backward, tried  # and all that the forwards kept
        network.zero_grad()
        trial.zero_grad()
        assert _allocated(device) == allocated
        expected = train_step(with_strategy(copy.deepcopy(network), "naive"), few)
        assert_same(train_step(network, few), expected, NAIVE_FLOAT32)


def _backward_of(network: nn.Module, x: Tensor) -> Callable[[], None]:
    """The rest of a step whose forward has been run."""
    output = network(x.detach().clone(memory_format=torch.preserve_format).requires_grad_())
    gradient = torch.ones_like(output)
    return lambda: output.backward(gradient)


def _allocated(device: torch.device) -> int:
    """Bytes in use; what is not is given back, so that what comes next lies in no larger piece's remains."""
    gc.collect()
    if device.type == "cpu":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


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


def test_scarcity_ends_a_step_that_would_succeed() -> None:
    network, x = lone_stage("naive", CPU)
    with scarce_memory(CPU, 0.5, lambda: network(x)):
        assert _ends_without_memory(lambda: network(x))
    assert not _ends_without_memory(lambda: network(x))
