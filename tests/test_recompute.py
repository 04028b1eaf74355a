"""What strategies recompute in backward: statistics move once, and nothing that has changed since is seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from densebench.execution.recompute import recomputed, settled_first_half, settled_layers
from densebench.models import DenseNet
from densebench.models.stage import Stage
from tests.comparison import assert_same, buffers, everything, play, step, upstream
from tests.networks import images, norms, small, temporary_strategy


def _block(layers: Any, x: Tensor) -> Tensor:
    features = [x]
    for layer in layers:
        features.append(layer(torch.cat(features, 1)))
    return torch.cat(features, 1)


def _whole_block(stage: Stage, x: Tensor) -> Tensor:
    layers = settled_layers(stage.layers)
    return stage.run_tail(recomputed(lambda x: _block(layers, x), layers, stage.run_head(x)))


def _every_second_layer(stage: Stage, x: Tensor) -> Tensor:
    features = [stage.run_head(x)]
    for index, layer in enumerate(stage.layers):
        if index % 2:
            new = layer(torch.cat(features, 1))
        else:
            (settled,) = settled_layers([layer])
            new = recomputed(lambda *maps, settled=settled: settled(torch.cat(maps, 1)), [settled], *features)
        features.append(new)
    return stage.run_tail(torch.cat(features, 1))


@pytest.fixture(params=[_whole_block, _every_second_layer], ids=["whole_block", "every_second_layer"])
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    with temporary_strategy("recomputing", request.param, bypasses="block", derivatives="autograd") as name:
        yield name


def _cumulative(network: DenseNet) -> None:
    for norm in norms(network):
        norm.momentum = None


def _shared(network: DenseNet) -> None:
    """Two calls of a norm in one forward, each a batch of its own."""
    first, second, *_ = network.features.denseblock2.layers
    second.norm2 = first.norm2
    first.norm2.momentum = None


def _some_in_evaluation(network: DenseNet) -> None:
    for norm in norms(network)[::2]:
        norm.eval()


def _without_running_statistics(network: DenseNet) -> None:
    layer = network.features.denseblock1.denselayer2
    layer.norm1 = nn.BatchNorm2d(layer.norm1.num_features, track_running_stats=False).double()


def _dropout(network: DenseNet) -> None:
    for block in (network.features.denseblock1, network.features.denseblock2):
        for layer in block.layers:
            layer.drop_rate = 0.4


CHANGES = [_cumulative, _shared, _some_in_evaluation, _without_running_statistics, _dropout]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_steps_are_naive_ones(name: str, change: Callable[[DenseNet], None]) -> None:
    """Outputs, gradients and statistics over several steps: one that moved twice would show in the next."""

    def scenario(network: Any) -> Any:
        torch.manual_seed(0)
        found = {}
        for number in range(3):
            found |= {f"{key}, {number}": value for key, value in step(network, images(seed=number)).items()}
        return found

    network = small()
    change(network)
    assert_same(play(scenario, network, name), play(scenario, network, "naive"))


def _to_evaluation(network: DenseNet) -> None:
    network.eval()


def _other_statistics(network: DenseNet) -> None:
    for norm in norms(network):
        norm.running_mean.add_(3.0)
        norm.running_var.mul_(2.0)


def _other_modules(network: DenseNet) -> None:
    for block in (network.features.denseblock1, network.features.denseblock2):
        for layer in block.layers:
            layer.drop_rate = 0.5
            layer.norm1.eps = 0.1


AFTER = [_to_evaluation, _other_statistics, _other_modules]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("after", AFTER, ids=lambda after: after.__name__.strip("_"))
def test_what_changes_after_the_forward_is_not_seen(after: Callable[..., None], training: bool) -> None:
    """Of a block and no module beside it: what autograd keeps for those it guards itself."""

    def gradients(strategy: str, change: bool) -> Any:
        network = small(strategy).train(training)
        x = images(channels=8).requires_grad_()
        output = network.features.denseblock1(x)
        if change:
            after(network)
        output.backward(upstream(output))
        return {n: p.grad for n, p in network.features.denseblock1.named_parameters()} | {"input": x.grad}

    with temporary_strategy("recomputing", _whole_block, bypasses="block", derivatives="autograd") as name:
        assert_same(gradients(name, True), gradients("naive", False))


def test_a_parameter_written_after_the_forward_is_refused(name: str) -> None:
    network = small(name)
    output = network(images())
    with torch.no_grad():
        network.features.denseblock1.denselayer1.norm1.bias.add_(1.0)
    with pytest.raises(
        RuntimeError, match="modified by an inplace operation: a parameter or input of a layer that"
    ):
        output.backward(upstream(output))


def test_a_forward_that_fails_moves_nothing_of_what_it_would_recompute() -> None:
    """Here in its second layer, when the first has been computed."""

    def failing(stage: Stage, x: Tensor) -> Tensor:
        layers = settled_layers(stage.layers)

        def block(x: Tensor) -> Tensor:
            layers[0](x)
            raise OSError("in the middle")

        return recomputed(block, layers, x)

    with temporary_strategy("failing", failing, bypasses="block") as name:
        network = small(name)
        before = buffers(network)
        with pytest.raises(OSError, match="in the middle"):
            network(images())
        assert_same(buffers(network), before, 0.0)


def test_backward_twice_moves_statistics_once(name: str) -> None:
    network, x = small(name), images().requires_grad_()
    output = network(x)
    after_forward = buffers(network)
    for _ in range(2):
        output.backward(upstream(output), retain_graph=True)
    assert_same(buffers(network), after_forward, 0.0)
    other = small()
    other(x)
    assert_same(after_forward, buffers(other))


def test_the_first_half_is_that_of_the_modules() -> None:
    """Up to the bottleneck; of a layer without one, up to its dropout."""
    for options in ({}, {"bn_size": None}):
        layer = small(**options).eval().features.denseblock1.denselayer1
        x = images(channels=8)
        assert torch.equal(settled_first_half(layer)(x), layer.conv1(layer.relu1(layer.norm1(x))))


def test_nothing_but_inputs_is_kept(name: str) -> None:
    """That is what it is for: fewer bytes between forward and backward than naive."""
    kept = {}
    for chosen in ("naive", name):
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        network = small(chosen, block_config=(6, 6))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = network(images(size=16))
        kept[chosen] = sum(sizes.values())
        assert everything(network, output=output)
    assert kept[name] < 0.8 * kept["naive"]
