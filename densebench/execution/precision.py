"""Which dtype convolutions compute in, for code that runs them with autocast switched off."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that autocast would cast a convolution's operands to now; x's own without autocast.

    Autocast leaves float64 alone.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype
