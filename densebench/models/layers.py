"""The parts of a DenseNet, each with its plain definition as `forward` (arXiv 1608.06993, section 3).

Module and parameter names are torchvision's, so that its weights load. Shapes: N images, C channels,
H x W pixels, k the growth rate. In a network of volumes there is a depth D before H: 3x3 stands for
3x3x3, and [N, C, H, W] for [N, C, D, H, W].
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densebench.models.config import compressed
from densebench.models.dimensions import KINDS, BatchNorm, Conv
from densebench.models.stage import Stage
from densebench.registry import get_strategy


class ReLU(nn.ReLU):
    """ReLU that works in place exactly when nothing is recorded for backward.

    In-place ReLU saves inference a copy of every map, but in training it breaks full backward hooks and
    saves nothing: what it would overwrite is freed at once. A traced graph is to be the same either way.
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(input, inplace=not (torch.is_grad_enabled() or torch.jit.is_tracing()))


class DenseLayer(nn.Module):
    """One layer H: BN-ReLU-conv1x1-BN-ReLU-conv3x3, or BN-ReLU-conv3x3 without bottleneck.

    [N, in_channels, H, W] -> [N, growth_rate, H, W], the new channels only.
    """

    norm1: BatchNorm
    relu1: nn.Module
    conv1: Conv
    norm2: BatchNorm
    relu2: nn.Module
    conv2: Conv

    def __init__(
        self,
        in_channels: int,
        growth_rate: int,
        bn_size: int | None,
        drop_rate: float = 0.0,
        dilation: int = 1,
        spatial_dims: int = 2,
    ) -> None:
        super().__init__()
        kinds = KINDS[spatial_dims]
        parts: dict[str, nn.Module] = {"norm1": kinds.norm(in_channels), "relu1": ReLU()}
        if bn_size is None:
            parts["conv1"] = _conv3x3(kinds.conv, in_channels, growth_rate, dilation)
        else:
            width = bn_size * growth_rate
            parts["conv1"] = kinds.conv(in_channels, width, kernel_size=1, bias=False)
            parts |= {"norm2": kinds.norm(width), "relu2": ReLU()}
            parts["conv2"] = _conv3x3(kinds.conv, width, growth_rate, dilation)
        self._consist_of(parts, drop_rate)

    @classmethod
    def of(cls, parts: Mapping[str, nn.Module], drop_rate: float) -> Self:
        """A layer of modules that exist: norm1, relu1, conv1 and, with a bottleneck, norm2, relu2, conv2."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._consist_of(parts, drop_rate)
        return layer

    def _consist_of(self, parts: Mapping[str, nn.Module], drop_rate: float) -> None:
        self._add(parts)
        self.bottleneck = "conv2" in parts
        self.drop_rate = drop_rate

    def _add(self, parts: Mapping[str, nn.Module]) -> None:
        for name, part in parts.items():
            self.add_module(name, part)

    @property
    def in_channels(self) -> int:
        return self.norm1.num_features

    @property
    def growth_rate(self) -> int:
        return self.conv3x3.out_channels

    @property
    def conv3x3(self) -> Conv:
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


class Parts(nn.Sequential):
    """Where a layer keeps its parts, if not in itself."""


class NestedDenseLayer(DenseLayer):
    """A dense layer that keeps its parts one level down, as MONAI's do."""

    layers: Parts

    def __getattr__(self, name: str) -> Any:
        parts = self.__dict__.get("_modules", {}).get("layers")  # there may be none yet: copies begin empty
        return getattr(parts, name) if parts is not None and name in parts._modules else super().__getattr__(name)

    def _add(self, parts: Mapping[str, nn.Module]) -> None:
        self.layers = Parts(OrderedDict(parts))


class DenseBlock(nn.ModuleDict):
    """x_l = H_l([x_0, x_1, ..., x_{l-1}]) (equation 2); returns [x_0, ..., x_L].

    [N, in_channels, H, W] -> [N, in_channels + num_layers * growth_rate, H, W].

    Attributes:
        strategy: by which the block is run, with what stands around it or by itself; see `set_strategy`.
    """

    strategy = "naive"

    def __init__(
        self,
        num_layers: int,
        in_channels: int,
        growth_rate: int,
        bn_size: int | None = 4,
        drop_rate: float = 0.0,
        dilation: int = 1,
        spatial_dims: int = 2,
    ) -> None:
        layers = {}
        for index in range(num_layers):
            width = in_channels + index * growth_rate
            layer = DenseLayer(width, growth_rate, bn_size, drop_rate, dilation, spatial_dims)
            layers[f"denselayer{index + 1}"] = layer
        super().__init__(layers)

    @classmethod
    def of(cls, layers: Mapping[str, DenseLayer]) -> Self:
        """A block of layers that exist, each of which reads what all before it made."""
        block = cls.__new__(cls)
        nn.ModuleDict.__init__(block, layers)
        return block

    @property
    def in_channels(self) -> int:
        return self.layers[0].in_channels

    @property
    def out_channels(self) -> int:
        return self.in_channels + sum(layer.growth_rate for layer in self.layers)

    @property
    def layers(self) -> list[DenseLayer]:
        return cast("list[DenseLayer]", list(self.children()))

    def forward(self, input: Tensor, by_definition: bool = False) -> Tensor:
        """By its strategy, where that does not call the block itself; else, or if told so, as it is defined."""
        if self.strategy != "naive" and not by_definition and get_strategy(self.strategy).bypasses != "nothing":
            return Stage(self, alone=True).run(input)
        features = [input]
        for layer in self.children():
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)

    def extra_repr(self) -> str:
        return f"strategy={self.strategy!r}"


class Transition(nn.Sequential):
    """BN-ReLU-conv1x1-pool between two blocks; without the pooling where the network is dilated instead.

    [N, in_channels, H, W] -> [N, out_channels, H // 2, W // 2].
    """

    def __init__(
        self, in_channels: int, compression: float = 0.5, pool: bool = True, spatial_dims: int = 2
    ) -> None:
        out_channels, kinds = compressed(in_channels, compression), KINDS[spatial_dims]
        parts: OrderedDict[str, nn.Module] = OrderedDict(
            norm=kinds.norm(in_channels),
            relu=ReLU(),
            conv=kinds.conv(in_channels, out_channels, kernel_size=1, bias=False),
        )
        if pool:
            parts["pool"] = kinds.avg_pool(kernel_size=2, stride=2)
        super().__init__(parts)

    @classmethod
    def of(cls, parts: Mapping[str, nn.Module]) -> Self:
        """A transition of modules that exist: norm, relu, conv and, unless there is none, pool."""
        transition = cls.__new__(cls)
        nn.Sequential.__init__(transition, OrderedDict(parts))
        return transition


def _conv3x3(kind: type[Conv], in_channels: int, out_channels: int, dilation: int) -> Conv:
    return kind(in_channels, out_channels, kernel_size=3, padding=dilation, dilation=dilation, bias=False)
