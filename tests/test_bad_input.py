"""What is wrong is said: the exception's type, the value, the remedy; and nothing has changed after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import densebench
from densebench import DenseNetConfig, UnsupportedError, build_model, get_strategy, set_strategy
from densebench.models import DenseLayer
from tests.comparison import upstream
from tests.networks import images, lone_block, small

WITH_PLAIN = True

CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "no blocks": ({"block_config": ()}, r"block_config is empty; .* e\.g\. \(6, 12, 24, 16\)"),
    "one number": ({"block_config": 5}, r"block_config=5 is not a sequence; .* e\.g\. \(6, 12, 24, 16\)"),
    "words for compression": ({"compression": "half"}, "compression='half' is not a number"),
    "no dropout": ({"drop_rate": None}, "drop_rate=None is not a number"),
    "zero layers": ({"block_config": (6, 0)}, "each entry of block_config must be a positive integer, got 0"),
    "half a layer": ({"block_config": (6, 1.5)}, r"each entry of block_config .* got 1\.5"),
    "no growth": ({"growth_rate": 0}, "growth_rate must be a positive integer, got 0"),
    "growth of True": ({"growth_rate": True}, "growth_rate must be a positive integer, got True"),
    "negative stem": ({"num_init_features": -64}, "num_init_features must be a positive integer, got -64"),
    "no channels": ({"in_channels": 0}, "in_channels must be a positive integer, got 0"),
    "no bottleneck width": ({"bn_size": 0}, "bn_size must be a positive integer, got 0"),
    "no classes": ({"num_classes": 0}, "num_classes must be a positive integer, got 0"),
    "expansion": ({"compression": 1.5}, r"compression=1\.5 must be in \(0, 1\]: the share of channels kept"),
    "compression of 0": ({"compression": 0.0}, r"compression=0\.0 must be in \(0, 1\]"),
    "compression to nothing": (
        {"compression": 0.001},
        r"compression=0\.001 leaves no channel after a transition; raise it, or growth_rate or num_init_features",
    ),
    "NaN compression": ({"compression": float("nan")}, "compression=nan must be in"),
    "everything dropped": ({"drop_rate": 1.0}, r"drop_rate=1\.0 must be in \[0, 1\)"),
    "negative dropout": ({"drop_rate": -0.1}, r"drop_rate=-0\.1 must be in \[0, 1\)"),
    "signals": ({"spatial_dims": 1}, "spatial_dims=1 is not one of 2, 3"),
    "unknown stem": ({"stem": "mnist"}, "stem='mnist' is not one of 'imagenet', 'cifar'"),
    "output stride of 7": ({"output_stride": 7}, "output_stride=7 is not one of 32, 16, 8"),
    "initial stride of 3": ({"initial_output_stride": 3}, "initial_output_stride=3 is not one of 4, 2"),
    "stride of the CIFAR stem": (
        {"stem": "cifar", "initial_output_stride": 2},
        "initial_output_stride belongs to stem='imagenet'; the CIFAR stem has stride 1",
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_impossible_configuration(name: str) -> None:
    options, message = CONFIGS[name]
    with pytest.raises(ValueError, match=message):
        DenseNetConfig(**options)
    with pytest.raises(ValueError, match=message):
        build_model("densenet121", **options)


def test_configuration_is_frozen() -> None:
    """Changing it later would change no module."""
    with pytest.raises(AttributeError, match="growth_rate"):
        DenseNetConfig().growth_rate = 12


def test_unknown_option() -> None:
    with pytest.raises(TypeError, match="unknown option 'growth'; a DenseNet takes growth_rate, block_config"):
        build_model("densenet121", growth=12)


@pytest.mark.parametrize(
    ("depth", "options", "message"),
    [
        (41, {}, r"depth=41 is not 3n \+ 4: three blocks of n layers of 1 convolution, the stem"),
        (101, {"bottleneck": True}, r"depth=101 is not 6n \+ 4: three blocks of n layers of 2 convolutions"),
        (4, {}, r"depth=4 is not 3n \+ 4"),
    ],
)
def test_impossible_depth(depth: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        densebench.densenet_cifar(depth, **options)


def test_unknown_model() -> None:
    with pytest.raises(ValueError, match=r"unknown model 'densenet122'; known: densenet121, .*resnet152"):
        build_model("densenet122")
    with pytest.raises(AttributeError, match="module 'densebench' has no attribute 'densenet122'"):
        _ = densebench.densenet122


def test_unknown_strategy() -> None:
    network = small("shared_buffer")
    for call in (lambda: set_strategy(network, "fastest"), lambda: build_model("densenet121", strategy="fastest")):
        with pytest.raises(ValueError, match="unknown strategy 'fastest'; known: naive, ") as caught:
            call()
        assert all(name in str(caught.value) for name in densebench.list_strategies())
    assert network.strategy == "shared_buffer"


def test_strategy_for_a_model_that_has_none() -> None:
    with pytest.raises(ValueError, match="ResNet contains no dense block of densebench to run by a strategy"):
        set_strategy(build_model("resnet18"), "naive")


def _state(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def _assert_unchanged(network: nn.Module, before: dict[str, Tensor]) -> None:
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def _wrong(*shape: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Callable[[], Tensor]:
    return lambda: torch.ones(shape, dtype=dtype, device=device)


INPUTS: dict[str, tuple[Callable[[], Tensor], type[Exception], str]] = {
    "one image": (
        _wrong(3, 32, 32),
        ValueError,
        r"input must be \[N, 3, H, W\], got shape \[3, 32, 32\]; give a batch",
    ),
    "video": (
        _wrong(2, 3, 4, 9, 9),
        ValueError,
        r"input must be \[N, 3, H, W\], got shape \[2, 3, 4, 9, 9\]; build the network with spatial_dims=3",
    ),
    "gray": (_wrong(2, 1, 32, 32), ValueError, "input has 1 channel, the network takes in_channels=3"),
    "channels last": (_wrong(2, 9, 9, 3), ValueError, "input has 9 channels, the network takes in_channels=3"),
    "too small": (
        _wrong(2, 3, 4, 32),
        ValueError,
        "input 4x32 is too small for a network of stride 8: each side needs at least 5 pixels",
    ),
    "float32": (
        _wrong(2, 3, 32, 32, dtype=torch.float32),
        TypeError,
        r"input is torch\.float32, the network torch\.float64; cast one, or use torch\.autocast",
    ),
    "bytes": (
        _wrong(2, 3, 32, 32, dtype=torch.uint8),
        TypeError,
        r"input is torch\.uint8, the network torch\.float64",
    ),
    "elsewhere": (
        _wrong(2, 3, 32, 32, device="meta"),
        TypeError,
        r"input is on meta, the network on cpu; move one with \.to\(\)",
    ),
}


@pytest.mark.parametrize("call", ["forward", "end_points"])
@pytest.mark.parametrize("name", INPUTS)
def test_wrong_input(every_strategy: str, name: str, call: str) -> None:
    """Refused before anything has run, in the words of the network and not of its first convolution."""
    make, kind, message = INPUTS[name]
    network = small(every_strategy, stem="imagenet", block_config=(1, 1))
    before = _state(network)
    with pytest.raises(kind, match=message):
        getattr(network, call)(make())
    _assert_unchanged(network, before)


VOLUMES: dict[str, tuple[tuple[int, ...], str]] = {
    "one volume": ((3, 9, 9, 9), r"must be \[N, 3, D, H, W\], got shape \[3, 9, 9, 9\]; give a batch, x\[None\]"),
    "images": ((2, 3, 9, 9), r"got shape \[2, 3, 9, 9\]; build the network with spatial_dims=2"),
    "a row of numbers": ((2, 3), r"input must be \[N, 3, D, H, W\], got shape \[2, 3\]$"),
    "a thin one": ((2, 3, 4, 32, 32), "input 4x32x32 is too small for a network of stride 8: each side needs at"),
}


@pytest.mark.parametrize("name", VOLUMES)
def test_wrong_volume(every_strategy: str, name: str) -> None:
    shape, message = VOLUMES[name]
    network = small(every_strategy, stem="imagenet", block_config=(1, 1), spatial_dims=3)
    before = _state(network)
    with pytest.raises(ValueError, match=message):
        network(torch.ones(shape, dtype=torch.float64))
    _assert_unchanged(network, before)


@pytest.mark.parametrize("dims", [2, 3])
def test_maps_of_another_rank(every_strategy: str, dims: int) -> None:
    """A block takes no other, whatever could be made of it: PyTorch's convolutions take a map without a batch."""
    network = lone_block(every_strategy, spatial_dims=dims)
    for other in {2, 3, 4} - {dims + 2}:
        with pytest.raises((ValueError, RuntimeError), match=r"[Ee]xpected|must match"):
            network(torch.ones(2, 5, *(4,) * (other - 2), dtype=torch.float64))
    with pytest.raises((ValueError, RuntimeError), match=r"[Ee]xpected|must match"):
        network(torch.ones(2, 5, *(4,) * (5 - dims), dtype=torch.float64))


