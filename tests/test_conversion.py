"""Other people's DenseNets, converted: the same numbers from the same tensors, or a sentence and no change."""

from __future__ import annotations

import copy
import importlib
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from densebench import UnsupportedError, convert, set_strategy
from densebench.contenders import get_contender
from densebench.models.densenet import Features
from tests.comparison import Quantities, assert_same, step
from tests.networks import draw_norms, images, small

SIZES: dict[str, Any] = {"growth_rate": 4, "block_config": (2, 3), "bn_size": 2}


def _torchvision(**options: Any) -> nn.Module:
    return _module("torchvision.models").DenseNet(**SIZES, num_init_features=8, num_classes=5, **options)


def _timm(**options: Any) -> nn.Module:
    return _module("timm.models.densenet").DenseNet(**SIZES, num_classes=5, **options)


def _monai(**options: Any) -> nn.Module:
    sizes = {"spatial_dims": 2, "in_channels": 3, "out_channels": 5, "init_features": 8} | SIZES | options
    return _module("monai.networks.nets.densenet").DenseNet(**sizes)


def _torchxrayvision(**options: Any) -> nn.Module:
    models = _module("torchxrayvision").models
    return models.DenseNet(**SIZES, num_init_features=8, num_classes=5, in_channels=3, **options)


def _module(name: str) -> Any:
    """A peer's module; a skip where the extra is not installed. All of them import torchvision."""
    package = name.partition(".")[0]
    for needed in ("torchvision", package):
        missing = get_contender(needed).missing() if needed != "torchxrayvision" else None
        if missing:
            pytest.skip(missing)
    return importlib.import_module(name) if package != "torchxrayvision" else pytest.importorskip(name)


BUILDERS = (_torchvision, _timm, _monai, _torchxrayvision)
every_library = pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__[1:])


def theirs(build: Callable[..., nn.Module], **options: Any) -> nn.Module:
    torch.manual_seed(0)
    network = build(**options)
    draw_norms(network)
    return network.double()


def by_our_names(quantities: Quantities) -> Quantities:
    return {name.replace(".layers.", "."): value for name, value in quantities.items()}


@every_library
def test_the_same_numbers(build: Callable[..., nn.Module], every_strategy: str) -> None:
    network = theirs(build)
    ours = convert(copy.deepcopy(network), every_strategy)
    assert {module.strategy for module in ours.modules() if isinstance(module, Features)} == {every_strategy}
    for seed, mode in enumerate((True, True, False)):
        x = images(3, 32, seed=seed)
        expected, actual = (step(each.train(mode), x) for each in (network, ours))
        assert_same(by_our_names(actual), by_our_names(expected))


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
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    norms[2].train()
    norms[1].weight.requires_grad_(False)
    network.features.train()
    modes = {name: module.training for name, module in network.named_modules()}
    convert(network)
    converted = {name: module.training for name, module in network.named_modules()}
    assert {name: modes[name] for name in modes.keys() & converted.keys()} == {
        name: converted[name] for name in modes.keys() & converted.keys()
    }
    assert [m.training for m in network.modules() if isinstance(m, nn.BatchNorm2d)] == [n.training for n in norms]
    assert not any(parameter is norms[1].weight for parameter in network.parameters() if parameter.requires_grad)


@every_library
def test_heads_and_tails_are_taken_over(build: Callable[..., nn.Module]) -> None:
    (features,) = [m for m in convert(theirs(build)).modules() if isinstance(m, Features)]
    first, last = features.stages()
    assert first.head is not None
    assert first.head.pool is not None
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


@pytest.mark.parametrize(("build", "option"), [(_torchvision, "drop_rate"), (_timm, "proj_drop_rate")])
def test_dropout_is_theirs(build: Callable[..., nn.Module], option: str) -> None:
    network = theirs(build, **{option: 0.3})
    ours = convert(copy.deepcopy(network), "naive")
    results = []
    for each in (network, ours):
        torch.manual_seed(3)
        results.append(by_our_names(step(each, images(2, 32))))
    assert_same(results[1], results[0])


def test_recomputing_networks_become_plain_ones() -> None:
    network = theirs(_torchvision, memory_efficient=True)
    expected = step(theirs(_torchvision), images(3, 32))
    assert_same(step(convert(network), images(3, 32)), expected)


