"""Architectures: DenseNet in all its forms, and ResNet as the yardstick; not how a block is executed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from densebench.models.config import DenseNetConfig
from densebench.models.densenet import DenseNet
from densebench.models.features import set_strategy
from densebench.models.layers import DenseBlock, DenseLayer, Transition
from densebench.models.presets import (
    densenet121,
    densenet161,
    densenet169,
    densenet201,
    densenet264,
    densenet_bc,
    densenet_cifar,
    densenet_d2l,
    densenet_plain,
    densenet_x,
)
from densebench.models.resnet import ResNet, resnet18, resnet34, resnet50, resnet101, resnet152
from densebench.models.stage import FinalNorm, Head, Stage

__all__ = [
    "DenseBlock",
    "DenseLayer",
    "DenseNet",
    "DenseNetConfig",
    "FinalNorm",
    "Head",
    "ResNet",
    "Stage",
    "Transition",
    "build_model",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "densenet264",
    "densenet_bc",
    "densenet_cifar",
    "densenet_d2l",
    "densenet_plain",
    "densenet_x",
    "list_models",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "set_strategy",
]

_MODELS: dict[str, Callable[..., nn.Module]] = {
    function.__name__: function
    for function in (
        densenet121,
        densenet161,
        densenet169,
        densenet201,
        densenet264,
        densenet_bc,
        densenet_cifar,
        densenet_d2l,
        densenet_plain,
        densenet_x,
        resnet18,
        resnet34,
        resnet50,
        resnet101,
        resnet152,
    )
}


def list_models() -> list[str]:
    """The names that `build_model` knows."""
    return list(_MODELS)


def build_model(name: str, **options: Any) -> nn.Module:
    """Build a network by name; `options` go to the function of that name.

    Raises:
        ValueError: if the name is unknown; the message lists the known ones.
    """
    if name not in _MODELS:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(_MODELS)}")
    return _MODELS[name](**options)