@pytest.mark.parametrize("shape", [(2, 3), (2, 1, 64, 64)])
def test_wrong_input_of_a_resnet(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"input must be \[N, 3, H, W\], got shape"):
        build_model("resnet18")(torch.ones(shape))


def test_one_value_a_channel(every_strategy: str) -> None:
    """PyTorch's own words for a batch without a variance, and a network that still works."""
    network = small(every_strategy, block_config=(2, 2, 2))
    with pytest.raises(ValueError, match=r"Expected more than 1 value per channel when training, got input size"):
        network(images(1, 4))
    before = _state(network)
    assert network.eval()(images(1, 4)).shape == (1, 5)
    _assert_unchanged(network, before)


def test_one_value_a_channel_moves_nothing_in_its_block(every_strategy: str) -> None:
    network = lone_block(every_strategy)
    before = _state(network)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        network(torch.ones(1, 5, 1, 1, dtype=torch.float64))
    if get_strategy(every_strategy).bypasses != "nothing":  # PyTorch's own module has counted the batch by then
        _assert_unchanged(network, before)


ADDITIONS: dict[str, Callable[[nn.Module], Any]] = {
    "a hook": lambda m: m.register_forward_hook(lambda *_: None),
    "a hook (pruning and weight norm are hooks too)": lambda m: prune.random_unstructured(m, "weight", amount=0.2),
    "a parametrization": parametrizations.orthogonal,
    "a replaced forward": lambda m: setattr(m, "forward", m.forward),
}


