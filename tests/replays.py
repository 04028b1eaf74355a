"""Replays wherever a test wants them, counted; networks that are stepped with them and without."""

from __future__ import annotations

import collections
import copy
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import densebench
from densebench.execution import autograd
from densebench.models.layers import DenseBlock
from densebench.replay import tracks
from tests.comparison import Quantities, everything, upstream

STEPS = 4  # as it is, recorded, played back twice
Step = Callable[[nn.Module, Tensor], Quantities]


class Counts(collections.Counter[str]):
    """How many runs were "played", "recorded" and "plain"."""


def replay_everywhere(monkeypatch: pytest.MonkeyPatch) -> Counts:
    """Replays of whatever dtype, also where nothing is compiled."""
    counts, start = Counts(), tracks.Track.start

    def counted(self: tracks.Track) -> tracks.Pass:
        found = start(self)
        counts[type(found).__name__.strip("_").lower()] += 1
        return found

    monkeypatch.setattr(tracks.Track, "start", counted)
    monkeypatch.setattr(tracks, "worthwhile", lambda x, dtype: True)
    return counts


def tracks_in(network: nn.Module) -> Iterator[tracks.Track]:
    """Of all stages' forwards and backwards."""
    for block in network.modules():
        if isinstance(block, DenseBlock):
            for forward in tracks.tracks_of(block).values():
                yield forward
                yield from forward.following.values()


def train(network: nn.Module, x: Tensor) -> Quantities:
    """A step of SGD: output, gradients and buffers."""
    torch.manual_seed(0)  # for dropout
    network.zero_grad()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    output = network(x)
    output.backward(upstream(output))
    found = everything(network, output=output, input=x.grad)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.grad is not None:
                parameter -= 0.05 * parameter.grad
    return found


def infer(network: nn.Module, x: Tensor) -> Quantities:
    with torch.no_grad():
        return everything(network, output=network(x))


def assert_same_bits(actual: Quantities, expected: Quantities, what: str = "") -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        other = actual[name]
        assert (other is None) == (value is None), f"{name} {what}"
        assert value is None or other is None or torch.equal(other, value), f"{name} differs {what}"


class Pair:
    """A network whose steps are replayed, and its copy whose steps are not; after each, the same bits."""

    def __init__(self, network: nn.Module, strategy: str = "fused") -> None:
        self.replayed = densebench.set_strategy(network, strategy)
        self.plain = copy.deepcopy(self.replayed)

    def step(self, step: Step, *inputs: Any, same: Callable[[Quantities, Quantities], None] | None = None) -> None:
        found = step(self.replayed, *inputs)
        with mock.patch.object(autograd, "replayable", return_value=False):
            (same or assert_same_bits)(found, step(self.plain, *inputs))

    def both(self, change: Callable[[nn.Module], object]) -> None:
        change(self.replayed)
        change(self.plain)
