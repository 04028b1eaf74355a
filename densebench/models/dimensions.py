"""The modules that networks are built of, for images and for volumes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

BatchNorm = nn.BatchNorm2d | nn.BatchNorm3d
Conv = nn.Conv2d | nn.Conv3d
MaxPool = nn.MaxPool2d | nn.MaxPool3d
AvgPool = nn.AvgPool2d | nn.AvgPool3d


class Kinds(NamedTuple):
    """The classes for one number of spatial dimensions, and the function that pools a map to a side."""

    norm: type[BatchNorm]
    conv: type[Conv]
    max_pool: type[MaxPool]
    avg_pool: type[AvgPool]
    global_pool: Callable[[Tensor, int], Tensor]


KINDS = {
    2: Kinds(nn.BatchNorm2d, nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, F.adaptive_avg_pool2d),
    3: Kinds(nn.BatchNorm3d, nn.Conv3d, nn.MaxPool3d, nn.AvgPool3d, F.adaptive_avg_pool3d),
}
