"""Graphs of a network are made from `naive`, by every tracer; strategies that run around modules say so."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from densebench import UnsupportedError, convert, get_strategy, list_strategies, set_strategy
from tests.conversion.networks import theirs, torchvision
from tests.networks import images, small

TRACERS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "jit": torch.jit.trace,
    "fx": lambda network, x: torch.fx.symbolic_trace(network),
    "export": lambda network, x: torch.export.export(network, (x,)).module(),
    "export strict": lambda network, x: torch.export.export(network, (x,), strict=True).module(),
}
COMPUTED = [name for name in list_strategies() if get_strategy(name).bypasses != "nothing"]

every_tracer = pytest.mark.parametrize("tracer", TRACERS)


def traced(network: nn.Module, tracer: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.jit: it is deprecated, and people use it
        return TRACERS[tracer](network, images(2, 8))


@every_tracer
def test_naive_is_a_graph(tracer: str) -> None:
    network = small().eval()
    x = images(2, 8, seed=1)
    assert torch.equal(traced(network, tracer)(x), network(x))


@every_tracer
def test_so_is_a_converted_network(tracer: str) -> None:
    network = theirs(torchvision).eval()
    network.features.pool0 = nn.Identity()  # for small images
    expected = network(images(2, 8, seed=1))
    graph = traced(convert(copy.deepcopy(network), "naive"), tracer)
    assert torch.allclose(graph(images(2, 8, seed=1)), expected, rtol=1e-11)


@pytest.mark.parametrize("computed", COMPUTED)
@pytest.mark.parametrize("tracer", ["jit", "fx", "export"])
def test_computed_stages_are_refused_with_the_remedy(tracer: str, computed: str) -> None:
    network = small(computed).eval()
    with pytest.raises(UnsupportedError, match=r"cannot be traced or exported; densebench\.set_strategy"):
        traced(network, tracer)
    assert torch.equal(traced(set_strategy(network, "naive"), tracer)(images(2)), network(images(2)))


@pytest.mark.parametrize("computed", COMPUTED)
def test_whole_graphs_are_refused_with_the_remedy(computed: str) -> None:
    network = small(computed).eval()
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"set_strategy\(model, 'naive'\) is a graph"):
        compiled(images(2))


@pytest.mark.parametrize("computed", COMPUTED)
def test_so_is_a_block_by_itself(computed: str) -> None:
    around = nn.Sequential(small(computed).features.denseblock1)
    with pytest.raises(UnsupportedError, match="cannot be traced or exported"):
        torch.fx.symbolic_trace(around)


def test_a_block_is_a_graph_before_anything_else_is_known() -> None:
    """In a process of its own: compilers cannot follow how strategies are found."""
    code = (
        "import torch\n"
        "from densebench.models import DenseBlock\n"
        "block, x = DenseBlock(2, 8, 4), torch.randn(2, 8, 6, 6)\n"
        "compiled = torch.compile(block, fullgraph=True, backend='eager')\n"
        "assert torch.allclose(compiled(x), block(x), atol=1e-6)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_maps_of_a_graph() -> None:
    theirs(torchvision)  # imported as it can be on a CPU build
    extraction: Any = pytest.importorskip("torchvision.models.feature_extraction")
    network = small().eval()
    wanted = {"features.denseblock1": "first", "classifier": "last"}
    maps = extraction.create_feature_extractor(network, wanted)(images(2))
    assert torch.equal(maps["last"].flatten(1), network(images(2)))
    assert torch.equal(maps["first"], network.end_points(images(2))["denseblock1"])
