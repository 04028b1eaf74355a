"""What playback is kept from: all that would have it read what is not there, or miss what somebody watches for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

import densebench
from densebench.kernels import compiled
from densebench.replay import tracks
from tests.comparison import FLOAT32, GATE, Quantities, assert_same, everything, upstream
from tests.networks import images, norms, small
from tests.replays import STEPS, Counts, Pair, infer, train


def test_where_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    x, compiles = torch.ones(1), compiled.library(torch.float32) is not None
    assert tracks.replayable(x, [None, nn.Parameter(x)], torch.float32) == compiles
    assert not tracks.replayable(x, [], torch.float16)  # tile by tile, by PyTorch's operators
    assert not tracks.replayable(x.to("meta"), [], torch.float32)
    assert not tracks.replayable(x, [x.as_subclass(Quantized)], torch.float32)
    with compiled.using(None):
        assert not tracks.replayable(x, [], torch.float32)
    monkeypatch.setenv("DENSEBENCH_REPLAY", "0")
    assert not tracks.replayable(x, [], torch.float32)


def test_running_statistics_that_move_before_backward(counts: Counts) -> None:
    """Backward of an evaluation would read others than its forward did."""
    network = small("fused")
    for number in range(STEPS):
        output = network.eval()(images(seed=number))
        network.train()(images(seed=number))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.backward(upstream(output))
    assert counts["recorded"] > 0
    assert counts["played"] > 0


def _shifted(x: Tensor) -> Tensor:
    """As from an arena of memory: laid out as it was, at another alignment."""
    wider = x.new_empty(x.untyped_storage().nbytes() // x.element_size() + 1)
    return wider.as_strided(x.shape, x.stride(), 1).copy_(x)


ELSEWHERE: dict[str, Callable[[Tensor], Tensor]] = {
    "clone": torch.clone,  # without the gaps of a GPU's padded rows
    "contiguous": lambda x: x.contiguous().clone(),  # as from `save_on_cpu(pin_memory=True)`
    "shifted": _shifted,
}


HOOKED = 2  # steps


def check_saved_elsewhere(way: str) -> None:
    """Steps whose saved tensors come back laid out in another way, after others whose did not."""

    def step(network: nn.Module, x: Tensor) -> Quantities:
        with torch.autograd.graph.saved_tensors_hooks(ELSEWHERE[way], lambda x: x):
            return train(network, x)

    def batch(seed: int) -> Tensor:
        return images(2, 8, dtype=torch.float32, seed=seed).contiguous(memory_format=torch.channels_last)

    network = small(stem="imagenet", block_config=(2, 1), num_init_features=6).float()
    pair = Pair(network.to(memory_format=torch.channels_last))
    for number in range(STEPS):
        pair.step(train, batch(number))
    for number in range(STEPS, STEPS + HOOKED):
        pair.step(step, batch(number))


@pytest.mark.parametrize("way", ELSEWHERE)
def test_saved_tensors_that_were_elsewhere(counts: Counts, way: str) -> None:
    """Backward is not played back then: it would copy all that it is handed to how that lay."""
    check_saved_elsewhere(way)
    stages = 2
    assert counts == {"plain": 2 * stages, "recorded": 2 * stages, "played": (2 * (STEPS - 2) + HOOKED) * stages}


@pytest.mark.usefixtures("replayed")
@pytest.mark.parametrize("way", ELSEWHERE)
def test_saved_tensors_that_were_elsewhere_on_a_gpu(way: str) -> None:
    check_saved_elsewhere(way)


Change = Callable[[nn.Module], object]


def _strided(network: nn.Module) -> None:
    """Vectors whose values do not lie side by side, at another alignment."""
    for parameter in network.parameters():
        if parameter.dim() == 1:
            parameter.data = torch.stack([0 * parameter.data - 7, parameter.data], 1)[:, 1]


def _shift(network: nn.Module) -> None:
    for parameter in network.parameters():
        parameter.data = _shifted(parameter.data)


LATER: dict[str, Change] = {
    "layout": lambda network: network.to(memory_format=torch.channels_last),
    "strides": _strided,
    "alignment": _shift,
}


def rounded(actual: Quantities, expected: Quantities) -> None:
    assert_same(actual, expected, FLOAT32)


def check_change_before_backward(change: Change, changed: int) -> None:
    """PyTorch's version counters do not see it; values are the same, so gradients are, but for rounding."""

    def step(network: nn.Module, x: Tensor) -> Quantities:
        network.zero_grad()
        for parameter in network.parameters():
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        output = network(x)
        if number == changed:
            change(network)
        output.backward(upstream(output))
        return everything(network, output=output)

    pair = Pair(small(stem="imagenet").float())
    for number in range(STEPS + 2):
        x = images(2, 16, dtype=torch.float32, seed=number)
        pair.step(step, x, same=rounded if change is _strided else None)


