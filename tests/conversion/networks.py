"""Small networks of other libraries, each as its own code builds it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

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
