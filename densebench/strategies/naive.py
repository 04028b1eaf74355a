"""The baseline: concatenate before every layer, as the definition reads."""

from __future__ import annotations

from torch import Tensor

from densebench.models.stage import Stage
from densebench.registry import strategy


@strategy("naive", summary="concatenate before every layer; the baseline")
def naive(stage: Stage, x: Tensor) -> Tensor:
    """Call every module as it stands. Each concatenation and each normalized copy is kept for backward."""
    x = stage.run_head(x)
    x = stage.run_block(x)
    return stage.run_tail(x)
