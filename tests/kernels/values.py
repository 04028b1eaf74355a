"""Shapes on which every operator is tried, and how far off it may be; shared with tests/gpu."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# |difference| over |reference| as norms. float64 decides; lower precision is held to its own rounding.
GATE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

VARIANTS = {
    "as it comes": {},
    "running statistics": {"by_batch": False},
    "fresh buffer": {"accumulate": False},
    "no affine": {"affine": False},
    "whole tiles": {"columns": 32, "extra": 16, "outputs": 48},
    "odd column": {"before": 3},
    "one pixel wide": {"images": 5, "height": 2, "width": 1},
    "single channel": {"columns": 1, "outputs": 1, "extra": 0},
    "several tiles": {"images": 3, "height": 8, "width": 8, "columns": 70, "outputs": 70, "extra": 10},
    "float32": {"dtype": torch.float32},
    "float16": {"dtype": torch.float16},
    "bfloat16": {"dtype": torch.bfloat16},
}


def relative_error(value: Tensor, truth: Tensor) -> float:
    """|value - truth| / |truth| as norms; NaN anywhere is infinitely wrong.

    Operands are drawn near 1: what is smaller than that on average has cancelled, and is held absolutely.
    """
    assert value.shape == truth.shape
    size = max(float(truth.norm()), math.sqrt(truth.numel()))
    error = float((value.double() - truth).norm()) / (size or 1.0)
    return math.inf if math.isnan(error) else error
