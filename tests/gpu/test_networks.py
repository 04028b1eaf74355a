"""Whole networks on a GPU: equal to naive in low precision, the same bits each time, from any stream.

In float64 every architecture is compared in tests/test_equivalence.py, on every device.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.gpu.runs import (
    CPU,
    CUDA,
    PRECISIONS,
    REPEATS,
    assert_equal_bits,
    busy_network,
    check_errors,
    on_stream,
    repeatable,
    train_step,
)
from tests.networks import ARCHITECTURES, architecture, channels_last


def _check(strategy: str, name: str, precision: str, device: torch.device) -> None:
    network, x = architecture(name)
    network, x = channels_last(network.float(), x.float(), device)
    found = check_errors(strategy, network, x, PRECISIONS[precision])
    assert set(found) == {"output", "input", "gradient", "buffer"}
    assert max(error for error, _ in found.values()) > 1e-9, "nothing was rounded"


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_in_low_precision(strategy: str, name: str, precision: str) -> None:
    _check(strategy, name, precision, CUDA)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["odd", "initial_stride_2", "volumes"])
def test_low_precision_rehearsed(strategy: str, name: str, precision: str) -> None:
    _check(strategy, name, precision, CPU)


@pytest.mark.parametrize("repeats", REPEATS)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_38_repeats_are_the_same_bits(
    strategy: str, device: torch.device, autocast: torch.dtype | None, repeats: int
) -> None:
    """Sums in a fixed order, no atomics: a race would show as a difference (as in FlashAttention's tests)."""
    network, x = busy_network(strategy, device)
    state = copy.deepcopy(network.state_dict())
    with repeatable():
        expected = train_step(network, x, autocast)
        for number in range(repeats if device.type == "cuda" else 3):
            network.load_state_dict(state)
            assert_equal_bits(train_step(network, x, autocast), expected, f"in repeat {number}")


def _repeat(network: nn.Module, x: Tensor, expected: dict[str, Any], differences: Tensor) -> None:
    """One more step; counts values of its gradients and output that differ, without waiting for the device."""
    for name, value in train_step(network, x).items():
        if not name.startswith("buffer"):
            differences += (value != expected[name]).sum()


def test_18_two_streams_are_as_one_after_the_other(strategy: str, device: torch.device) -> None:
    """Scratch shared between streams would be overwritten while the other still reads it."""
    rounds = 200 if device.type == "cuda" else 3
    pairs = [busy_network(strategy, device) for _ in range(2)]
    batches = [pairs[0][1], pairs[1][1].flip(0) * 0.5]
    networks = [network for network, _ in pairs]
    serial = [copy.deepcopy(network) for network in networks]
    with repeatable():
        expected = [train_step(copy.deepcopy(n), x) for n, x in zip(networks, batches, strict=True)]
        differences = [torch.zeros((), dtype=torch.int64, device=device) for _ in networks]
        for network, x in zip(serial, batches, strict=True):
            for _ in range(rounds):
                train_step(network, x)
        streams = [on_stream(device) for _ in networks]
        _synchronize(device)
        for _ in range(rounds):
            for stream, network, x, wanted, count in zip(
                streams, networks, batches, expected, differences, strict=True
            ):
                with stream:
                    _repeat(network, x, wanted, count)
        _synchronize(device)
    assert [int(count) for count in differences] == [0, 0]
    for network, other in zip(networks, serial, strict=True):
        for name, value in other.named_buffers():
            assert torch.equal(dict(network.named_buffers())[name], value), f"{name} after {rounds} rounds"


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@pytest.mark.gpu
def test_a_device_that_is_not_the_current_one(strategy: str) -> None:
    """Triton launches on the current device; the network's need not be that one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices; there is one")
    network, x = busy_network(strategy, torch.device("cuda:1"))
    with repeatable(), torch.cuda.device(1):
        expected = train_step(copy.deepcopy(network), x)
    with repeatable(), torch.cuda.device(0):
        actual = train_step(network, x)
    assert_equal_bits(actual, expected, "on a device that is not the current one")
