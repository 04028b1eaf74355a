"""Memory formats of maps: images [N, C, H, W] and volumes [N, C, D, H, W]."""

from __future__ import annotations

import torch
from torch import Tensor

# By the number of dimensions of a map, or of the weight of a convolution.
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def memory_format_of(x: Tensor) -> torch.memory_format:
    """Channels-last if x is dense in that format and not also contiguous; else contiguous."""
    last = CHANNELS_LAST.get(x.dim())
    if last is None or not x.is_contiguous(memory_format=last) or x.is_contiguous():
        return torch.contiguous_format
    return last
