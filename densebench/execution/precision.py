"""Which dtypes autocast chooses, for code that runs with autocast switched off."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Autocast off on x's device; where that only imagines tensors there is none."""
    return contextlib.nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)


def casts(x: Tensor) -> bool:
    """Whether autocast is on where x is."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that autocast would cast a convolution's operands to now; x's own without autocast.

    Autocast leaves float64 alone.
    """
    if casts(x) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def pooled_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype that pooling gives a map of x's rank and device and of some dtype now.

    On a CPU autocast pools volumes in float32, and gives out that; PyTorch is asked.
    """
    if x.dim() != 5 or x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return dtype
    return F.avg_pool3d(torch.ones(1, 1, 1, 1, 1, dtype=dtype), 1).dtype
