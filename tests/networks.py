"""Small networks and images for the tests, drawn so that nothing cancels and no bug can hide.

A fresh batch norm (weight 1, bias 0, running mean 0, running variance 1) hides most faults: |weight|, a
missing bias, a swapped momentum. So norms are drawn at random here, negative weights included.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

from densebench import registry
from densebench.formats import CHANNELS_LAST
from densebench.models import DenseBlock, DenseNet, DenseNetConfig, set_strategy
from densebench.models.dimensions import BatchNorm
from densebench.models.features import Features

_M = TypeVar("_M", bound=nn.Module)

# Name: (options of DenseNetConfig beyond `small`'s own, side of the image).
ARCHITECTURES: dict[str, tuple[dict[str, Any], int]] = {
    "bottleneck": ({}, 8),
    "plain": ({"bn_size": None}, 8),
    "four_blocks": ({"block_config": (2, 2, 2, 2), "stem": "imagenet"}, 64),
    "cifar": ({"block_config": (2, 2, 2), "bn_size": None, "compression": 1.0, "growth_rate": 12}, 12),
    "cifar_bc": ({"block_config": (2, 2, 2), "growth_rate": 12, "num_init_features": 24}, 12),
    "output_stride_8": ({"block_config": (2, 2, 2, 2), "stem": "imagenet", "output_stride": 8}, 40),
    "output_stride_16": ({"block_config": (1, 2, 2), "output_stride": 16, "stem": "imagenet"}, 33),
    "initial_stride_2": ({"stem": "imagenet", "initial_output_stride": 2}, 17),
    "both_strides": (
        {"block_config": (1, 1, 2, 1), "stem": "imagenet", "initial_output_stride": 2, "output_stride": 8},
        32,
    ),
    "one_layer_blocks": ({"block_config": (1, 1)}, 8),
    "one_block": ({"block_config": (3,)}, 6),
    "deep": ({"block_config": (18, 2), "growth_rate": 2, "bn_size": 2}, 6),
    "odd": (
        {"growth_rate": 5, "num_init_features": 7, "bn_size": 3, "compression": 0.37, "in_channels": 2},
        9,
    ),
    "per_pixel": ({"global_pool": False, "num_classes": 3}, 8),
    "features": ({"global_pool": False, "num_classes": None}, 8),
    "last_map_of_one_pixel": ({"block_config": (2, 2, 2)}, 4),
    "volumes": ({"spatial_dims": 3, "growth_rate": 3, "num_init_features": 5}, 7),
    "volumes_plain": ({"spatial_dims": 3, "bn_size": None, "block_config": (2, 1), "in_channels": 1}, 5),
    "volumes_with_pool": ({"spatial_dims": 3, "stem": "imagenet", "block_config": (2, 1), "in_channels": 1}, 13),
    "volumes_dilated": ({"spatial_dims": 3, "block_config": (1, 1, 1, 1, 1), "output_stride": 8}, 8),
}


def small(strategy: str = "naive", *, seed: int = 0, **options: Any) -> DenseNet:
    """(2, 3) layers with bottlenecks, k = 4, on the CIFAR stem; float64, in training mode."""
    torch.manual_seed(seed)
    config = {"growth_rate": 4, "block_config": (2, 3), "num_init_features": 8, "num_classes": 5}
    network = DenseNet(DenseNetConfig(**{"stem": "cifar", **config, **options}))
    draw_norms(network)
    return with_strategy(network.double(), strategy)


def lone_block(
    strategy: str = "naive",
    *,
    layers: int = 3,
    channels: int = 5,
    growth_rate: int = 4,
    bn_size: int | None = 2,
    drop_rate: float = 0.0,
    spatial_dims: int = 2,
) -> Features:
    """A network that is one dense block without head or tail: what comes in and out is the strategy's own."""
    torch.manual_seed(0)
    block = DenseBlock(layers, channels, growth_rate, bn_size, drop_rate, spatial_dims=spatial_dims)
    network = Features(OrderedDict(denseblock1=block))
    draw_norms(network)
    return with_strategy(network.double(), strategy)


def architecture(name: str, **options: Any) -> tuple[DenseNet, Tensor]:
    """A network of `ARCHITECTURES` and a batch of three images (or volumes) for it."""
    chosen, size = ARCHITECTURES[name]
    network = small(**{**chosen, **options})
    return network, images(3, size, network.config.in_channels, dims=network.config.spatial_dims)


def channels_last(network: _M, x: Tensor, device: torch.device | str | None = None) -> tuple[_M, Tensor]:
    """Both in channels-last memory."""
    chosen: Any = {"device": device, "memory_format": CHANNELS_LAST[x.dim()]}
    return network.to(**chosen), x.to(**chosen)


def images(
    batch: int = 4,
    size: int = 8,
    channels: int = 3,
    *,
    dtype: torch.dtype = torch.float64,
    seed: int = 1,
    dims: int = 2,
) -> Tensor:
    """[batch, channels, size, size], or with three sizes; like images, and unlike `randn`, without mean zero."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, channels, *(size,) * dims)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + 0.5).to(dtype)


def draw_norms(network: nn.Module) -> None:
    """Draw weights of either sign, biases and running statistics for every batch norm."""
    for norm in norms(network):
        size = norm.num_features
        sign = torch.where(torch.rand(size) < 0.3, -1.0, 1.0)
        with torch.no_grad():
            norm.weight.copy_(sign * (0.5 + torch.rand(size)))
            norm.bias.copy_(0.5 * torch.randn(size))
            norm.running_mean.copy_(0.5 * torch.randn(size))
            norm.running_var.copy_(0.5 + torch.rand(size))


def align_masks(network: nn.Module) -> None:
    """Shift biases to +-5, channel by channel, so that no value of any ReLU changes sign by rounding.

    A value within rounding of zero may be rectified in one run and not in the other; both are right, and
    the gradient differs by 100 %. So gradients of whole networks in float32 are compared on masks that
    rounding cannot change: channels that are all on or all off (correctness: failure mode 9).
    """
    for norm in norms(network):
        with torch.no_grad():
            norm.weight.copy_(0.9 + 0.2 * torch.rand_like(norm.weight))
            norm.bias.fill_(5.0)
            norm.bias[1::2] = -5.0


def norms(network: nn.Module) -> list[BatchNorm]:
    return [module for module in network.modules() if isinstance(module, BatchNorm)]


def with_strategy(network: _M, strategy: str) -> _M:
    """The network run by a strategy. One that objects to it, at once and in a sentence, is skipped.

    What no strategy may object to is held by test_equivalence.py::test_runs_the_networks_it_is_for.
    """
    try:
        return set_strategy(network, strategy)
    except registry.UnsupportedError as objection:
        pytest.skip(str(objection))


@contextlib.contextmanager
def temporary_strategy(name: str, function: registry.StageFunction, **facts: Any) -> Iterator[str]:
    """A strategy that is registered inside the `with` block only."""
    registry.list_strategies()
    registry.strategy(name, summary="for a test", **facts)(function)
    try:
        yield name
    finally:
        del registry._strategies[name]
