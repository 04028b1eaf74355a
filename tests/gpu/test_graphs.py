"""A training step as a CUDA graph, or forward and backward as one each; on the CPU nothing is recorded."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.comparison import GATE, assert_same
from tests.gpu.runs import (
    Training,
    as_graphs,
    assert_equal_bits,
    busy_network,
    captured,
    repeatable,
    train_step,
)

PRECISIONS = {"float64": (torch.float64, None), "bfloat16": (torch.float32, torch.bfloat16)}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_37_ten_replays_are_ten_steps(strategy: str, device: torch.device, precision: str) -> None:
    """Each on another batch; parameters and all buffers, the counters too, which must not be replaced."""
    dtype, autocast = PRECISIONS[precision]
    network, x = busy_network(strategy, device, dtype)
    if device.type == "cuda":
        x = x[:8]
    with repeatable():
        eager = Training(copy.deepcopy(network), x, autocast)
        graphed = Training(network, x, autocast)
        replay = captured(graphed)
        addresses = {name: value.data_ptr() for name, value in network.state_dict().items()}
        for number in range(10):
            for training in (eager, graphed):
                training.x.copy_(x * (1 + 0.1 * number))
            eager.step()
            replay()
    assert_same(graphed.state(), eager.state(), GATE)
    assert_equal_bits(graphed.state(), eager.state(), "from ten eager steps")
    assert {name: value.data_ptr() for name, value in network.state_dict().items()} == addresses
    counters = [value for name, value in graphed.state().items() if name.endswith("num_batches_tracked")]
    assert {int(counter) for counter in counters} == {10}


@pytest.mark.parametrize("name", ["fused", "fused_recompute"])
def test_37_graphed_callables_are_the_network(name: str, device: torch.device) -> None:
    """What PyTorch's notes offer to users whose batches are too small to hide the host's work."""
    network, x = busy_network(name, device)
    with repeatable():
        eager, graphed = copy.deepcopy(network), as_graphs(network, x)
        for number in range(3):
            again = x * (1 + 0.1 * number)
            assert_same(train_step(graphed, again), train_step(eager, again), GATE)
