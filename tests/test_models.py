"""The architectures: sizes that others published, shapes, options, presets, and how weights are drawn."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import densebench
from densebench import DenseNet, DenseNetConfig, build_model, list_models
from densebench.models import DenseBlock, DenseLayer, ResNet, Transition
from tests.networks import images, small

# Parameters, and GMACs at 224x224: torchvision's weight metadata; densenet264 by its authors' table.
PUBLISHED = {
    "densenet121": (7_978_856, 2.834),
    "densenet169": (14_149_480, 3.360),
    "densenet201": (20_013_928, 4.291),
    "densenet161": (28_681_000, 7.728),
    "densenet264": (33_337_704, None),
    "resnet18": (11_689_512, 1.814),
    "resnet34": (21_797_672, 3.664),
    "resnet50": (25_557_032, 4.089),
    "resnet101": (44_549_160, 7.801),
    "resnet152": (60_192_808, 11.514),
}


def _on_meta(name: str, **options: object) -> nn.Module:
    with torch.device("meta"):
        return build_model(name, **options)


def _parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_multiplications(name: str) -> None:
    """Parameters exactly, multiply-accumulates within 1 % (others count norms or pooling, too)."""
    parameters, gmacs = PUBLISHED[name]
    network = _on_meta(name)
    assert _parameters(network) == parameters
    if gmacs is not None:
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(1, 3, 224, 224, device="meta"))
        assert counter.get_total_flops() / 2 / 1e9 == pytest.approx(gmacs, rel=0.01)


@pytest.mark.parametrize(("depth", "growth_rate", "millions"), [(100, 12, 0.8), (250, 24, 15.3), (190, 40, 25.6)])
def test_cifar_densenet_bc(depth: int, growth_rate: int, millions: float) -> None:
    """Table 2 of Huang et al. 2017."""
    network = _on_meta("densenet_bc", depth=depth, growth_rate=growth_rate)
    assert round(_parameters(network) / 1e6, 1) == millions


def test_cifar_densenet_bc_100_12_exactly() -> None:
    assert _parameters(_on_meta("densenet_bc")) == 769_162


@pytest.mark.parametrize(("depth", "growth_rate", "millions"), [(40, 12, 1.0), (100, 12, 7.0), (100, 24, 27.2)])
def test_plain_cifar_densenet(depth: int, growth_rate: int, millions: float) -> None:
    """Table 2 of Huang et al. 2017, without bottleneck and compression."""
    network = _on_meta("densenet_cifar", depth=depth, growth_rate=growth_rate)
    assert _parameters(network) / 1e6 == pytest.approx(millions, abs=0.1)


@pytest.mark.parametrize("name", list_models())
def test_every_model_runs(name: str) -> None:
    """By name, at a size that fits, with the number of classes asked for."""
    options = {"block_config": (2, 2)} if name == "densenet_x" else {}
    network = build_model(name, num_classes=7, **options).eval()
    channels = network.in_channels if isinstance(network, ResNet) else network.config.in_channels
    side = 32 if name in ("densenet_bc", "densenet_cifar") else 64
    with torch.no_grad():
        output = network(torch.randn(2, channels, side, side))
    assert output.shape == (2, 7)
    assert output.isfinite().all()
    assert name in densebench.__all__


def test_names_in_a_forward_are_those_of_the_registry() -> None:
    network = densebench.densenet_d2l(strategy="checkpointed")
    assert network.strategy == network.features.strategy == "checkpointed"
    assert "strategy='checkpointed'" in repr(network)
    assert network.features[:5].strategy == "checkpointed", "a slice of the features forgets the strategy"


@pytest.mark.parametrize(
    ("options", "side", "shape"),
    [
        ({}, 224, (1, 21, 7, 7)),
        ({"output_stride": 16, "initial_output_stride": 2}, 224, (1, 21, 14, 14)),
        ({"output_stride": 8}, 224, (1, 21, 28, 28)),
        ({"output_stride": 8, "initial_output_stride": 2}, 64, (1, 21, 8, 8)),
        ({"output_stride": 16}, 64, (1, 21, 4, 4)),
        ({"global_pool": True}, 64, (1, 21)),
        ({"global_pool": True, "spatial_squeeze": False}, 64, (1, 21, 1, 1)),
        ({"num_classes": None}, 224, (1, 1024, 7, 7)),
        ({"num_classes": None, "global_pool": True}, 64, (1, 1024)),
        ({"num_classes": None, "global_pool": True, "spatial_squeeze": False}, 64, (1, 1024, 1, 1)),
    ],
)
def test_slim_options(options: dict[str, object], side: int, shape: tuple[int, ...]) -> None:
    """TF-Slim's DenseNet library: output strides by dilation, pooling, squeezing, features instead of classes."""
    network = _on_meta("densenet121", **{"num_classes": 21, "global_pool": False, **options})
    assert network(torch.empty(1, 3, side, side, device="meta")).shape == shape


