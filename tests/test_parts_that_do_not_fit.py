"""What stands in another part's place, or has another width, is refused by name: a kernel would not notice."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from densebench import UnsupportedError, get_strategy, list_strategies, set_strategy
from densebench.models import DenseNet
from tests.networks import images, lone_block, small

WHOLE = [name for name in list_strategies() if get_strategy(name).bypasses == "stage"]
ANY = [name for name in list_strategies() if get_strategy(name).bypasses != "nothing"]


def _max_pool(network: DenseNet) -> None:
    network.features.transition1.pool = nn.MaxPool2d(3, 2, 1)


def _a_norm_for_a_pool(network: DenseNet) -> None:
    network.features.transition1.pool = nn.BatchNorm2d(network.features.transition1.conv.out_channels).double()


def _a_convolution_for_a_pool(network: DenseNet) -> None:
    width = network.features.transition1.conv.out_channels
    network.features.transition1.pool = nn.Conv2d(width, width, 3, padding=1, bias=False).double()


def _a_relu_for_a_pool(network: DenseNet) -> None:
    network.features.transition1.pool = nn.ReLU()


def _a_narrow_final_norm(network: DenseNet) -> None:
    network.features.norm5 = nn.BatchNorm2d(3).double()


def _a_narrow_transition(network: DenseNet) -> None:
    network.features.transition1.norm = nn.BatchNorm2d(3).double()


def _a_narrow_norm(network: DenseNet) -> None:
    network.features.denseblock1.denselayer2.norm2 = nn.BatchNorm2d(3).double()


def _a_wide_norm(network: DenseNet) -> None:
    network.features.denseblock1.denselayer2.norm1 = nn.BatchNorm2d(30).double()


def _a_layer_less(network: DenseNet) -> None:
    del network.features.denseblock2.denselayer2


def _a_relu_for_a_norm(network: DenseNet) -> None:
    network.features.denseblock1.denselayer1.norm2 = nn.ReLU()


IN_THE_TAIL = [
    (_max_pool, "transition1 pools in another way than a dense network"),
    (_a_norm_for_a_pool, "transition1 pools in another way"),
    (_a_convolution_for_a_pool, "transition1 pools in another way"),
    (_a_relu_for_a_pool, "transition1 pools in another way"),
    (_a_narrow_final_norm, "norm5 has 3 channels, not the block's"),
    (_a_narrow_transition, "transition1 has a norm of 3 and a convolution of 16 channels where 16 come"),
]
IN_THE_BLOCK = [
    (_a_narrow_norm, "denseblock1.denselayer2 has a norm of 3 and a convolution of 16 channels where 16 come"),
    (_a_wide_norm, "denseblock1.denselayer2 has a norm of 30 and a convolution of 12 channels where 12 come"),
    (_a_layer_less, "denseblock2.denselayer3 has a norm of 16 and a convolution of 16 channels where 12 come"),
    (_a_relu_for_a_norm, "denseblock1.denselayer1 is not made of norm2, relu2 and conv2"),
]


@pytest.mark.parametrize(("change", "said"), IN_THE_TAIL)
@pytest.mark.parametrize("name", WHOLE)
def test_what_is_wrong_in_a_tail(name: str, change: Callable[[DenseNet], None], said: str) -> None:
    check(name, change, said)


@pytest.mark.parametrize(("change", "said"), IN_THE_BLOCK)
@pytest.mark.parametrize("name", ANY)
def test_what_is_wrong_in_a_block(name: str, change: Callable[[DenseNet], None], said: str) -> None:
    check(name, change, said)


def check(name: str, change: Callable[[DenseNet], None], said: str) -> None:
    network = small()
    change(network)
    with pytest.raises(UnsupportedError) as caught:
        set_strategy(network, name)
    assert said in str(caught.value)
    later = small(name)
    change(later)
    with pytest.raises(UnsupportedError, match=name):
        later(images(2))


def test_a_network_cut_consistently_runs(every_strategy: str) -> None:
    network = small()
    del network.features.denseblock2.denselayer3
    network.features.norm5 = nn.BatchNorm2d(16).double()
    network.classifier = nn.Linear(16, 5).double()
    expected = network(images(3))
    assert torch.allclose(set_strategy(copy.deepcopy(network), every_strategy)(images(3)), expected, rtol=1e-11)


@pytest.mark.parametrize("name", WHOLE)
def test_inputs_of_another_width_or_dtype(name: str) -> None:
    block = lone_block(name).denseblock1
    with pytest.raises(ValueError, match="input has 6 channels, the dense block takes 5"):
        block(images(2, 8, 6))
    with pytest.raises(TypeError, match=r"input is torch.float32, a norm's weight torch.float64; cast one"):
        block(images(2, 8, 5).float())


def test_one_norm_in_two_layers(every_strategy: str) -> None:
    network = small()
    block = network.features.denseblock2
    block.denselayer1.norm2 = block.denselayer2.norm2
    ours = set_strategy(copy.deepcopy(network), every_strategy)
    for seed in range(2):
        assert torch.allclose(ours(images(3, seed=seed)), network(images(3, seed=seed)), rtol=1e-11)
    expected = dict(network.named_buffers())
    assert all(torch.allclose(value, expected[name], rtol=1e-11) for name, value in ours.named_buffers())
