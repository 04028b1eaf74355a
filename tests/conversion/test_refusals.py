"""What is no dense block, or would lose something, is refused in a sentence, and nothing is changed."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from densebench import UnsupportedError, conversion, convert
from densebench.models.features import Features
from tests.conversion.networks import monai, theirs, timm, torchvision


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


def _another_forward(network: nn.Module) -> None:
    network.features.denseblock1.denselayer1.forward = lambda features: features[0]


def _another_method(network: nn.Module) -> None:
    layer = network.features.denseblock1.denselayer1
    layer.bn_function = lambda features: layer.conv1(torch.cat(features, 1))


def _another_name(network: nn.Module) -> None:
    network.target = network.features.denseblock2.denselayer1


def _in_a_list(network: nn.Module) -> None:
    network.encoder = [network.features.denseblock1, network.features.denseblock2]


def _a_method(network: nn.Module) -> None:
    network._first = network.features.denseblock1.forward


def _compiled(network: nn.Module) -> None:
    network.features.denseblock1.compile(backend="eager")


def _state_of_its_own(network: nn.Module) -> None:
    block = network.features.denseblock1
    block.__class__ = type("_DenseBlock", (type(block),), {"get_extra_state": lambda self: torch.ones(1)})
    block.__class__.__module__ = "torchvision.models.densenet"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_in_a_list, "a part of a dense block is also in DenseNet.encoder, which would be left behind"),
        (_a_method, "a part of a dense block is also in DenseNet._first"),
        (_compiled, "features.denseblock1 has been compiled; convert before that"),
        (_state_of_its_own, "features.denseblock1 has state of its own"),
        (_another_norm, "features.denseblock1.denselayer2: norm1 is a GroupNorm; strategies take batch norms"),
        (_another_activation, "features.transition1: relu is a SiLU"),
        (_without_activation, "features.denseblock1.denselayer1: relu2 is missing"),
        (_a_bias, "denseblock2.denselayer1.conv2 has a bias"),
        (_a_layer_less, "denseblock2.denselayer3 has a norm of 16 and a convolution of 16 channels where 12 come"),
        (_no_layers, "features.denseblock1 has no layers"),
        (_a_part_more, "features.denseblock2.denselayer2 has gate (Conv2d)"),
        (_a_part_more_in_the_transition, "features.transition1 has dropout (Dropout)"),
        (_a_parameter_more, "features has denseblock1.denselayer1.scale, which is not a DenseNet's"),
        (_a_buffer_more, "features has denseblock2.seen, which is not a DenseNet's"),
        (_another_block, "features.denseblock1 is a tests.conversion.test_refusals.ScaledBlock"),
        (_another_layer, "features.denseblock1.denselayer2 is a tests.conversion.test_refusals.GatedLayer"),
        (_another_forward, "features.denseblock1.denselayer1 has a replaced forward"),
        (_another_method, "features.denseblock1.denselayer1 has a replaced bn_function; convert before that"),
        (_another_name, "also DenseNet.target"),
    ],
)
def test_what_was_changed_is_named_and_left_alone(change: Callable[[nn.Module], None], said: str) -> None:
    network = theirs(torchvision)
    change(network)
    model = nn.ModuleList([theirs(monai), network])  # the first one is as it should be
    modules, state = list(model.named_modules()), copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedError) as caught:
        convert(model)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(model.named_modules()) == modules
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


PLACES = [
    (torchvision, "features"),
    (torchvision, "features.denseblock1"),
    (torchvision, "features.denseblock2.denselayer1"),
    (torchvision, "features.transition1"),
    (monai, "features.denseblock1.denselayer1.layers"),
    (timm, "features.denseblock1.denselayer1.norm2"),
    (timm, "features.transition1.norm.act"),
]


@pytest.mark.parametrize(("build", "place"), PLACES)
@pytest.mark.parametrize("kind", ["forward", "state_dict_post"])
def test_hooks_on_what_is_replaced_are_refused(build: Callable[..., nn.Module], place: str, kind: str) -> None:
    network = theirs(build)
    getattr(network.get_submodule(place), f"register_{kind}_hook")(lambda *_: None)
    with pytest.raises(UnsupportedError, match=rf"^{place} has a hook"):
        convert(network, "naive")


@pytest.mark.parametrize("option", [{"act_layer": "silu"}, {"norm_layer": "evonorms0"}])
def test_timms_other_norms_are_refused(option: dict[str, str]) -> None:
    with pytest.raises(UnsupportedError, match=r"features\.denseblock1\.denselayer1: (relu1|norm1) is a"):
        convert(timm(**option))


def test_signals_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="norm1 is a BatchNorm1d; strategies take batch norms of images"):
        convert(theirs(monai, spatial_dims=1))


def test_dropout_of_whole_channels_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"features\.denseblock1\.denselayer1 has dropout \(Dropout2d\)"):
        convert(theirs(monai, dropout_prob=0.1))


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU())])
def test_nothing_to_convert(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="no dense blocks that convert knows; it knows DenseNets of torchvision"):
        convert(model)


def test_no_network() -> None:
    with pytest.raises(TypeError, match="convert takes a network, not str"):
        convert("densenet121")  # type: ignore[type-var]


def test_interrupted_it_has_done_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    network = theirs(torchvision)
    modules = list(network.named_modules())
    monkeypatch.setattr(conversion, "set_strategy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(network)
    assert list(network.named_modules()) == modules


def test_unknown_strategy() -> None:
    network = theirs(torchvision)
    with pytest.raises(ValueError, match="unknown strategy 'fast'"):
        convert(network, "fast")
    assert not any(isinstance(module, Features) for module in network.modules())
