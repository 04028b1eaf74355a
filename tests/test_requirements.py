"""Tensors that kernels must not be given, and settings that change between runs: as naive, or one sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from densebench import UnsupportedError
from densebench.models.layers import DenseLayer
from tests.comparison import upstream
from tests.networks import images, lone_block, norms, small

ON_BUFFERS = ("fused", "fused_recompute", "shared_buffer")  # they take the addresses of parameters and buffers


def _step(network: nn.Module, x: Tensor | None = None) -> Tensor:
    """The gradient that a training step leaves at the bottom of the network."""
    output = network(images() if x is None else x)
    output.backward(upstream(output))
    found: Tensor = network.get_submodule("features.conv0").weight.grad
    return found


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
@pytest.mark.parametrize("variant", ["naive", *ON_BUFFERS])
def test_vectors_of_another_length(variant: str, name: str, length: int) -> None:
    """PyTorch's kernels would read and write beyond them, and a sum would repeat a single value."""
    network = small(variant)
    norm = network.features.denseblock1.denselayer2.norm1
    vector = getattr(norm, name).detach()[:length].clone()
    setattr(norm, name, nn.Parameter(vector) if name in ("weight", "bias") else vector)
    for training, enabled in ((True, True), (False, True), (False, False)):
        with (
            torch.set_grad_enabled(enabled),
            pytest.raises(RuntimeError, match=rf"^{name} should contain \d+ elements not {length}$"),
        ):
            network.train(training)(images())


