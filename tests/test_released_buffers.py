"""A stage's buffers go when its backward is over, however it ends, although the output lives on."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from densebench.execution import autograd
from densebench.execution.parts import LAYERS_A_NODE
from densebench.prediction.networks import trace_network
from densebench.replay.tracks import Plain
from tests.comparison import upstream
from tests.networks import images, lone_block

BUFFERS = {"features", "gradient", "scratch", "statistics"}


@pytest.fixture(autouse=True)
def backwards(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """All that were started, which an error's traceback would keep alive, too."""
    started: list[Any] = []

    class Noted(autograd._Backward):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            started.append(self)

    monkeypatch.setattr(autograd, "_Backward", Noted)
    return started


def _forward(output: Tensor) -> Any:
    """What autograd holds on to as long as the output lives; skips for strategies that call every module."""
    node: Any = output.grad_fn
    if type(node).__name__ != "_NodeBackward":
        pytest.skip("calls modules: autograd holds what it saved, and frees it")
    return node.run


def _assert_released(forward: Any, backwards: list[Any]) -> None:
    assert not forward.backwards
    assert backwards
    for computation in (forward.computation, *(one.computation for one in backwards)):
        assert not BUFFERS & vars(computation).keys()
    assert {type(one.passing) for one in backwards} == {Plain}


def test_after_backward(strategy: str, backwards: list[Any]) -> None:
    output = lone_block(strategy)(images(2, 4, 5).requires_grad_())
    forward = _forward(output)
    output.backward(upstream(output))
    _assert_released(forward, backwards)


def test_after_backward_to_a_frozen_boundary(strategy: str, backwards: list[Any]) -> None:
    """Nothing before the boundary needs a gradient, so the node that enters the stage never runs."""
    network = lone_block(strategy, layers=2 * LAYERS_A_NODE + 1)
    for layer in network.denseblock1.layers[: LAYERS_A_NODE + 1]:
        layer.requires_grad_(False)
    output = network(images(2, 4, 5))
    forward = _forward(output)
    output.backward(upstream(output))
    _assert_released(forward, backwards)


class _Failing(TorchDispatchMode):
    """Fails at the backward of a convolution."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "convolution_backward" in str(function) or "conv3x3_backward" in str(function):
            raise RuntimeError("announced")
        return function(*args, **(kwargs or {}))


def test_after_a_backward_that_failed(strategy: str, backwards: list[Any]) -> None:
    output = lone_block(strategy)(images(2, 4, 5).requires_grad_())
    forward = _forward(output)
    with pytest.raises(RuntimeError, match="announced"), _Failing():
        output.backward(upstream(output))
    _assert_released(forward, backwards)


@pytest.mark.parametrize("shape", [(2, 3, 64, 64), (2, 3, 32, 32, 32)], ids=["images", "volumes"])
@pytest.mark.parametrize("name", ["fused", "fused_recompute"])
def test_what_layers_keep_is_gone_when_the_stem_goes_back(name: str, shape: tuple[int, ...]) -> None:
    """The stem's map is the largest of all: of volumes it would make the peak, beside the first block's."""
    trace = trace_network("densenet121", shape, name, "train", device="cpu")
    stem = 1 + [operation.name for operation in trace.operations].index(
        "densebench.bn_relu_max_pool_backward.default"
    )
    forward = [one for one in trace.allocations if one.born <= trace.forward_end]
    kept = [one for one in forward if one.died is None or one.died > stem]
    assert [one.operation for one in kept if one.nbytes > 10_000] == ["aten.convolution.default"]
