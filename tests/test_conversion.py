"""Other people's DenseNets, converted: the same numbers from the same tensors, or a sentence and no change."""

from __future__ import annotations

import copy
import importlib
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from densebench import UnsupportedError, convert, set_strategy
from densebench.contenders import get_contender
from densebench.models.densenet import Features
from tests.comparison import assert_same, step
from tests.networks import draw_norms, images, norms, small

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
    """With norms, eps and momentum drawn, so that none can be taken for another."""
    torch.manual_seed(0)
    network = build(**options)
    draw_norms(network)
    for norm in norms(network):
        norm.eps, norm.momentum = 10 ** -float(3 + torch.rand(1)), 0.05 + 0.2 * float(torch.rand(1))
    return network.double()


@every_library
def test_the_same_numbers(build: Callable[..., nn.Module], every_strategy: str) -> None:
    network = theirs(build)
    ours = convert(copy.deepcopy(network), every_strategy)
    assert {module.strategy for module in ours.modules() if isinstance(module, Features)} == {every_strategy}
    for seed, mode in enumerate((True, True, False)):
        x = images(3, 32, seed=seed)
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
    assert (first.head is None) == (build is _timm)  # whose norm and ReLU are one module
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


OPTIONS = [(_torchvision, "drop_rate"), (_timm, "proj_drop_rate"), (_torchxrayvision, "drop_rate")]


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


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = theirs(_torchvision), theirs(_monai)
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
    outer = theirs(_torchvision).features
    outer.append(nn.Sequential(nn.Conv2d(20, 8, 1).double(), theirs(_monai).features.denseblock1))
    expected = step(copy.deepcopy(outer), images(2, 32))
    features = convert(outer)
    assert [type(module) for module in (features, features[-1])] == [Features, Features]
    assert_same(step(features, images(2, 32)), expected)


def test_functional_calls_by_their_names() -> None:
    network = theirs(_monai).eval()
    state = dict(network.state_dict())
    expected = torch.func.functional_call(network, state, images(2, 32))
    actual = torch.func.functional_call(convert(network, "naive"), state, images(2, 32))
    assert_same({"output": actual.detach()}, {"output": expected.detach()})


def test_attributes_of_the_sequence_stay() -> None:
    network = theirs(_torchvision)
    network.features.out_channels = 20  # what torchvision's detectors ask a backbone for
    assert convert(network).features.out_channels == 20


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


def test_on_meta_and_in_mixed_precision() -> None:
    with torch.device("meta"):
        network = _torchvision()
        assert isinstance(convert(network, "naive").features, Features)
    network = theirs(_torchvision).float()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.half()
    assert isinstance(convert(network, "naive").features, Features)


def _another_norm(network: nn.Module) -> None:
    network.features.denseblock1.denselayer2.norm1 = nn.GroupNorm(2, 12).double()


def _another_activation(network: nn.Module) -> None:
    network.features.transition1.relu = nn.SiLU()


def _without_activation(network: nn.Module) -> None:
    del network.features.denseblock1.denselayer1.relu2


def _a_bias(network: nn.Module) -> None:
    layer = network.features.denseblock2.denselayer1
    layer.conv2 = nn.Conv2d(layer.conv2.in_channels, layer.conv2.out_channels, 3, padding=1).double()


def _a_layer_less(network: nn.Module) -> None:
    del network.features.denseblock2.denselayer2


def _no_layers(network: nn.Module) -> None:
    for name in list(network.features.denseblock1):
        del network.features.denseblock1[name]


def _a_part_more(network: nn.Module) -> None:
    network.features.denseblock2.denselayer2.add_module("gate", nn.Conv2d(4, 4, 1))


def _a_part_more_in_the_transition(network: nn.Module) -> None:
    network.features.transition1.add_module("dropout", nn.Dropout())


def _a_parameter_more(network: nn.Module) -> None:
    network.features.denseblock1.denselayer1.scale = nn.Parameter(torch.ones(1))


def _a_buffer_more(network: nn.Module) -> None:
    network.features.denseblock2.register_buffer("seen", torch.zeros(1))


def _another_block(network: nn.Module) -> None:
    block = network.features.denseblock1
    block.__class__ = type("ScaledBlock", (type(block),), {"forward": lambda self, x: 2 * x})


def _another_layer(network: nn.Module) -> None:
    layer = network.features.denseblock1.denselayer2
    layer.__class__ = type("GatedLayer", (type(layer),), {})


