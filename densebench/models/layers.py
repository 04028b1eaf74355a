"""The parts of a DenseNet, each with its plain definition as `forward` (arXiv 1608.06993, section 3).

Module and parameter names are torchvision's, so that its weights load. Shapes: N images, C channels,
H x W pixels, k the growth rate.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densebench.models.config import compressed


class ReLU(nn.ReLU):
    """ReLU that works in place exactly when nothing is recorded for backward.

    In-place ReLU saves inference a copy of every map, but in training it breaks full backward hooks and
    saves nothing: what it would overwrite is freed at once.
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(input, inplace=not torch.is_grad_enabled())


class NormReLU(nn.BatchNorm2d):
    """A norm and the ReLU after it in one module, as timm has them."""

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(super().forward(input), inplace=not torch.is_grad_enabled())


class DenseLayer(nn.Module):
    """One layer H: BN-ReLU-conv1x1-BN-ReLU-conv3x3, or BN-ReLU-conv3x3 without bottleneck.

    [N, in_channels, H, W] -> [N, growth_rate, H, W], the new channels only.
    """

    def __init__(
        self,
        in_channels: int,
        growth_rate: int,
        bn_size: int | None,
        drop_rate: float = 0.0,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.growth_rate = growth_rate
        self.bottleneck = bn_size is not None
        self.drop_rate = drop_rate
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.relu1 = ReLU()
        if bn_size is None:
            self.conv1 = _conv3x3(in_channels, growth_rate, dilation)
        else:
            self.conv1 = nn.Conv2d(in_channels, bn_size * growth_rate, kernel_size=1, bias=False)
            self.norm2 = nn.BatchNorm2d(bn_size * growth_rate)
            self.relu2 = ReLU()
            self.conv2 = _conv3x3(bn_size * growth_rate, growth_rate, dilation)

    @classmethod
    def of(cls, parts: Mapping[str, nn.Module], drop_rate: float = 0.0) -> DenseLayer:
        """A layer made of modules that exist: norm1, relu1, conv1, and norm2, relu2, conv2 with a bottleneck."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        for name, module in parts.items():
            layer.add_module(name, module)
        layer.bottleneck = "conv2" in parts
        layer.drop_rate = drop_rate
        layer.in_channels = layer.norm1.num_features
        layer.growth_rate = layer.conv3x3.out_channels
        return layer

    @property
    def conv3x3(self) -> nn.Conv2d:
        return self.conv2 if self.bottleneck else self.conv1

    def forward(self, input: Tensor) -> Tensor:
        new = self.conv1(self.relu1(self.norm1(input)))
        if self.bottleneck:
            new = self.conv2(self.relu2(self.norm2(new)))
        return self.dropout(new)

    def dropout(self, new: Tensor) -> Tensor:
        if self.drop_rate > 0:
            new = F.dropout(new, self.drop_rate, self.training)
        return new


class DenseBlock(nn.Module):
    """x_l = H_l([x_0, x_1, ..., x_{l-1}]) (equation 2); returns [x_0, ..., x_L].

    [N, in_channels, H, W] -> [N, in_channels + num_layers * growth_rate, H, W].
    """

    def __init__(
        self,
        num_layers: int,
        in_channels: int,
        growth_rate: int,
        bn_size: int | None = 4,
        drop_rate: float = 0.0,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = in_channels + num_layers * growth_rate
        for index in range(num_layers):
            width = in_channels + index * growth_rate
            layer = DenseLayer(width, growth_rate, bn_size, drop_rate, dilation)
            self.add_module(f"denselayer{index + 1}", layer)

    @classmethod
    def of(cls, layers: Mapping[str, DenseLayer]) -> DenseBlock:
        """A block made of layers that exist, each of which reads what all before it made."""
        block = cls.__new__(cls)
        nn.Module.__init__(block)
        for name, layer in layers.items():
            block.add_module(name, layer)
        first, last = block.layers[0], block.layers[-1]
        block.in_channels = first.in_channels
        block.out_channels = last.in_channels + last.growth_rate
        return block

    @property
    def layers(self) -> list[DenseLayer]:
        return cast("list[DenseLayer]", list(self.children()))

    def forward(self, input: Tensor) -> Tensor:
        features = [input]
        for layer in self.children():
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


class Transition(nn.Sequential):
    """BN-ReLU-conv1x1-pool between two blocks; without the pooling where the network is dilated instead.

    [N, in_channels, H, W] -> [N, out_channels, H // 2, W // 2].
    """

    def __init__(self, in_channels: int, compression: float = 0.5, pool: bool = True) -> None:
        out_channels = compressed(in_channels, compression)
        parts: OrderedDict[str, nn.Module] = OrderedDict(
            norm=nn.BatchNorm2d(in_channels),
            relu=ReLU(),
            conv=nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False),
        )
        if pool:
            parts["pool"] = nn.AvgPool2d(kernel_size=2, stride=2)
        super().__init__(parts)

    @classmethod
    def of(cls, parts: Mapping[str, nn.Module]) -> Transition:
        """A transition made of modules that exist: norm, relu, conv and, unless there is none, pool."""
        transition = cls.__new__(cls)
        nn.Sequential.__init__(transition, OrderedDict(parts))
        return transition


def _conv3x3(in_channels: int, out_channels: int, dilation: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=dilation, dilation=dilation, bias=False)
