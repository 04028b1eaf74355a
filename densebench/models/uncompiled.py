"""A fence against torch.compile. A module of its own, because importing it imports all of dynamo."""

from __future__ import annotations

import torch
from torch import Tensor

from densebench.models.stage import Stage
from densebench.registry import Strategy


@torch.compiler.disable(
    reason="no compiler sees into this strategy; densebench.set_strategy(model, 'naive') is a graph"
)
def run_uncompiled(stage: Stage, strategy: Strategy, maps: list[Tensor]) -> Tensor:
    """Run a strategy that computes its stage itself as it is: a compiler has nothing left to fuse in it.

    Takes the stage's input out of the list: as an argument it would be kept by the frames of the fence.
    """
    return stage.run_computed(strategy, maps)
