"""Recompute each layer's concatenation, norm, ReLU and first convolution in backward.

What torchvision calls `memory_efficient` (Pleiss et al. 2017, arXiv 1707.06990), with one difference: a batch
norm that is recomputed does not move its running statistics a second time (pytorch/pytorch#96136).
"""

from __future__ import annotations

import torch
from torch import Tensor

from densebench.execution.recompute import Settled, recomputed, settled_first_half
from densebench.models.stage import Stage
from densebench.registry import strategy


@strategy(
    "checkpointed",
    summary="recompute concatenation, norm, ReLU and 1x1 in backward",
    bypasses="block",
    derivatives="autograd",
)
def checkpointed(stage: Stage, x: Tensor) -> Tensor:
    """Keep each feature once and each bottleneck output; recompute what is quadratic in depth."""
    features = [stage.run_head(x)]
    del x
    for layer in stage.layers:
        new = _first_half(settled_first_half(layer), features)
        if layer.bottleneck:
            new = layer.conv2(layer.relu2(layer.norm2(new)))
        features.append(layer.dropout(new))
    x = torch.cat(features, 1)
    features.clear()  # without gradients they are no longer needed
    return stage.run_tail(x)


def _first_half(first_half: Settled, features: list[Tensor]) -> Tensor:
    return recomputed(lambda *features: first_half(torch.cat(features, 1)), [first_half], *features)
