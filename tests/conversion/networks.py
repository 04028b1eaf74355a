"""Small networks of other libraries, each as its own code builds it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densebench.contenders import get_contender, list_contenders
from tests.networks import draw_norms, norms

SIZES: dict[str, Any] = {"growth_rate": 4, "block_config": (2, 3), "bn_size": 2}


def torchvision(**options: Any) -> nn.Module:
    return _module("torchvision.models").DenseNet(**SIZES, num_init_features=8, num_classes=5, **options)


def timm(**options: Any) -> nn.Module:
    return _module("timm.models.densenet").DenseNet(**SIZES, num_classes=5, **options)


def monai(**options: Any) -> nn.Module:
    sizes = {"spatial_dims": 2, "in_channels": 3, "out_channels": 5, "init_features": 8} | SIZES | options
    return _module("monai.networks.nets.densenet").DenseNet(**sizes)


def torchxrayvision(**options: Any) -> nn.Module:
    models = _module("torchxrayvision").models
    return models.DenseNet(**SIZES, num_init_features=8, num_classes=5, in_channels=3, **options)


def _module(name: str) -> Any:
    """A peer's module; a skip where the extra is not installed. All of them import torchvision."""
    package = name.partition(".")[0]
    for needed in {"torchvision", package} & set(list_contenders()):
        missing = get_contender(needed).missing()
        if missing:
            pytest.skip(missing)
    return pytest.importorskip(name)


class CopiedLayer(nn.Sequential):
    """torchvision's layer as it once was, and as it went into many repositories."""

    def __init__(self, channels: int, growth_rate: int, width: int) -> None:
        super().__init__(
            OrderedDict(
                norm1=nn.BatchNorm2d(channels),
                relu1=nn.ReLU(inplace=True),
                conv1=nn.Conv2d(channels, width, 1, bias=False),
                norm2=nn.BatchNorm2d(width),
                relu2=nn.ReLU(inplace=True),
                conv2=nn.Conv2d(width, growth_rate, 3, padding=1, bias=False),
            )
        )
        self.drop_rate = 0.0

    def forward(self, x: Tensor) -> Tensor:
        new = F.dropout(super().forward(x), self.drop_rate, self.training)
        return torch.cat([x, new], 1)


class CopiedBlock(nn.Sequential):
    def __init__(self, layers: int, channels: int, growth_rate: int, width: int) -> None:
        inputs = range(channels, channels + layers * growth_rate, growth_rate)
        super().__init__(*(CopiedLayer(each, growth_rate, width) for each in inputs))


class CopiedTransition(nn.Sequential):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__(
            OrderedDict(
                norm=nn.BatchNorm2d(channels),
                relu=nn.ReLU(inplace=True),
                conv=nn.Conv2d(channels, out, 1, bias=False),
                pool=nn.AvgPool2d(2, 2),
            )
        )


COPIES: dict[str, Any] = {"block": CopiedBlock, "layer": CopiedLayer, "transition": CopiedTransition}


class Copied(nn.Module):
    """A DenseNet of classes that no library has."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            OrderedDict(
                conv0=nn.Conv2d(3, 8, 3, padding=1, bias=False),
                first=CopiedBlock(2, 8, 4, 8),
                down=CopiedTransition(16, 8),
                second=CopiedBlock(3, 8, 4, 8),
                norm=nn.BatchNorm2d(20),
            )
        )
        self.classifier = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        maps = F.relu(self.features(x), inplace=True)
        return self.classifier(maps.mean((2, 3)))


class Encoder(nn.Module):
    """Segments: torchvision's blocks called one by one, as U-Nets do it, each module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.features = features = torchvision().features
        self.stem = nn.Sequential(features.conv0, features.norm0, features.relu0)
        self.down1 = features.transition1
        self.enc1, self.enc2 = features.denseblock1, features.denseblock2
        self.up = nn.Conv2d(16 + 20, 6, 3, padding=1)
        self.head = nn.Conv2d(6 + 8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x)
        first = self.enc1(stem)
        second = F.interpolate(self.enc2(self.down1(first)), size=first.shape[2:])
        return self.head(torch.cat([self.up(torch.cat([first, second], 1)), stem], 1))


BUILDERS = (torchvision, timm, monai, torchxrayvision)
every_library = pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)


def theirs(build: Callable[..., nn.Module], **options: Any) -> nn.Module:
    """With norms, eps and momentum drawn, so that none can be taken for another."""
    torch.manual_seed(0)
    network = build(**options)
    draw_norms(network)
    for norm in norms(network):
        norm.eps, norm.momentum = 10 ** -float(3 + torch.rand(1)), 0.05 + 0.2 * float(torch.rand(1))
    return network.double()