@pytest.mark.parametrize(
    "part", ["denseblock1.denselayer1.conv1", "denseblock1.denselayer2.conv2", "transition1.conv"]
)
@pytest.mark.parametrize("variant", ["fused", "fused_recompute"])
def test_weights_of_another_shape(variant: str, part: str) -> None:
    """As many values in all: as a matrix, a 1x1's would pass for what they are not."""
    network = small(variant)
    conv = network.features.get_submodule(part)
    out, channels, *kernel = conv.weight.shape
    conv.weight = nn.Parameter(conv.weight.detach().reshape(out // 2, channels * 2, *kernel))
    with pytest.raises(RuntimeError, match=r"the weight of a convolution should be \[.*\], and is \["):
        network(images())


@pytest.mark.parametrize(
    "part",
    [
        "denseblock1.denselayer2.conv1",
        "denseblock1.denselayer2.conv2",
        "denseblock1.denselayer2.norm1",
        "transition1.conv",
        "norm5",
    ],
)
@pytest.mark.parametrize("variant", ["naive", *ON_BUFFERS])
def test_one_part_in_another_dtype(variant: str, part: str) -> None:
    network = small(variant)
    network.features.get_submodule(part).float()
    for training in (True, False):
        with pytest.raises((TypeError, RuntimeError), match=r"dtype|[Ff]loat"):
            network.train(training)(images())


@pytest.mark.parametrize("variant", ["fused", "fused_recompute"])
def test_what_autocast_converts_is_not_played_back_without_it(variant: str) -> None:
    """The same tensors, which compute in the same dtype."""
    block, x = lone_block(variant).float().eval(), images(channels=5).bfloat16()
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(4):
                block(x)
        with pytest.raises(TypeError, match=r"input is torch.bfloat16, a convolution torch.float32; cast one"):
            block(x)


def test_norms_in_float32_beside_half_precision() -> None:
    """As PyTorch's own norms take them."""
    network = small("fused").bfloat16()
    for norm in norms(network):
        norm.float()
    assert _step(network, images(dtype=torch.bfloat16)).isfinite().all()


class Quantized(Tensor):
    """A weight that a convolution rounds."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.conv2d, torch.conv2d):
            args = (args[0], (args[1].as_subclass(Tensor) * 4).round() / 4, *args[2:])
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **(kwargs or {}))
        return found.as_subclass(cls) if func is Tensor.detach else found


def _quantized(network: nn.Module) -> None:
    conv = network.get_submodule("features.denseblock1.denselayer2.conv1")
    conv.weight = nn.Parameter(conv.weight.detach().as_subclass(Quantized))  # type: ignore[assignment]


def _of_two(network: nn.Module) -> None:
    norm = network.get_submodule("features.denseblock1.denselayer2.norm1")
    value = norm.weight.detach()
    norm.weight = nn.Parameter(TwoTensor(value.clone(), value.clone()))  # type: ignore[arg-type, assignment]


@pytest.mark.parametrize("changed", [_quantized, _of_two])
@pytest.mark.parametrize("variant", ON_BUFFERS)
def test_parameters_that_say_what_operators_do(variant: str, changed: Callable[[nn.Module], None]) -> None:
    network = small(variant)
    changed(network)
    with pytest.raises(NotImplementedError, match="says itself what operators do; strategy 'naive'"):
        network(images())


@pytest.mark.parametrize("variant", ON_BUFFERS)
def test_saved_tensors_that_may_be_changed(variant: str) -> None:
    network = small(variant)
    with (
        torch.autograd.graph.allow_mutation_on_saved_tensors(),
        pytest.raises(NotImplementedError, match="allow_mutation_on_saved_tensors works with"),
    ):
        network(images())


class DropsChannels(DenseLayer):
    def dropout(self, new: Tensor) -> Tensor:
        return F.dropout2d(new, 0.5, self.training)


@pytest.mark.parametrize("on", ["instance", "class"])
@pytest.mark.parametrize("variant", ["checkpointed", *ON_BUFFERS])
def test_dropout_of_ones_own(variant: str, on: str) -> None:
    network = small(variant)
    layer = network.features.denseblock1.denselayer2
    if on == "class":
        layer.__class__ = DropsChannels
        reason = "is DropsChannels, which has a dropout of its own; use 'naive'"
    else:
        layer.dropout = nn.Dropout2d(0.5).forward
        reason = "has a replaced dropout; remove it, or use strategy 'naive'"
    with pytest.raises(UnsupportedError, match=rf"denseblock1\.denselayer2,? (which )?{reason}"):
        network(images())


def test_eps_is_the_forwards(strategy: str) -> None:
    def gradient(name: str) -> Tensor:
        network = small(name)
        output = network(images())
        for norm in norms(network):
            norm.eps = 0.5  # for the next step
        output.backward(upstream(output))
        found: Tensor = network.features.conv0.weight.grad
        return found

    torch.testing.assert_close(gradient(strategy), gradient("naive"), rtol=1e-9, atol=1e-12)


def test_norms_that_share_running_statistics(strategy: str) -> None:
    """Each moves them, one after the other."""

    def moved(name: str) -> list[Tensor]:
        network = small(name)
        first, second = (getattr(network.features.denseblock1, f"denselayer{n}").norm2 for n in (1, 2))
        second.running_mean, second.running_var = first.running_mean, first.running_var
        network(images())
        return [first.running_mean, first.running_var]

    torch.testing.assert_close(moved(strategy), moved("naive"), rtol=1e-11, atol=1e-13)


def test_momentum_that_is_a_tensor(every_strategy: str) -> None:
    plain, network = small(every_strategy), small(every_strategy)
    for number, (norm, other) in enumerate(zip(norms(network), norms(plain), strict=True)):
        momentum = (0.1, 0.2)[number % 2]
        norm.momentum, other.momentum = torch.tensor(momentum, dtype=torch.float64), momentum  # type: ignore[assignment]
    assert torch.equal(_step(network), _step(plain))
    for (name, value), other_value in zip(network.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(value, other_value, rtol=1e-12, atol=0, msg=name)


@pytest.mark.parametrize("between", [False, True], ids=["before forward", "before backward"])
@pytest.mark.parametrize("variant", ["fused", "fused_recompute"])
def test_onednn_switched_off_after_some_steps(variant: str, between: bool) -> None:
    """Its results lie in memory in another way than PyTorch's own."""
    network = small(variant, bn_size=None).float()
    x = images(dtype=torch.float32)
    for _ in range(4):
        expected = _step(network, x).clone()
        network.zero_grad()
    before = torch.backends.mkldnn.enabled
    try:
        torch.backends.mkldnn.enabled = before if between else False  # type: ignore[assignment]
        output = network(x)
        torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
        output.backward(upstream(output))
        torch.testing.assert_close(network.features.conv0.weight.grad, expected, rtol=1e-4, atol=1e-4)
    finally:
        torch.backends.mkldnn.enabled = before  # type: ignore[assignment]
