"""A library's layers and transitions as this project's, made of the same norms and convolutions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar, cast

from torch import nn

from densebench.models.dimensions import BatchNorm, Conv
from densebench.models.layers import DenseLayer, NestedDenseLayer, ReLU, Transition
from densebench.registry import UnsupportedError

_NORM_AND_RELU = "timm.layers.norm_act.BatchNormAct2d"

_M = TypeVar("_M", bound=nn.Module)


def layer_of(name: str, layer: nn.Module) -> DenseLayer:
    nested = layer._modules.get("layers")
    own = children_of(layer if nested is None else nested)
    parts = {**_norm_relu_conv(name, own, "1"), **_norm_relu_conv(name, own, "2")}
    _refuse_the_rest(name, own)
    drop_rate: float = getattr(layer, "drop_rate", 0.0)
    if nested is None:
        return in_the_mode_of(layer, DenseLayer.of(parts, drop_rate))
    new = in_the_mode_of(layer, NestedDenseLayer.of(parts, drop_rate))
    in_the_mode_of(nested, new.layers)
    return new


def transition_of(name: str, transition: nn.Module) -> Transition:
    own = children_of(transition)
    normal = _norm_relu_conv(name, own, "")
    if "pool" in own:
        normal["pool"] = own.pop("pool")
    _refuse_the_rest(name, own)
    return Transition.of(normal)


def _norm_relu_conv(name: str, parts: dict[str, nn.Module], number: str) -> dict[str, nn.Module]:
    """Takes three parts from those of a layer or transition; timm's norm, which is two of them, apart."""
    norm, relu, conv = (parts.pop(f"{part}{number}", None) for part in ("norm", "relu", "conv"))
    if relu is None and norm is not None and class_name(type(norm)) == _NORM_AND_RELU:
        relu = cast("nn.Module", norm.act)
        if type(relu) is nn.ReLU and type(norm.drop) is nn.Identity:
            norm, relu = _norm_alone(cast("nn.BatchNorm2d", norm)), ReLU()
    for part, found, expected in (
        ("norm", norm, BatchNorm),
        ("relu", relu, nn.ReLU),
        ("conv", conv, Conv),
    ):
        if not isinstance(found, expected):
            what = "missing" if found is None else f"a {type(found).__name__}"
            raise UnsupportedError(
                f"{name}: {part}{number} is {what}; strategies take batch norms of images or "
                "volumes, ReLU and convolutions"
            )
    return {f"norm{number}": norm, f"relu{number}": relu, f"conv{number}": conv}  # type: ignore[dict-item]


def _norm_alone(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    """A plain norm with the same options, parameters and buffers."""
    plain = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum, affine=False, track_running_stats=False)
    plain.affine, plain.track_running_stats = norm.affine, norm.track_running_stats
    plain._parameters.update(norm._parameters)
    plain._buffers.update(norm._buffers)
    return in_the_mode_of(norm, plain)


def _refuse_the_rest(name: str, parts: Mapping[str, nn.Module]) -> None:
    for own, part in parts.items():
        raise UnsupportedError(f"{name} has {own} ({type(part).__name__}), which strategies do not run")


def in_the_mode_of(old: nn.Module, new: _M) -> _M:
    """`new`, put in training or evaluation as `old` is, without what it contains."""
    new.training = old.training
    return new


def children_of(module: nn.Module) -> dict[str, nn.Module]:
    """By name; one that stands in two places is in both, unlike in `named_children`."""
    return {name: child for name, child in module._modules.items() if child is not None}


def class_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