def test_timms_intermediate_maps() -> None:
    network = theirs(_timm).eval()
    ours = convert(copy.deepcopy(network))
    x = images(2, 32)
    with torch.no_grad():
        expected, actual = (each.forward_intermediates(x, intermediates_only=True) for each in (network, ours))
    assert [a.shape for a in actual] == [e.shape for e in expected]
    assert all(torch.allclose(a, e) for a, e in zip(actual, expected, strict=True))


def test_part_of_a_larger_model() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = theirs(_torchvision), theirs(_monai)
            self.again = self.left.features  # one module under two names

        def forward(self, x: Tensor) -> Tensor:
            return self.left(x) + self.right(x) + self.again(x).mean()

    model = Pair()
    expected = by_our_names(step(copy.deepcopy(model), images(2, 32)))
    assert convert(model) is model
    assert model.again is model.left.features
    assert_same(by_our_names(step(model, images(2, 32))), expected)


def test_the_sequence_itself_comes_back_converted() -> None:
    sequence = theirs(_torchvision).features
    expected = step(copy.deepcopy(sequence), images(2, 32))
    features = convert(sequence)
    assert isinstance(features, Features)
    assert_same(step(features, images(2, 32)), expected)


def test_converted_again_only_the_strategy_changes() -> None:
    network = convert(theirs(_torchvision), "naive")
    features = network.features
    assert convert(network, "fused").features is features
    assert features.strategy == "fused"
    assert convert(small(), "checkpointed").strategy == "checkpointed"


def test_on_meta_nothing_can_be_confirmed() -> None:
    with torch.device("meta"):
        network = _torchvision()
    assert isinstance(convert(network, "naive").features, Features)


def _without_batch_norm(network: nn.Module) -> None:
    network.features.denseblock1.denselayer2.norm1 = nn.GroupNorm(2, 12).double()


def _with_hook(network: nn.Module) -> None:
    network.features.denseblock2.register_forward_hook(lambda *_: None)


def _with_other_activation(network: nn.Module) -> None:
    network.features.transition1.relu = nn.SiLU()


def _with_a_bias(network: nn.Module) -> None:
    conv = network.features.denseblock2.denselayer1.conv2
    network.features.denseblock2.denselayer1.conv2 = nn.Conv2d(
        conv.in_channels, conv.out_channels, 3, padding=1
    ).double()


def _with_another_width(network: nn.Module) -> None:
    del network.features.denseblock2.denselayer2


def _with_another_forward(network: nn.Module) -> None:
    block = network.features.denseblock1
    kind = type(block)
    block.__class__ = type("ScaledBlock", (kind,), {"forward": lambda self, x: 2 * kind.forward(self, x)})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_without_batch_norm, "features.denseblock1.denselayer2.norm1 is GroupNorm; convert takes BatchNorm2d"),
        (_with_hook, "features.denseblock2 has a hook"),
        (_with_other_activation, "features.transition1.norm (BatchNorm2d) is followed by SiLU"),
        (_with_a_bias, "denseblock2.denselayer1.conv2 has a bias"),
        (_with_another_width, "features.denseblock2.denselayer3 reads 16 channels where 12 come before it"),
        (_with_another_forward, "features.denseblock1 (ScaledBlock) does not compute what a DenseNet's does"),
    ],
)
def test_what_is_no_dense_block_is_named_and_left_alone(change: Callable[[nn.Module], None], said: str) -> None:
    network = theirs(_torchvision)
    change(network)
    modules = list(network.modules())
    with pytest.raises(UnsupportedError) as caught:
        convert(network)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(network.modules()) == modules


def test_volumes_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="norm1 is BatchNorm3d; convert takes BatchNorm2d"):
        convert(theirs(_monai, spatial_dims=3))


def test_dropout_of_whole_channels_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"features\.denseblock1\.denselayer1 has Dropout2d"):
        convert(theirs(_monai, dropout_prob=0.1))


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU())])
def test_nothing_to_convert(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="contains no dense blocks that convert knows: DenseNets of torchvision"):
        convert(model)


def test_unknown_strategy() -> None:
    network = theirs(_torchvision)
    with pytest.raises(ValueError, match="unknown strategy 'fast'"):
        convert(network, "fast")
    assert not any(isinstance(module, Features) for module in network.modules())


def test_random_numbers_are_not_drawn() -> None:
    network = theirs(_torchvision)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    convert(network)
    assert torch.equal(torch.rand(3), expected)


def test_set_strategy_goes_on_from_there() -> None:
    network = convert(theirs(_monai), "naive")
    expected = step(copy.deepcopy(network), images(3, 32))
    assert_same(step(set_strategy(network, "fused_recompute"), images(3, 32)), expected)