@pytest.mark.parametrize("what", ADDITIONS)
def test_what_would_be_run_around(strategy: str, what: str) -> None:
    """The module, what it has, and the way out; the strategy that was set stays."""
    if get_strategy(strategy).bypasses == "nothing":
        pytest.skip(f"{strategy} calls every module")
    network = small()
    ADDITIONS[what](network.features.denseblock1.denselayer2.conv1)
    before = _state(network)
    with pytest.raises(UnsupportedError) as caught:
        set_strategy(network, strategy)
    message = str(caught.value)
    assert f"strategy {strategy!r} does not call denseblock1.denselayer2.conv1, which has {what}" in message
    assert message.endswith("remove it, or use strategy 'naive', which calls every module")
    assert network.strategy == "naive"
    _assert_unchanged(network, before)
    assert network(images()).isfinite().all()


def _conv(old: nn.Conv2d, size: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(old.in_channels, old.out_channels, size, **{"bias": False, "padding": size // 2, **options})


class _LayerOfOnesOwn(DenseLayer):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def _layer(old: DenseLayer) -> DenseLayer:
    return _LayerOfOnesOwn(old.in_channels, old.growth_rate, 4)


# Module to replace, what comes in its place, and what an objection says of it.
PARTS: dict[str, tuple[str, Callable[[Any], nn.Module], str]] = {
    "group norm": ("denseblock2.denselayer1.norm1", lambda m: nn.GroupNorm(1, m.num_features), "is GroupNorm"),
    "instance norm": ("denseblock1.denselayer2.norm2", lambda m: nn.InstanceNorm2d(m.num_features), "is Instance"),
    "GELU": ("denseblock1.denselayer1.relu1", lambda _: nn.GELU(), "is GELU"),
    "bias": ("denseblock1.denselayer1.conv1", lambda m: _conv(m, 1, bias=True), "has a bias"),
    "groups": ("denseblock1.denselayer1.conv2", lambda m: _conv(m, groups=2), "has a bias, groups"),
    "1x1 for 3x3": ("denseblock1.denselayer1.conv2", lambda m: _conv(m, 1), ""),
    "3x3 for 1x1": ("denseblock1.denselayer1.conv1", _conv, "has a first convolution that is not 1x1"),
    "5x5": ("denseblock1.denselayer1.conv2", lambda m: _conv(m, 5), "has a bias, groups, a stride or padding"),
    "reflection": ("denseblock1.denselayer1.conv2", lambda m: _conv(m, padding_mode="reflect"), "padding"),
    "layer": ("denseblock1.denselayer2", _layer, "is _LayerOfOnesOwn, which has a forward of its own"),
    "norm of a transition": ("transition1.norm", lambda m: nn.GroupNorm(1, m.num_features), "is GroupNorm"),
    "conv of a transition": ("transition1.conv", _conv, "has a convolution that is not 1x1"),
    "pool of a transition": ("transition1.pool", lambda _: nn.AvgPool2d(3, 2, 1), "pools in another way"),
    "maximum": ("transition1.pool", lambda _: nn.MaxPool2d(2, 2), "pools in another way"),
    "pool of the stem": ("pool0", lambda _: nn.MaxPool2d(3, 2, 1, ceil_mode=True), "pools in another way"),
    "last norm": ("norm5", lambda m: nn.GroupNorm(1, m.num_features), ""),
    "first norm": ("norm0", lambda m: nn.GroupNorm(1, m.num_features), ""),
}


def test_a_norm_of_volumes_among_images(strategy: str) -> None:
    """A strategy that works on rows could run it; naive does not."""
    network = small(block_config=(2,))
    network.features.denseblock1.denselayer2.norm1 = nn.BatchNorm3d(12).double()
    if densebench.get_strategy(strategy).bypasses == "nothing":
        pytest.skip(f"{strategy} calls every module, which raises")
    with pytest.raises(
        UnsupportedError, match=r"denselayer2\.norm1 is BatchNorm3d where those before it have 2 sp"
    ):
        set_strategy(network, strategy)


@pytest.mark.parametrize("name", PARTS)
def test_parts_that_a_strategy_cannot_compute(strategy: str, name: str) -> None:
    """Another module in the place of a standard one is run as naive runs it, or refused; never ignored."""
    target, make, message = PARTS[name]

    def replaced(network: densebench.DenseNet) -> densebench.DenseNet:
        torch.manual_seed(0)
        parent, _, child = target.rpartition(".")
        part = make(network.features.get_submodule(target)).double()
        setattr(network.features.get_submodule(parent), child, part)
        return network

    options: dict[str, Any] = {"stem": "imagenet", "block_config": (2, 1)}
    network = replaced(small(**options))
    try:
        assert densebench.assert_equivalent(network, strategy, images(2, 32))
    except UnsupportedError as error:
        assert message, f"{name} should have been run: {error}"  # noqa: PT017 - either ending is right
        assert message in str(error)  # noqa: PT017
        assert target.partition(".")[0] in str(error)  # noqa: PT017
        assert str(error).endswith("use 'naive'")  # noqa: PT017
        late = replaced(small(strategy, **options))
        before = _state(late)
        with pytest.raises(UnsupportedError, match=target.partition(".")[0]):
            late(images(2, 32))
        changed = {key for key, value in late.state_dict().items() if not torch.equal(value, before[key])}
        assert not any(target.partition(".")[0] in key for key in changed)


def test_second_derivative(strategy: str) -> None:
    """Right, or an error from autograd; a penalty on a gradient is never dropped."""
    network = lone_block(strategy)
    x = images(2, 4, 5).requires_grad_()
    output = network(x)
    (gradient,) = torch.autograd.grad(output, x, upstream(output), create_graph=True)
    if get_strategy(strategy).derivatives != "first":
        gradient.square().sum().backward()
        assert x.grad is not None
    else:
        with pytest.raises(RuntimeError, match="differentiate twice"):
            gradient.square().sum().backward()
        assert x.grad is None


def test_second_backward_without_retaining_the_graph(strategy: str) -> None:
    """PyTorch's own message, not freed memory."""
    output = lone_block(strategy)(images(channels=5).requires_grad_())
    output.backward(upstream(output))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        output.backward(upstream(output))
