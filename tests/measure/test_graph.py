"""A step as a CUDA graph: what can be known of it without a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.cases import graph_group
from benchmarks.profiles import profile
from densebench.measure.graph import WARM_UPS, Graphed, why_no_graph
from densebench.registry import list_strategies
from densebench.workload import Workload, build_workload
from tests.measure.cases import small_case


class FakeGraph:
    """Records nothing; counts."""

    made = replayed = 0

    def __init__(self) -> None:
        FakeGraph.made += 1

    def replay(self) -> None:
        FakeGraph.replayed += 1


class FakeStream:
    def wait_stream(self, other: Any) -> None:
        pass


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def nothing(_: Any) -> Iterator[None]:
        yield

    FakeGraph.made = FakeGraph.replayed = 0
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", nothing)
    monkeypatch.setattr(torch.cuda, "graph", nothing)


def test_only_cuda_has_graphs() -> None:
    assert why_no_graph(small_case()) is None
    assert why_no_graph(small_case(device="cuda", cuda_graph=True)) is None
    assert str(why_no_graph(small_case(cuda_graph=True))).startswith("CUDA graphs need a CUDA device")


@pytest.mark.usefixtures("fake_cuda")
def test_it_warms_up_records_and_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 0
    step = Workload.step

    def counted(self: Workload) -> torch.Tensor:
        nonlocal steps
        steps += 1
        return step(self)

    monkeypatch.setattr(Workload, "step", counted)
    work = build_workload(small_case())
    graphed = Graphed(work)
    assert steps == WARM_UPS
    with pytest.raises(RuntimeError, match="nothing is recorded yet"):
        graphed.replay()
    graphed.clear_gradients()
    graphed.step()
    output = graphed.replay()
    assert (steps, FakeGraph.made, FakeGraph.replayed) == (WARM_UPS + 1, 1, 1)
    assert output.shape == (4, 10)
    assert graphed.constant_bytes() == work.constant_bytes()
    graphed.step()
    assert FakeGraph.made == 2


def test_the_full_profile_has_a_graph_of_every_strategy() -> None:
    group = graph_group("densenet121", 64, "bfloat16")
    graphed = group.cases
    assert [case.strategy for case in graphed] == list_strategies()
    assert all(case.cuda_graph for case in graphed)
    assert group in profile("full", "cuda").groups
    assert not any(case.cuda_graph for g in profile("default", "cuda").groups for case in g.cases)
