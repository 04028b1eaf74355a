"""Whole networks through the Triton kernels, in the interpreter: what a GPU runs, save its arithmetic.

The strategy calls the launchers instead of the CPU path, and its buffers have the padded rows that they have on
a GPU; the rest of the code is the same.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import densebench
from tests.networks import images, small

pytestmark = pytest.mark.usefixtures("as_on_a_gpu")
NETWORKS: dict[str, tuple[dict[str, Any], int]] = {
    "bottleneck": ({}, 8),
    "imagenet stem": ({"stem": "imagenet", "block_config": (2, 1), "growth_rate": 5}, 20),
    "plain": ({"bn_size": None, "block_config": (2, 1)}, 8),
    "dilated": ({"stem": "imagenet", "block_config": (1, 1, 2), "output_stride": 8}, 16),
    "dropout": ({"drop_rate": 0.3, "block_config": (2, 1)}, 8),
    "odd map": ({"block_config": (2, 2), "growth_rate": 3}, 9),
    "volumes": ({"spatial_dims": 3, "stem": "imagenet", "block_config": (2, 1), "growth_rate": 5}, 11),
    "volumes of an even depth": ({"spatial_dims": 3, "stem": "imagenet", "block_config": (1, 1)}, 13),
    "thin volumes": ({"spatial_dims": 3, "stem": "imagenet", "block_config": (2,), "growth_rate": 5}, 5),
}


def batch_for(name: str, count: int = 2, seed: int = 1) -> Tensor:
    """Images or volumes for one of the networks."""
    options, size = NETWORKS[name]
    return images(count, size, seed=seed, dims=options.get("spatial_dims", 2))


@pytest.mark.parametrize("variant", ["fused", "fused_recompute"])
@pytest.mark.parametrize("name", NETWORKS)
def test_training_step(name: str, variant: str) -> None:
    options, _ = NETWORKS[name]
    densebench.assert_equivalent(small(**options), variant, batch_for(name))


@pytest.mark.parametrize("name", ["imagenet stem", "plain", "volumes"])
def test_evaluation(name: str) -> None:
    options, _ = NETWORKS[name]
    densebench.assert_equivalent(small(**options).eval(), "fused", batch_for(name))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["bottleneck", "dilated", "imagenet stem"])
def test_one_image(name: str, layout: torch.memory_format, training: bool) -> None:
    """Its maps are channels-last and contiguous at once, and autograd hands out either."""
    options, size = NETWORKS[name]
    network = small(**options).train(training).to(memory_format=layout)
    densebench.assert_equivalent(network, "fused", images(1, 2 * size).contiguous(memory_format=layout))


def test_inference_with_the_second_norm_in_the_epilogue() -> None:
    network, x = small().eval(), images(2)
    with torch.no_grad():
        expected = network(x)
        torch.testing.assert_close(densebench.set_strategy(network, "fused")(x), expected, rtol=1e-12, atol=1e-12)


def test_half_precision() -> None:
    densebench.assert_equivalent(small().float(), "fused", images(2, dtype=torch.float32), autocast=torch.float16)
