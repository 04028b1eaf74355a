"""Converted, a network gives the same numbers from the same tensors, and is otherwise what it was."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from densebench import convert, set_strategy
from densebench.models.features import Features
from tests.comparison import assert_same, step
from tests.conversion.networks import every_library, monai, theirs, timm, torchvision, torchxrayvision
from tests.networks import images, small


@every_library
def test_the_same_numbers(build: Callable[..., nn.Module], every_strategy: str) -> None:
    network = theirs(build)
    ours = convert(copy.deepcopy(network), every_strategy)
    assert {module.strategy for module in ours.modules() if isinstance(module, Features)} == {every_strategy}
    for seed, mode in enumerate((True, True, False)):
        x = images(3, 32, seed=seed)
        expected, actual = (step(each.train(mode), x) for each in (network, ours))
        assert_same(actual, expected)


@pytest.mark.parametrize("size", [32, (33, 40, 34)])
def test_volumes(every_strategy: str, size: Any) -> None:
    network = theirs(monai, spatial_dims=3, in_channels=1)
    ours = convert(copy.deepcopy(network), every_strategy)
    for seed, mode in enumerate((True, False)):
        x = images(2, 40, 1, seed=seed, dims=3)
        x = x[..., :32, :32, :32] if size == 32 else x[..., :33, :, :34]
        expected, actual = (step(each.train(mode), x) for each in (network, ours))
        assert_same(actual, expected)


@every_library
def test_tensors_stay_the_same_under_the_same_names(build: Callable[..., nn.Module]) -> None:
    network = theirs(build)
    before = network.state_dict(keep_vars=True)
    parameters = set(network.parameters())
    converted = convert(network)
    assert converted is network
    after = network.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert set(network.parameters()) == parameters


@every_library
def test_states_load_from_before_and_after(build: Callable[..., nn.Module]) -> None:
    network = theirs(build)
    state = copy.deepcopy(network.state_dict())
    converted = convert(theirs(build), "naive")
    nn.init.ones_(next(converted.parameters()))
    assert str(converted.load_state_dict(state)) == "<All keys matched successfully>"
    assert all(torch.equal(value, state[name]) for name, value in converted.state_dict().items())
    other = theirs(build)
    assert str(other.load_state_dict(converted.state_dict())) == "<All keys matched successfully>"


@every_library
def test_modes_and_frozen_parameters_stay(build: Callable[..., nn.Module]) -> None:
    network = theirs(build).eval()
    kinds = (nn.BatchNorm2d, nn.Conv2d)
    drawn = [module for module in network.modules() if isinstance(module, kinds)]
    for module in drawn[::3]:
        module.train()
        module.weight.requires_grad_(False)
    layer = network.features.denseblock2.denselayer2
    for module in (layer, *layer.children()):
        module.training = not module.training
    modes = [module.training for module in drawn]
    by_name = {name: module.training for name, module in network.named_modules()}
    frozen = [name for name, parameter in network.named_parameters() if not parameter.requires_grad]
    assert frozen
    convert(network)
    assert [m.training for m in network.modules() if isinstance(m, kinds)] == modes
    assert [name for name, parameter in network.named_parameters() if not parameter.requires_grad] == frozen
    assert network.features.denseblock2.denselayer2 is not layer
    assert network.features.denseblock2.denselayer2.training
    assert not network.features.denseblock2.denselayer1.training
    assert not network.features.training
    for name, module in network.named_modules():
        assert module.training == by_name.get(name, module.training), name


@every_library
def test_heads_and_tails_are_taken_over(build: Callable[..., nn.Module]) -> None:
    (features,) = [m for m in convert(theirs(build)).modules() if isinstance(m, Features)]
    first, last = features.stages()
    assert (first.head is None) == (build is timm)  # whose norm and ReLU are one module
    assert first.tail is not None
    assert (last.head, len(last.layers)) == (None, 3)


@every_library
def test_survives_copies_and_pickles(build: Callable[..., nn.Module]) -> None:
    network = convert(theirs(build))
    x = images(2, 32)
    expected = step(copy.deepcopy(network), x)
    for again in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert list(again.state_dict()) == list(network.state_dict())
        assert_same(step(again, x), expected)


OPTIONS = [(torchvision, "drop_rate"), (timm, "proj_drop_rate"), (torchxrayvision, "drop_rate")]


@pytest.mark.parametrize(("build", "option"), OPTIONS)
def test_dropout_is_theirs(build: Callable[..., nn.Module], option: str) -> None:
    network = theirs(build, **{option: 0.3})
    ours = convert(copy.deepcopy(network), "naive")
    results = []
    for each in (network, ours):
        torch.manual_seed(3)
        results.append(step(each, images(2, 32)))
    assert_same(results[1], results[0])


def test_recomputing_networks_become_plain_ones() -> None:
    network = theirs(torchvision, memory_efficient=True)
    expected = step(theirs(torchvision), images(3, 32))
    assert_same(step(convert(network), images(3, 32)), expected)


def test_timms_intermediate_maps() -> None:
    network = theirs(timm).eval()
    ours = convert(copy.deepcopy(network))
    x = images(2, 32)
    with torch.no_grad():
        expected, actual = (each.forward_intermediates(x, intermediates_only=True) for each in (network, ours))
    assert [a.shape for a in actual] == [e.shape for e in expected]
    assert all(torch.allclose(a, e) for a, e in zip(actual, expected, strict=True))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = theirs(torchvision), theirs(monai)
        self.again = self.left.features  # one module under two names

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x) + self.again(x).mean()


def test_part_of_a_larger_model() -> None:
    model = Pair()
    expected = step(copy.deepcopy(model), images(2, 32))
    assert convert(model) is model
    assert model.again is model.left.features
    assert_same(step(model, images(2, 32)), expected)


def test_a_sequence_inside_a_sequence() -> None:
    outer = theirs(torchvision).features
    outer.append(nn.Sequential(nn.Conv2d(20, 8, 1).double(), theirs(monai).features.denseblock1))
    expected = step(copy.deepcopy(outer), images(2, 32))
    features = convert(outer)
    assert [type(module) for module in (features, features[-1])] == [Features, Features]
    assert_same(step(features, images(2, 32)), expected)


def test_functional_calls_by_their_names() -> None:
    network = theirs(monai).eval()
    state = dict(network.state_dict())
    expected = torch.func.functional_call(network, state, images(2, 32))
    actual = torch.func.functional_call(convert(network, "naive"), state, images(2, 32))
    assert_same({"output": actual.detach()}, {"output": expected.detach()})


def test_attributes_of_the_sequence_stay() -> None:
    network = theirs(torchvision)
    network.features.out_channels = 20  # what torchvision's detectors ask a backbone for
    assert convert(network).features.out_channels == 20


def test_the_sequence_itself_comes_back_converted() -> None:
    sequence = theirs(torchvision).features
    expected = step(copy.deepcopy(sequence), images(2, 32))
    features = convert(sequence)
    assert isinstance(features, Features)
    assert_same(step(features, images(2, 32)), expected)


def test_converted_again_only_the_strategy_changes() -> None:
    network = convert(theirs(torchvision), "naive")
    features = network.features
    assert convert(network, "fused").features is features
    assert features.strategy == "fused"
    assert convert(small(), "checkpointed").strategy == "checkpointed"


def test_on_meta_and_in_mixed_precision() -> None:
    with torch.device("meta"):
        network = torchvision()
        assert isinstance(convert(network, "naive").features, Features)
    network = theirs(torchvision).float()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.half()
    assert isinstance(convert(network, "naive").features, Features)


@every_library
def test_hooks_on_what_stays_go_on(build: Callable[..., nn.Module]) -> None:
    network = theirs(build)
    seen: list[str] = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    convert(network, "naive")
    assert seen == []
    network(images(1, 32).expand(2, -1, -1, -1))
    assert seen == [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)]


def test_random_numbers_are_not_drawn() -> None:
    network = theirs(torchvision)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    convert(network)
    assert torch.equal(torch.rand(3), expected)


def test_set_strategy_goes_on_from_there() -> None:
    network = convert(theirs(monai), "naive")
    expected = step(copy.deepcopy(network), images(3, 32))
    assert_same(step(set_strategy(network, "fused_recompute"), images(3, 32)), expected)
