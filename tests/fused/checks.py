"""Checks that seeded faults must not pass, and the right code must."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import densebench
from densebench.kernels import passes
from densebench.kernels.channel_statistics import channel_statistics
from densebench.models import DenseNet
from densebench.models.features import stages_in
from tests import test_pooling
from tests.comparison import assert_as_naive, everything, step
from tests.kernels.problems import PROBLEMS, Shape
from tests.networks import images, lone_block, norms, small

CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


def _equivalent(network: nn.Module, x: Tensor, **options: Any) -> None:
    for strategy in ("fused", "fused_recompute"):
        densebench.assert_equivalent(network, strategy, x, **options)


def _imagenet() -> DenseNet:
    return small(stem="imagenet", block_config=(2, 2), growth_rate=5)


@check
def training() -> None:
    _equivalent(_imagenet(), images(3, 24))


@check
def wide() -> None:
    """Channels that fill the blocks in which products are computed."""
    _equivalent(small(growth_rate=12, num_init_features=24), images())


@check
def several_threads() -> None:
    """Every pass on two, whose sums are added up; the other networks here are too small for a second.

    It begins in the middle of an image.
    """
    threads, few = torch.get_num_threads(), passes.FEW_VALUES
    torch.set_num_threads(2)
    passes.FEW_VALUES = 0
    try:
        _equivalent(_imagenet(), images(3, 40))
    finally:
        torch.set_num_threads(threads)
        passes.FEW_VALUES = few


@check
def infinity() -> None:
    """The mean of a channel with an infinity is infinite, not NaN: what values are taken relative to is finite."""
    x = torch.ones(100, 3, dtype=torch.float64)
    x[0, 1], x[4, 2] = math.inf, -math.inf
    mean, var = torch.empty(2, 3, dtype=torch.float64)
    channel_statistics(x, mean, var)
    assert torch.equal(mean, torch.tensor([1, math.inf, -math.inf], dtype=torch.float64))


@check
def several_steps() -> None:
    _equivalent(small(), [images(seed=seed) for seed in (1, 2, 3)], learning_rate=0.1)


@check
def evaluation() -> None:
    _equivalent(_imagenet().eval(), images(3, 24))


@check
def volumes() -> None:
    """Of an odd depth before the stem's pool, and before the transition's."""
    network = small(spatial_dims=3, stem="imagenet", block_config=(2, 1), growth_rate=5)
    _equivalent(network, images(2, 9, dims=3))
    assert network.features(images(2, 9, dims=3)).shape[2:] == (1, 1, 1)


@check
def pools_of_volumes() -> None:
    test_pooling.test_maximum((5, 7, 6))
    test_pooling.test_maximum_with_nan_and_infinity()


@check
def inference() -> None:
    network = _imagenet().eval()
    with torch.no_grad():
        expected = densebench.set_strategy(network, "naive")(images(3, 24))
        actual = densebench.set_strategy(network, "fused")(images(3, 24))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@check
def mixed_modes() -> None:
    for evaluated in (slice(0, None, 2), slice(1, None, 2), slice(1, None, 4)):
        network = small()
        for norm in norms(network)[evaluated]:
            norm.eval()
        _equivalent(network, images())


@check
def cumulative_average() -> None:
    network = small()
    for norm in norms(network):
        norm.momentum = None
    _equivalent(network, [images(seed=1), images(seed=2)])


@check
def frozen() -> None:
    network = small()
    for norm in norms(network)[::2]:
        norm.weight.requires_grad_(False)
    _equivalent(network, images())


@check
def dropout() -> None:
    _equivalent(small(drop_rate=0.3), images())


@check
def plain_layers() -> None:
    _equivalent(small(bn_size=None), images())


@check
def dilated() -> None:
    _equivalent(small(stem="imagenet", block_config=(1, 1, 2), output_stride=8), images(2, 16))


@check
def dilated_volumes() -> None:
    network = small(spatial_dims=3, stem="imagenet", block_config=(1, 1, 1, 2), output_stride=8)
    _equivalent(network, images(2, 24, dims=3))


@check
def uneven_dilation() -> None:
    """Such convolutions are the library's, between passes of their own."""
    network = small()
    for stage in stages_in(network):
        for layer in stage.layers:
            layer.conv3x3.dilation = layer.conv3x3.padding = (1, 2)
    _equivalent(network, images())


@check
def nan() -> None:
    x = images(channels=5)
    x[1, 2, 3, 4] = math.nan
    _equivalent(lone_block().eval(), x)


@check
def two_forwards() -> None:
    """Two forwards, then both backwards, the older one first."""

    def scenario(network: nn.Module) -> dict[str, Tensor | None]:
        first, second = network(images(seed=1)), network(images(seed=2))
        first.square().sum().backward()
        second.square().sum().backward()
        return everything(network)

    assert_as_naive("fused", scenario, small())


@check
def incoming_gradient() -> None:
    """Backward leaves the gradient that it is given as it was."""
    network = lone_block("fused")
    output = network(images(channels=5).requires_grad_())
    grad = torch.randn_like(output)
    before = grad.clone()
    output.backward(grad)
    assert torch.equal(grad, before)
    assert_as_naive("fused", lambda n: step(n, images(channels=5)), lone_block())


def _operators(names: tuple[str, ...], implementation: str, **shape: Any) -> None:
    for name in names:
        problem = PROBLEMS[name](Shape(**shape))
        produced = problem.solve(implementation)
        for quantity, truth in problem.expected.items():
            torch.testing.assert_close(produced[quantity].double(), truth, rtol=1e-11, atol=1e-11, msg=quantity)


SUMS = ("channel_statistics", "bn_relu_backward", "bn_relu_conv1x1", "bn_relu_conv1x1_backward")


@check
def triton_values() -> None:
    many = {"columns": 40, "extra": 8, "images": 3, "height": 8, "width": 8}
    for shape in ({}, many, {"images": 1, "height": 3, "width": 3}):
        _operators((*SUMS, "bn_relu", "bn_relu_backward_into", "settled_gradient"), "cuda", **shape)


POOLS = ("bn_relu_max_pool", "bn_relu_max_pool_backward", "bn_relu_avg_pool", "bn_relu_avg_pool_backward")


@check
def pools() -> None:
    """Of whole numbers many are equal; an odd line and pixel at the end, and an even one."""
    for integers in (False, True):
        _operators(POOLS, "cpu", integers=integers, extra=3)
        _operators(POOLS, "cpu", integers=integers, height=6, width=6)


@check
def triton_pools() -> None:
    for integers in (False, True):
        _operators(POOLS, "cuda", integers=integers, extra=3)


@check
def triton_float16_range() -> None:
    """A channel that is nearly constant and far from 0: its norm of a 0 beyond the last row is beyond float16."""
    problem = PROBLEMS["bn_relu_conv1x1_backward"](Shape(images=1, height=3, width=3, dtype=torch.float16))
    mean, var, gamma = problem.arguments[2:5]
    problem.arguments[1][:, 3], mean[3], var[3], gamma[3] = -300.0, -300.0, 0.0, 8.0
    assert bool(problem.solve("cuda")["grad_weight"].isfinite().all())


@check
def triton_nan() -> None:
    problem = PROBLEMS["bn_relu"](Shape(extra=0))
    problem.arguments[0][3, 4] = math.nan
    assert bool(problem.solve("cuda")["out"].isnan()[3, 4])
