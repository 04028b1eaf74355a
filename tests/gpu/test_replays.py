"""Steps that are played back, on the device: the same bits as without, in no more memory and less host time."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch

from densebench.measure.timing import host_seconds
from densebench.replay import tracks
from tests.comparison import assert_same
from tests.gpu.runs import CUDA, assert_equal_bits, busy_network, repeatable, train_step

STRATEGIES = ["fused", "fused_recompute"]
STEPS = 5  # as it is, recorded, played back


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_played_back_steps_are_the_same_bits(
    strategy: str, device: torch.device, autocast: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each on other images; the last batch is smaller."""
    network, x = busy_network(strategy, device)
    plain = copy.deepcopy(network)
    batches = [x * (1 + 0.1 * number) for number in range(STEPS)] + [x[:-1]]
    with repeatable():
        for number, batch in enumerate(batches):
            monkeypatch.setenv(tracks.SWITCH, "1")
            found = train_step(network, batch, autocast)
            monkeypatch.setenv(tracks.SWITCH, "0")
            assert_equal_bits(found, train_step(plain, batch, autocast), f"in step {number + 1}")


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_saved_tensors_that_were_offloaded(
    strategy: str, device: torch.device, autocast: torch.dtype | None
) -> None:
    """From pinned memory they come back contiguous, whatever they were: padded rows, channels-last maps."""
    network, x = busy_network(strategy, device)
    plain = copy.deepcopy(network)
    with repeatable():
        for number in range(STEPS):
            offloaded = number == STEPS - 1
            hooks = (
                torch.autograd.graph.save_on_cpu(pin_memory=x.is_cuda) if offloaded else contextlib.nullcontext()
            )
            with hooks:
                found = train_step(network, x, autocast)
            expected = train_step(plain, x, autocast)
            assert_same(found, expected, 1e-3)


@pytest.mark.gpu
def test_no_more_memory(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = busy_network(strategy, CUDA)
    peaks = {}
    for switch in ("1", "0"):
        monkeypatch.setenv(tracks.SWITCH, switch)
        for _ in range(3):
            train_step(network, x, torch.bfloat16)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        train_step(network, x, torch.bfloat16)
        peaks[switch] = torch.cuda.max_memory_allocated()
    assert 0.95 * peaks["0"] < peaks["1"] <= peaks["0"]


@pytest.mark.gpu
def test_less_host_time(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = busy_network(strategy, CUDA)

    def step() -> None:
        network(x).sum().backward()

    seconds = {}
    for switch in ("1", "0"):
        monkeypatch.setenv(tracks.SWITCH, switch)
        for _ in range(3):
            step()
        seconds[switch] = host_seconds(step, CUDA) or 0.0
    assert seconds["1"] < 0.7 * seconds["0"]
