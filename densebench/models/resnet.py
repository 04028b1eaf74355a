"""ResNet (He et al. 2015, arXiv 1512.03385) and its pre-activation form (2016, arXiv 1603.05027).

The yardstick: what a user would train instead. Post-activation networks have torchvision's state_dict names
and initialization (its v1.5: the stride of a bottleneck sits in the 3x3 convolution).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """A residual unit: two 3x3 convolutions, or 1x1-3x3-1x1 with four times the channels at its output.

    [N, in_channels, H, W] -> [N, width * expansion, H / stride, W / stride].

    Post-activation: relu(shortcut(x) + norm(conv(...))). Pre-activation: a norm and ReLU stand before each
    convolution, the sum is left alone, and a projecting shortcut reads the first activation.
    """

    def __init__(self, in_channels: int, width: int, stride: int, bottleneck: bool, pre_activation: bool) -> None:
        super().__init__()
        self.pre_activation = pre_activation
        out_channels = width * expansion(bottleneck)
        if bottleneck:
            shapes = [(in_channels, width, 1, 1), (width, width, 3, stride), (width, out_channels, 1, 1)]
        else:
            shapes = [(in_channels, width, 3, stride), (width, width, 3, 1)]
        self.convolutions = len(shapes)
        for number, (inputs, outputs, kernel, step) in enumerate(shapes, 1):
            conv = nn.Conv2d(inputs, outputs, kernel, step, padding=kernel // 2, bias=False)
            self.add_module(f"conv{number}", conv)
            self.add_module(f"bn{number}", nn.BatchNorm2d(inputs if pre_activation else outputs))
        if stride != 1 or in_channels != out_channels:
            projection = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.downsample: nn.Module | None = (
                projection if pre_activation else nn.Sequential(projection, nn.BatchNorm2d(out_channels))
            )
        else:
            self.downsample = None

    def forward(self, input: Tensor) -> Tensor:
        return self._pre_activated(input) if self.pre_activation else self._post_activated(input)

    def _post_activated(self, input: Tensor) -> Tensor:
        x = input
        for number in range(1, self.convolutions + 1):
            x = getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(x))
            if number < self.convolutions:
                x = F.relu(x, inplace=True)
        shortcut = input if self.downsample is None else self.downsample(input)
        x += shortcut
        return F.relu(x, inplace=True)

    def _pre_activated(self, input: Tensor) -> Tensor:
        x, shortcut = input, input
        for number in range(1, self.convolutions + 1):
            x = F.relu(getattr(self, f"bn{number}")(x), inplace=True)
            if number == 1 and self.downsample is not None:
                shortcut = self.downsample(x)
            x = getattr(self, f"conv{number}")(x)
        return x + shortcut


class ResNet(nn.Module):
    """A residual network for images: [N, in_channels, H, W] -> [N, num_classes].

    Args:
        layers: units in each of the four stages.
        bottleneck: 1x1-3x3-1x1 units instead of two 3x3.
        num_classes: outputs of the classifier; None: pooled features.
        in_channels: channels of the input image.
        pre_activation: the 2016 order (norm and ReLU before each convolution).
    """

    def __init__(
        self,
        layers: tuple[int, int, int, int],
        bottleneck: bool,
        num_classes: int | None = 1000,
        in_channels: int = 3,
        pre_activation: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.pre_activation = pre_activation
        self.conv1 = nn.Conv2d(in_channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
        if not pre_activation:
            self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        channels = 64
        for number, count in enumerate(layers, 1):
            units: list[nn.Module] = []
            for unit in range(count):
                stride = 2 if unit == 0 and number > 1 else 1
                width = 32 * 2**number
                units.append(Residual(channels, width, stride, bottleneck, pre_activation))
                channels = width * expansion(bottleneck)
            self.add_module(f"layer{number}", nn.Sequential(*units))
        if pre_activation:
            self.bn5 = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes) if num_classes is not None else None
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() != 4 or input.shape[1] != self.in_channels:
            raise ValueError(f"input must be [N, {self.in_channels}, H, W], got shape {list(input.shape)}")
        x = self.conv1(input)
        if not self.pre_activation:
            x = F.relu(self.bn1(x), inplace=True)
        x = self.maxpool(x)
        for number in range(1, 5):
            x = getattr(self, f"layer{number}")(x)
        if self.pre_activation:
            x = F.relu(self.bn5(x), inplace=True)
        x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        return x if self.fc is None else self.fc(x)


def expansion(bottleneck: bool) -> int:
    """Output channels of a unit over its width."""
    return 4 if bottleneck else 1


def resnet18(*, num_classes: int | None = 1000, in_channels: int = 3, pre_activation: bool = False) -> ResNet:
    """ResNet-18: 11,689,512 parameters, 1.81 GMACs at 224x224."""
    return ResNet((2, 2, 2, 2), False, num_classes, in_channels, pre_activation)


def resnet34(*, num_classes: int | None = 1000, in_channels: int = 3, pre_activation: bool = False) -> ResNet:
    """ResNet-34: 21,797,672 parameters, 3.66 GMACs at 224x224."""
    return ResNet((3, 4, 6, 3), False, num_classes, in_channels, pre_activation)


def resnet50(*, num_classes: int | None = 1000, in_channels: int = 3, pre_activation: bool = False) -> ResNet:
    """ResNet-50: 25,557,032 parameters, 4.09 GMACs at 224x224."""
    return ResNet((3, 4, 6, 3), True, num_classes, in_channels, pre_activation)


def resnet101(*, num_classes: int | None = 1000, in_channels: int = 3, pre_activation: bool = False) -> ResNet:
    """ResNet-101: 44,549,160 parameters, 7.80 GMACs at 224x224."""
    return ResNet((3, 4, 23, 3), True, num_classes, in_channels, pre_activation)


def resnet152(*, num_classes: int | None = 1000, in_channels: int = 3, pre_activation: bool = False) -> ResNet:
    """ResNet-152: 60,192,808 parameters, 11.51 GMACs at 224x224."""
    return ResNet((3, 8, 36, 3), True, num_classes, in_channels, pre_activation)