@pytest.mark.parametrize("changed", [1, STEPS - 1])  # in the step that is recorded; in one that is played back
@pytest.mark.parametrize("change", LATER)
def test_parameters_that_lie_elsewhere_at_backward(counts: Counts, change: str, changed: int) -> None:
    check_change_before_backward(LATER[change], changed)
    assert counts["played"] > 2 * STEPS


@pytest.mark.usefixtures("replayed")
@pytest.mark.parametrize("change", ["layout", "alignment"])  # strided vectors are refused there
def test_parameters_that_lie_elsewhere_at_backward_on_a_gpu(change: str) -> None:
    check_change_before_backward(LATER[change], STEPS - 1)


@pytest.mark.parametrize("change", ["dtype", "shape"])
def test_other_parameters_at_backward(counts: Counts, change: str) -> None:
    """Kernels would read what is not there."""
    network = small("fused")
    for number in range(STEPS):
        train(network, images(seed=number))
    output = network(images(seed=STEPS))
    weight = network.features.denseblock1.denselayer1.conv2.weight
    before = weight.data
    weight.data = before.float() if change == "dtype" else before[:, :1].clone()
    with pytest.raises(RuntimeError, match=r"was torch.float64 of shape \[.*\] on cpu, and is now torch.float"):
        output.backward(upstream(output))
    weight.data = before
    pair = Pair(copy.deepcopy(network))
    pair.replayed = network
    counts.clear()
    pair.step(train, images(seed=STEPS + 1))
    assert counts == {"played": 3, "plain": 1}, "the backward of one block, of which that was recorded"


@pytest.mark.parametrize("name", ["shared_buffer", "fused"])
@pytest.mark.parametrize("changed", [1, STEPS - 1])
def test_options_at_backward_are_the_forwards(name: str, changed: int) -> None:
    def step(network: nn.Module, x: Tensor) -> Quantities:
        network.zero_grad()
        for norm in norms(network):
            norm.eps = 1e-5
        output = network(x)
        for norm in norms(network) if number == changed else ():
            norm.eps = 0.5
        output.backward(upstream(output))
        return everything(network, output=output)

    network, naive = small(name), small("naive")
    for number in range(STEPS + 2):
        assert_same(step(network, images(seed=number)), step(naive, images(seed=number)), GATE)


def test_parameters_on_another_device() -> None:
    network = small("fused").eval()
    for number in range(STEPS):
        infer(network, images(seed=number))
    network.features.denseblock1.denselayer1.norm1.to("meta")
    with pytest.raises(RuntimeError, match="on one device, and are on cpu and meta"):
        infer(network, images())


@pytest.mark.parametrize("name", ["shared_buffer", "fused"])
def test_tangents_are_not_lost(name: str) -> None:
    """Of forward-mode differentiation, by input or parameter."""
    network, x = small(name).eval(), images()
    parameter = "features.denseblock1.denselayer1.norm1.weight"
    for number in range(STEPS):
        infer(network, images(seed=number))
    with torch.no_grad(), forward_ad.dual_level():
        infer(network, x)
        with pytest.raises(NotImplementedError, match="forward-mode"):
            network(forward_ad.make_dual(x, x))
        weight = network.get_parameter(parameter).data
        dual = forward_ad.make_dual(weight, weight)
        with pytest.raises(NotImplementedError, match="forward-mode"):
            torch.func.functional_call(network, {parameter: dual}, (x,))
    for grad in (False, True):
        with torch.set_grad_enabled(grad), pytest.raises(NotImplementedError, match="forward-mode"):
            torch.func.jvp(network, (x,), (x,))


@pytest.mark.xfail(
    torch.__version__ < "2.12",
    raises=NotImplementedError,
    strict=True,
    reason="before PyTorch 2.12 torch.utils.checkpoint refuses forward-mode differentiation",
)
@pytest.mark.parametrize("grad", [False, True])
def test_tangents_of_strategies_that_call_modules(grad: bool) -> None:
    x, found = images(), []
    for name in ("naive", "checkpointed"):
        with torch.set_grad_enabled(grad), forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(small(name).eval()(forward_ad.make_dual(x, x + 1))).tangent
        assert tangent is not None
        assert tangent.abs().max() > 0
        found.append(tangent.detach())
    assert torch.equal(*found)


def test_gradients_that_are_lazily_negated(counts: Counts) -> None:
    def step(network: nn.Module, x: Tensor) -> Quantities:
        network.zero_grad()
        output = network(x)
        grad = upstream(output).contiguous(memory_format=torch.channels_last)  # as it is read, without a copy
        output.backward(torch._neg_view(grad) if negated else grad)
        return everything(network, output=output)

    pair = Pair(small(num_classes=None, global_pool=False))
    for number in range(STEPS):
        negated = number == STEPS - 1
        pair.step(step, images(seed=number))
    assert counts["played"] > 0