def test_initial_stride_of_two_leaves_out_the_max_pool() -> None:
    """Slim's stem then is a convolution to 2k filters."""
    network = _on_meta("densenet_x", block_config=(2, 2), growth_rate=12, initial_output_stride=2)
    assert not hasattr(network.features, "pool0")
    assert network.features.conv0.out_channels == 24
    points = network.end_points(torch.empty(1, 3, 32, 32, device="meta"))
    assert points["relu0" if "relu0" in points else "denseblock1"].shape[2:] == (16, 16)


def test_dilation_takes_the_place_of_strides() -> None:
    """The same weights see the same neighborhood: every 8th pixel of stride 8 is what stride 32 computes."""
    coarse, fine = (small(stem="imagenet", output_stride=s, block_config=(1, 1, 1)) for s in (32, 8))
    dilations = [fine.features.get_submodule(f"denseblock{n}").layers[0].conv3x3.dilation for n in (1, 2, 3)]
    assert dilations == [(1, 1), (1, 1), (2, 2)]
    assert [hasattr(fine.features.get_submodule(f"transition{n}"), "pool") for n in (1, 2)] == [True, False]
    assert [hasattr(coarse.features.get_submodule(f"transition{n}"), "pool") for n in (1, 2)] == [True, True]
    assert list(coarse.state_dict()) == list(fine.state_dict())


@pytest.mark.parametrize("training", [True, False])
def test_end_points(every_strategy: str, training: bool) -> None:
    """Every map by name under every strategy; the last is what the network returns."""
    network = small(every_strategy, stem="imagenet", block_config=(2, 2)).train(training)
    x = images(2, 32)
    expected = small(stem="imagenet", block_config=(2, 2)).train(training)(x)
    points = network.end_points(x)
    assert {name: tuple(point.shape[1:]) for name, point in points.items()} == {
        "conv0": (8, 16, 16),
        "denseblock1": (16, 8, 8),
        "transition1": (8, 4, 4),
        "denseblock2": (16, 4, 4),
        "relu5": (16, 4, 4),
        "output": (5,),
    }
    torch.testing.assert_close(points["output"], expected)


def test_component_tutorial_shapes() -> None:
    """(2, 64, 32, 32) through four layers of k = 32 gives 192 channels, and the transition halves all three."""
    block, transition = DenseBlock(4, 64, 32), Transition(192)
    x = torch.randn(2, 64, 32, 32)
    assert block(x).shape == (2, 192, 32, 32)
    assert transition(block(x)).shape == (2, 96, 16, 16)
    assert DenseLayer(64, 32, 4)(x).shape == (2, 32, 32, 32)


def test_a_block_is_a_dictionary_of_layers() -> None:
    """As torchvision's and timm's are; what walks through one finds its layers."""
    block = DenseBlock(3, 8, 4)
    assert list(block) == ["denselayer1", "denselayer2", "denselayer3"]
    assert list(block.values()) == block.layers
    assert [layer.in_channels for _, layer in DenseBlock.of(dict(block.items())).items()] == [8, 12, 16]


def test_d2l_shapes() -> None:
    """'Dive into Deep Learning', on DenseNet: two layers of 10 on (4, 3, 8, 8), then a transition to 10."""
    block = DenseBlock(2, 3, 10, bn_size=None)
    y = block(torch.randn(4, 3, 8, 8))
    assert y.shape == (4, 23, 8, 8)
    assert Transition(23, 10 / 23)(y).shape == (4, 10, 4, 4)
    network = _on_meta("densenet_d2l")
    points = network.end_points(torch.empty(1, 1, 96, 96, device="meta"))
    channels = [points[f"denseblock{n}"].shape[1] for n in (1, 2, 3, 4)]
    assert channels == [192, 224, 240, 248]
    assert points["output"].shape == (1, 10)


