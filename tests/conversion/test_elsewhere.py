"""Blocks that stand by themselves, or are called one by one, are run by the strategy, too."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from densebench import UnsupportedError, assert_equivalent, convert, set_strategy
from densebench.models import DenseBlock, Stage
from densebench.models.features import Features
from densebench.registry import get_strategy
from tests.comparison import assert_same, step
from tests.conversion.networks import Encoder, every_library, theirs, timm, torchvision
from tests.networks import images, lone_block, small, temporary_strategy


def blocks(model: nn.Module) -> list[DenseBlock]:
    return [module for module in model.modules() if isinstance(module, DenseBlock)]


def test_an_encoder_that_calls_its_blocks(every_strategy: str) -> None:
    network = theirs(Encoder)
    ours = convert(copy.deepcopy(network), every_strategy)
    assert ours.enc1 is ours.features.denseblock1
    assert ours.down1 is ours.features.transition1
    assert [block.strategy for block in blocks(ours)] == [every_strategy] * 2
    assert list(ours.state_dict()) == list(network.state_dict())
    for seed, mode in enumerate((True, True, False)):
        x = images(3, 16, seed=seed)
        expected, actual = (step(each.train(mode), x) for each in (network, ours))
        assert_same(actual, expected)


@every_library
def test_a_block_by_itself(build: Callable[..., nn.Module], every_strategy: str) -> None:
    (block,) = [module for name, module in theirs(build).named_modules() if name == "features.denseblock2"]
    model = nn.ModuleDict({"only": copy.deepcopy(block)})
    convert(model, every_strategy)
    assert isinstance(model["only"], DenseBlock)
    x = images(3, 8, model["only"].in_channels)
    assert_same(step(model["only"], x), step(block, x))
    assert isinstance(convert(copy.deepcopy(block), every_strategy), DenseBlock)


@pytest.mark.parametrize("name", ["first", "second"])
def test_a_wrapper_stays(name: str, every_strategy: str) -> None:
    """segmentation_models_pytorch wraps transitions, others wrap blocks, to hand on what is skipped."""

    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.module(x)

    network = theirs(torchvision)
    wrapped = {"first": "transition1", "second": "denseblock2"}[name]
    setattr(network.features, wrapped, Wrapper(getattr(network.features, wrapped)))
    ours = convert(copy.deepcopy(network), every_strategy)
    assert isinstance(getattr(ours.features, wrapped), Wrapper)
    assert len(blocks(ours)) == 2
    x = images(2, 32)
    assert_same(step(ours, x), step(network, x))


def test_getters_of_intermediate_maps(every_strategy: str) -> None:
    getter: Any = pytest.importorskip("torchvision.models._utils").IntermediateLayerGetter
    wanted = {"denseblock1": "1", "denseblock2": "2"}
    body = getter(theirs(torchvision).features, wanted)
    ours = convert(copy.deepcopy(body), every_strategy)
    assert len(blocks(ours)) == 2
    assert_maps(ours, body)


def test_timms_feature_lists(every_strategy: str) -> None:
    theirs(timm)  # skips where timm is missing
    create: Any = pytest.importorskip("timm").create_model
    body = create("densenet121", features_only=True, growth_rate=4, block_config=(1, 2, 1, 1)).double().eval()
    ours = convert(copy.deepcopy(body), every_strategy)
    assert len(blocks(ours)) == 4
    assert_maps(ours, body)


def test_graphs_with_blocks_as_leaves(every_strategy: str) -> None:
    network = theirs(torchvision)
    extraction: Any = pytest.importorskip("torchvision.models.feature_extraction")
    leaves = {"leaf_modules": [type(network.features.denseblock1)]}
    wanted = ["features.denseblock1", "classifier"]
    graph = extraction.create_feature_extractor(network, wanted, tracer_kwargs=leaves)
    ours = convert(copy.deepcopy(graph), every_strategy)
    assert len(blocks(ours)) == 2
    assert_maps(ours, graph)


def assert_maps(ours: nn.Module, theirs: nn.Module) -> None:
    x = images(2, 32)
    expected, actual = theirs(x), ours(x)
    expected, actual = (list(maps.values()) if isinstance(maps, dict) else maps for maps in (expected, actual))
    assert len(actual) == len(expected) > 1
    assert all(torch.allclose(a, e, rtol=1e-11) for a, e in zip(actual, expected, strict=True))


def test_one_module_at_two_places(every_strategy: str) -> None:
    network = theirs(torchvision).features
    network.add_module("relu5", network.relu0)
    network.denseblock1.denselayer1.relu2 = network.denseblock1.denselayer1.relu1
    ours = convert(copy.deepcopy(network), every_strategy)
    assert isinstance(ours, Features)
    x = images(2, 32)
    assert_same(step(ours, x), step(network, x))


def test_two_places_one_block() -> None:
    block = theirs(torchvision).features.denseblock1
    model = nn.ModuleDict({"a": nn.ModuleList([block]), "b": nn.ModuleList([block])})
    assert convert(model)["a"][0] is model["b"][0]


def test_the_strategy_runs_it_and_not_the_modules() -> None:
    seen: list[tuple[bool, bool]] = []

    def run(stage: Stage, x: Tensor) -> Tensor:
        seen.append((stage.head is None, stage.tail is None))
        return get_strategy("fused").function(stage, x)

    network = theirs(Encoder)
    with temporary_strategy("seen", run, bypasses="stage") as name:
        convert(network, name)(images(2, 16))
        assert seen == [(True, True)] * 2
        network.features(images(2, 32))
        assert seen[2:] == [(False, False), (True, True)]


def test_a_strategy_that_falls_back_to_naive() -> None:
    calls: list[bool] = []

    def run(stage: Stage, x: Tensor) -> Tensor:
        calls.append(stage.alone)
        return get_strategy("naive").function(stage, x)

    (block,) = blocks(lone_block())
    x = images(2, 8, 5)
    expected = block(x)
    with temporary_strategy("falls_back", run, bypasses="stage") as name:
        assert torch.equal(set_strategy(block, name)(x), expected)
    assert calls == [True]


def test_naive_is_naive_whatever_the_strategy_of_the_block() -> None:
    (block,) = blocks(lone_block("fused"))
    seen: list[str] = []
    block.denselayer1.register_forward_hook(lambda *_: seen.append("called"))
    get_strategy("naive").function(Stage(block), images(2, 8, 5))
    assert seen == ["called"]


def test_hooks_on_a_block_by_itself_see_what_it_makes() -> None:
    (block,) = blocks(lone_block())
    seen: list[Tensor] = []
    set_strategy(block, "fused").register_forward_hook(lambda module, inputs, output: seen.append(output))
    output = block(images(2, 8, 5))
    assert seen == [output]
    set_strategy(block, "fused_recompute")
    block.denselayer1.norm1.register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedError, match=r"does not call block\.denselayer1\.norm1, which has a hook"):
        block(images(2, 8, 5))


def test_hooks_on_a_block_of_a_network_are_refused() -> None:
    network = small("fused")
    network.features.denseblock1.register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedError, match="does not call denseblock1, which has a hook"):
        network(images(2))


def test_no_images(every_strategy: str) -> None:
    (block,) = blocks(lone_block(every_strategy).eval())
    assert block(images(2, 8, 5)[:0]).shape == (0, 17, 8, 8)


def test_a_strategy_for_each_block() -> None:
    network = small(block_config=(2, 2, 2))
    x = images(3)
    expected = step(copy.deepcopy(network), x)
    assert set_strategy(network.features.denseblock2, "fused_recompute") is network.features.denseblock2
    set_strategy(network.features.denseblock3, "checkpointed")
    assert network.strategy == "naive, fused_recompute, checkpointed"
    assert network.features[:2].strategy == "naive"
    assert_same(step(network, x), expected)
    assert set_strategy(network, "fused").strategy == "fused"


def test_parts_of_a_network_keep_their_strategy() -> None:
    features = small("shared_buffer").features
    assert Features(OrderedDict(features.named_children())).strategy == "shared_buffer"
    assert features[:1].strategy == ""  # no block, no strategy


def test_compiled_around_a_block_by_itself() -> None:
    model = convert(theirs(Encoder), "fused").eval()
    x = images(2, 16)
    compiled = torch.compile(model, backend="eager")
    assert torch.allclose(compiled(x), model(x), rtol=1e-11)


def test_equivalence_of_what_is_around_blocks(every_strategy: str) -> None:
    network = theirs(Encoder)
    ours = convert(copy.deepcopy(network), "naive")
    assert assert_equivalent(ours, every_strategy, images(3, 16), reference=network)