AUTOCASTS = [(None, torch.bfloat16), (torch.bfloat16, torch.float16), (torch.bfloat16, None)]


def check_another_autocast(at_forward: torch.dtype | None, at_backward: torch.dtype | None) -> None:
    """Backward computes in the forward's precision, wherever it is called."""

    def autocast(dtype: torch.dtype | None) -> torch.autocast:
        return torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None)

    def step(network: nn.Module, x: Tensor) -> Quantities:
        network.zero_grad()
        with autocast(at_forward):
            output = network(x)
        with autocast(at_backward):
            output.backward(upstream(output))
        return everything(network, output=output)

    pair = Pair(small(stem="imagenet").float())
    for number in range(STEPS):
        pair.step(step, images(2, 16, dtype=torch.float32, seed=number))


@pytest.mark.parametrize(("at_forward", "at_backward"), AUTOCASTS)
def test_another_autocast_at_backward(
    counts: Counts, at_forward: torch.dtype | None, at_backward: torch.dtype | None
) -> None:
    check_another_autocast(at_forward, at_backward)
    assert counts["played"] > 0


@pytest.mark.usefixtures("replayed")
@pytest.mark.parametrize(("at_forward", "at_backward"), AUTOCASTS)
def test_another_autocast_at_backward_on_a_gpu(
    at_forward: torch.dtype | None, at_backward: torch.dtype | None
) -> None:
    check_another_autocast(at_forward, at_backward)


def test_settings_that_change_before_backward(counts: Counts) -> None:
    """Backward reads them, too: what was recorded under others is not played back."""

    def step(network: nn.Module, x: Tensor) -> Quantities:
        output = network(x)
        with mock.patch.object(torch, "get_num_threads", return_value=torch.get_num_threads() + 1):
            output.backward(upstream(output))
        return everything(network, output=output)

    pair = Pair(small())
    for number in range(STEPS):
        pair.step(train, images(seed=number))
    counts.clear()
    pair.step(step, images(seed=STEPS))
    assert counts == {"played": 2, "plain": 2}


def test_transforms_of_functions_see_operators(counts: Counts) -> None:
    """A gradient through a frozen network, whose tensors have no memory of their own then."""
    network, x = small("fused", num_classes=None).eval(), images()
    for number in range(STEPS):
        infer(network, images(seed=number))
    counts.clear()

    def loss(scale: Tensor) -> Tensor:
        with torch.no_grad():
            features = network(x)
        return (features * scale).sum()

    found = torch.func.grad(loss)(torch.ones((), dtype=torch.float64))
    with torch.no_grad():
        torch.testing.assert_close(found, small(num_classes=None).eval()(x).sum())
        with pytest.raises(RuntimeError, match="alias"):  # operators that write have no functional form
            torch.func.functionalize(network)(x)
    assert not counts


@pytest.mark.parametrize("name", ["shared_buffer", "fused"])
def test_other_transforms_are_refused(name: str) -> None:
    network, x = small(name).eval(), images()
    parameters = dict(network.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(network, parameters, (x,)).square().sum()

    with pytest.raises(NotImplementedError, match=r"gradients of torch\.func .* work with .*'naive'.* only"):
        torch.func.grad(loss)(parameters, x)
    densebench.set_strategy(network, "naive")
    torch.func.grad(loss)(parameters, x)
    torch.testing.assert_close(torch.vmap(network)(x[:, None])[:, 0], network(x))


class Quantized(Tensor):
    """A kind of parameter that computes with its own values, which lie elsewhere."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> Quantized:
        found: Quantized = torch.Tensor._make_wrapper_subclass(
            cls, values.shape, dtype=torch.float64, strides=values.stride()
        )
        found.values = values
        return found

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Quantized(args[0].values)
        args, kwargs = tree_map_only(Quantized, lambda one: one.values.double(), (args, kwargs or {}))
        return func(*args, **kwargs)


def test_parameters_of_a_kind_of_their_own(counts: Counts) -> None:
    """They are refused also where the same network ran, and was recorded, before they came."""
    network = small("fused").eval()
    for _ in range(STEPS):
        infer(network, images())
    assert counts["played"]
    conv = network.features.denseblock1.denselayer1.conv2
    conv.weight = nn.Parameter(Quantized(conv.weight.data), requires_grad=False)
    with torch.no_grad(), pytest.raises(NotImplementedError, match="says itself what operators do"):
        network(images())


def test_operators_that_someone_counts_are_called(counts: Counts) -> None:
    """A mode that watches operators would miss those that are played back."""
    network, found = small("fused"), []
    for _ in range(4):
        with FlopCounterMode(display=False) as counter:
            train(network, images())
        found.append(counter.get_total_flops())
    assert len(set(found)) == 1
    assert found[0] > 0
    assert not counts