def test_plain_preset_of_the_blog() -> None:
    """BN-ReLU-3x3 layers without bottleneck, k = 32, (6, 12, 24, 16)."""
    network = _on_meta("densenet_plain")
    layers = [module for module in network.modules() if isinstance(module, DenseLayer)]
    assert len(layers) == 58
    assert {layer.conv1.kernel_size for layer in layers} == {(3, 3)}
    assert not any(hasattr(layer, "conv2") for layer in layers)
    assert {layer.conv1.out_channels for layer in layers} == {32}


def test_resnet_orders() -> None:
    """Pre-activation has as many convolutions, ends in a norm, and adds to a sum that nothing rectifies."""
    post, pre = _on_meta("resnet50"), _on_meta("resnet50", pre_activation=True)
    convolutions = [sum(isinstance(m, nn.Conv2d) for m in network.modules()) for network in (post, pre)]
    assert convolutions == [53, 53]
    assert pre.bn5.num_features == 2048
    unit = build_model("resnet18", pre_activation=True).layer1[0].eval()
    nn.init.zeros_(unit.conv2.weight)
    x = torch.randn(2, 64, 8, 8)
    assert torch.equal(unit(x), x), "with a silent branch a pre-activation unit is the identity"
    unit = build_model("resnet18").layer1[0].eval()
    nn.init.zeros_(unit.conv2.weight)
    assert torch.equal(unit(x), x.relu())


def test_initialization_statistics() -> None:
    """Kaiming normal with fan-in, unit norms, zero classifier bias: torchvision's DenseNet."""
    network = densebench.densenet121()
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            error = 5 / math.sqrt(2 * module.weight.numel())  # five standard errors of a deviation
            assert float(module.weight.detach().std()) == pytest.approx(math.sqrt(2 / fan_in), rel=error), name
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all(), name
            assert (module.bias == 0).all(), name
    assert (network.classifier.bias == 0).all()
    assert network.classifier.weight.abs().max() <= 1 / math.sqrt(1024)


def test_random_numbers_are_drawn_alike_for_every_strategy(strategy: str) -> None:
    """A seed gives one network, however it is run."""
    networks = []
    for name in ("naive", strategy):
        torch.manual_seed(3)
        networks.append(DenseNet(DenseNetConfig(block_config=(2, 2), stem="cifar"), name))
    for (name, a), b in zip(networks[0].state_dict().items(), networks[1].state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_network_of_volumes_is_monais() -> None:
    """MONAI's DenseNet-121 for one channel and two classes has 11,244,674 parameters."""
    network = _on_meta("densenet121", spatial_dims=3, in_channels=1, num_classes=2)
    assert _parameters(network) == 11_244_674
    assert network(torch.empty(2, 1, 64, 33, 96, device="meta")).shape == (2, 2)
    assert network.end_points(torch.empty(2, 1, 64, 64, 96, device="meta"))["denseblock4"].shape == (
        2, 1024, 2, 2, 3
    )  # fmt: skip


def test_widths_strides_and_smallest_input() -> None:
    config = DenseNetConfig()
    assert config.stage_channels() == [64, 128, 256, 512, 1024]
    assert config.stage_strides() == [4, 8, 16, 32]
    assert DenseNetConfig(output_stride=8).stage_strides() == [4, 8, 8, 8]
    assert DenseNetConfig(stem="cifar", block_config=(2, 2, 2)).stage_strides() == [1, 2, 4]
    assert densebench.densenet_x((2,), compression=0.7).config.compression == 0.7


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
@pytest.mark.parametrize("initial", [4, 2])
@pytest.mark.parametrize("output_stride", [32, 16, 8])
def test_smallest_input_is_the_smallest(stem: str, initial: int, output_stride: int, dims: int) -> None:
    """One pixel less and a pooling has nothing to pool; so much and the last map has a pixel."""
    if stem == "cifar" and initial == 2:
        with pytest.raises(ValueError, match="initial_output_stride belongs to stem='imagenet'"):
            DenseNetConfig(stem="cifar", initial_output_stride=2)
        return
    options = {"stem": stem, "initial_output_stride": initial, "output_stride": output_stride}
    network = small(**options, block_config=(1, 1, 1, 1), global_pool=False, spatial_dims=dims).eval()
    side = network.config.smallest_input()
    assert min(network(images(1, side, dims=dims)).shape[2:]) >= 1
    if side > 1:
        with pytest.raises(ValueError, match="is too small"):
            network(images(1, side - 1, dims=dims))
        with pytest.raises(RuntimeError, match=r"[Oo]utput size|too small|smaller than kernel"):
            network.features(images(1, side - 1, dims=dims))