def _a_wrapped_block(network: nn.Module) -> None:
    network.features.denseblock2 = nn.ModuleList([network.features.denseblock2])


def _another_forward(network: nn.Module) -> None:
    network.features.denseblock1.denselayer1.forward = lambda features: features[0]


def _another_name(network: nn.Module) -> None:
    network.target = network.features.denseblock2.denselayer1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_another_norm, "features.denseblock1.denselayer2: norm1 is a GroupNorm; strategies take BatchNorm2d"),
        (_another_activation, "features.transition1: relu is a SiLU"),
        (_without_activation, "features.denseblock1.denselayer1: relu2 is missing"),
        (_a_bias, "denseblock2.denselayer1.conv2 has a bias"),
        (_a_layer_less, "features.denseblock2.denselayer3 reads 16 channels where 12 come before it"),
        (_no_layers, "features.denseblock1 has no layers"),
        (_a_part_more, "features.denseblock2.denselayer2 has gate (Conv2d)"),
        (_a_part_more_in_the_transition, "features.transition1 has dropout (Dropout)"),
        (_a_parameter_more, "features has denseblock1.denselayer1.scale, which is not a DenseNet's"),
        (_a_buffer_more, "features has denseblock2.seen, which is not a DenseNet's"),
        (_another_block, "features.denseblock1 is a tests.test_conversion.ScaledBlock"),
        (_another_layer, "features.denseblock1.denselayer2 is a tests.test_conversion.GatedLayer"),
        (_a_wrapped_block, "features.denseblock2.0 is a torchvision.models.densenet._DenseBlock"),
        (_another_forward, "features.denseblock1.denselayer1 has a replaced forward"),
        (_another_name, "also DenseNet.target"),
    ],
)
def test_what_was_changed_is_named_and_left_alone(change: Callable[[nn.Module], None], said: str) -> None:
    network = theirs(_torchvision)
    change(network)
    model = nn.ModuleList([theirs(_monai), network])  # the first one is as it should be
    modules, state = list(model.named_modules()), copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedError) as caught:
        convert(model)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(model.named_modules()) == modules
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


PLACES = [
    (_torchvision, "features"),
    (_torchvision, "features.denseblock1"),
    (_torchvision, "features.denseblock2.denselayer1"),
    (_torchvision, "features.transition1"),
    (_monai, "features.denseblock1.denselayer1.layers"),
    (_timm, "features.denseblock1.denselayer1.norm2"),
    (_timm, "features.transition1.norm.act"),
]


@pytest.mark.parametrize(("build", "place"), PLACES)
@pytest.mark.parametrize("kind", ["forward", "state_dict_post"])
def test_hooks_on_what_is_replaced_are_refused(build: Callable[..., nn.Module], place: str, kind: str) -> None:
    network = theirs(build)
    getattr(network.get_submodule(place), f"register_{kind}_hook")(lambda *_: None)
    with pytest.raises(UnsupportedError, match=rf"^{place} has a hook"):
        convert(network, "naive")


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


@pytest.mark.parametrize("option", [{"act_layer": "silu"}, {"norm_layer": "evonorms0"}])
def test_timms_other_norms_are_refused(option: dict[str, str]) -> None:
    with pytest.raises(UnsupportedError, match=r"features\.denseblock1\.denselayer1: (relu1|norm1) is a"):
        convert(_timm(**option))


class Encoder(nn.Sequential):
    """It may do anything, and has methods that a sequence has not."""


@pytest.mark.parametrize("container", [nn.ModuleDict, Encoder])
def test_blocks_that_do_not_stand_in_a_sequence(container: type[nn.Module]) -> None:
    model = container(OrderedDict(encoder=theirs(_torchvision).features.denseblock1))
    with pytest.raises(ValueError, match=r"has dense blocks \(encoder\), but not in an nn.Sequential"):
        convert(model)


def test_volumes_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="norm1 is a BatchNorm3d; strategies take BatchNorm2d"):
        convert(theirs(_monai, spatial_dims=3))


def test_dropout_of_whole_channels_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"features\.denseblock1\.denselayer1 has dropout \(Dropout2d\)"):
        convert(theirs(_monai, dropout_prob=0.1))


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU())])
def test_nothing_to_convert(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="no dense blocks that convert knows; it knows DenseNets of torchvision"):
        convert(model)


def test_no_network() -> None:
    with pytest.raises(TypeError, match="convert takes a network, not str"):
        convert("densenet121")  # type: ignore[type-var]


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
