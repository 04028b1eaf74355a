"""The same numbers as other people's implementations, from the same weights: outputs, gradients, statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from densebench import build_model
from densebench.contenders import get_contender
from tests.comparison import assert_same, step
from tests.networks import draw_norms, images

DENSENETS = ["densenet121", "densenet161", "densenet169", "densenet201"]
RESNETS = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]


def _peer(package: str, name: str, **options: Any) -> nn.Module:
    """Their network; a skip where the extra is not installed."""
    contender = get_contender(package)
    missing = contender.missing()
    if missing:
        pytest.skip(missing)
    return contender.build(name, **options)


def _pair(peer: nn.Module, name: str, **options: Any) -> tuple[nn.Module, nn.Module]:
    """A peer with norms drawn at random, and ours from its state; both in float64."""
    draw_norms(peer)
    peer = peer.double()
    with torch.device("meta"):  # without drawing weights that are not kept
        ours = build_model(name, num_classes=10, **options)
    state = {key: value.clone() for key, value in peer.state_dict().items()}
    ours.load_state_dict(state, assign=True)
    return ours, peer


@pytest.mark.parametrize("name", DENSENETS)
def test_densenet_is_torchvisions(name: str) -> None:
    ours, theirs = _pair(_peer("torchvision", name, num_classes=10), name)
    x = images(3, 32)
    assert_same(step(ours, x), step(theirs, x))


def test_strategy_is_torchvisions(strategy: str) -> None:
    """Not only by way of naive."""
    ours, theirs = _pair(_peer("torchvision", "densenet121", num_classes=10), "densenet121", strategy=strategy)
    x = images(2, 64)
    assert_same(step(ours, x), step(theirs, x))


@pytest.mark.parametrize("name", RESNETS)
def test_resnet_is_torchvisions(name: str) -> None:
    ours, theirs = _pair(_peer("torchvision", name, num_classes=10), name)
    x = images(3, 32)
    assert_same(step(ours, x), step(theirs, x))


@pytest.mark.parametrize("name", ["densenet121", "resnet18", "resnet50"])
def test_evaluation_is_torchvisions(name: str) -> None:
    """By running statistics, gradients too."""
    ours, theirs = _pair(_peer("torchvision", name, num_classes=10), name)
    x = images(3, 32)
    assert_same(step(ours.eval(), x), step(theirs.eval(), x))


def test_dropout_is_torchvisions() -> None:
    """The same masks from the same random numbers."""
    peer = _peer("torchvision", "densenet121", num_classes=10, drop_rate=0.2)
    ours, theirs = _pair(peer, "densenet121", drop_rate=0.2)
    x, results = images(3, 32), []
    for network in (ours, theirs):
        torch.manual_seed(5)
        results.append(step(network, x))
    assert_same(*results)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_densenet_is_timms(training: bool) -> None:
    ours, theirs = _pair(_peer("timm", "densenet121", num_classes=10), "densenet121")
    x = images(3, 32)
    assert_same(step(ours.train(training), x), step(theirs.train(training), x))


@pytest.mark.parametrize("name", [*DENSENETS, *RESNETS])
def test_state_has_torchvisions_names(name: str) -> None:
    """Names, shapes, dtypes and order, so that published weights load unchanged."""
    with torch.device("meta"):
        ours, theirs = build_model(name).state_dict(), _peer("torchvision", name).state_dict()
    described = [[(key, value.shape, value.dtype) for key, value in state.items()] for state in (ours, theirs)]
    assert described[0] == described[1]


@pytest.mark.parametrize("name", ["densenet121", "resnet18"])
def test_weights_are_drawn_like_torchvisions(name: str) -> None:
    """The same distribution, tensor by tensor: equal deviations within five standard errors."""
    ours, theirs = build_model(name).state_dict(), _peer("torchvision", name).state_dict()
    for key, value in theirs.items():
        if value.dim() < 2:
            if "classifier" not in key and "fc" not in key:
                assert torch.equal(ours[key], value), key
        else:
            error = 5 * 2**0.5 / (2 * value.numel()) ** 0.5  # of the difference of two deviations
            assert float(ours[key].std()) == pytest.approx(float(value.std()), rel=error), key
