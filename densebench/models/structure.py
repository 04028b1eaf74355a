"""Whether a stage is built of the standard parts that a strategy without module calls can compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import nn

from densebench.models.dimensions import KINDS, AvgPool, BatchNorm, Conv, MaxPool
from densebench.models.layers import DenseBlock, DenseLayer, Parts, ReLU, Transition
from densebench.models.stage import Stage
from densebench.registry import Part

_CONTAINERS = (DenseBlock, DenseLayer, Transition, Parts)
_ANYWHERE = (nn.BatchNorm2d, nn.BatchNorm3d, nn.ReLU, ReLU)
_SPATIAL_DIMS = {kind: dims for dims, kinds in KINDS.items() for kind in kinds[:4]}


def irregularity(stage: Stage, part: Part) -> str | None:
    """What in the block (or the whole stage) is not a standard part, with the remedy; None where all is.

    Standard is what `densebench.models` builds: exactly `nn.BatchNorm2d`, ReLU, `nn.Conv2d` without bias or
    groups (or those of volumes), in the geometry of a dense layer, and the stem's and the transition's pooling.
    A replaced norm (SyncBatchNorm, GroupNorm) and a layer with a `forward` of its own compute something else.
    """
    dims: int | None = None
    for module in stage.modules(part):
        kind = type(module)
        reason = None if kind in _ANYWHERE else _reason(module)
        if kind in _SPATIAL_DIMS:
            dims = dims or _SPATIAL_DIMS[kind]
            if dims != _SPATIAL_DIMS[kind]:
                reason = f"is {kind.__name__} where those before it have {dims} spatial dimensions"
        if reason:
            return f"{stage.name_of(module)} {reason}; use 'naive'"
    return _misfit(stage, part)


def _misfit(stage: Stage, part: Part) -> str | None:
    """What stands in another's place, or does not fit what comes before it: a kernel would not notice."""
    width: int | None = None
    for layer in stage.layers:
        parts = cast("nn.Module", layer._modules.get("layers", layer))._modules
        if width is None:
            width = getattr(parts.get("norm1"), "num_features", 0)
        made = _runs_through(parts, ("1", "2") if layer.bottleneck else ("1",), width)
        if isinstance(made, str):
            return f"{stage.name_of(layer)} {made}; use 'naive'"
        width += made
    return _misfit_of_ends(stage, width) if part == "stage" else None


def _runs_through(parts: Mapping[str, Any], numbers: Sequence[str], width: int) -> int | str:
    """The channels that norm-ReLU-convolution make of so many, once or twice; or what they cannot be made by."""
    for number in numbers:
        norm, relu, conv = (parts.get(f"{part}{number}") for part in ("norm", "relu", "conv"))
        if not (isinstance(norm, BatchNorm) and isinstance(relu, nn.ReLU) and isinstance(conv, Conv)):
            return f"is not made of norm{number}, relu{number} and conv{number}"
        if norm.num_features != width or conv.in_channels != width:
            found = f"a norm of {norm.num_features} and a convolution of {conv.in_channels} channels"
            return f"has {found} where {width} come"
        width = conv.out_channels
    return width


def _misfit_of_ends(stage: Stage, width: int | None) -> str | None:
    """The same of the head, which makes the block's input, and of the tail, which reads what it made."""
    head, tail = stage.head, stage.tail
    if head is not None and head.norm.num_features != stage.block.in_channels:
        return f"{stage.name_of(head.norm)} has {head.norm.num_features} channels, not the block's; use 'naive'"
    if isinstance(tail, Transition):
        made = _runs_through(tail._modules, ("",), cast("int", width))
        if not isinstance(tail._modules.get("pool"), AvgPool | None):
            made = "pools in another way than a dense network"
        return f"{stage.name_of(tail)} {made}; use 'naive'" if isinstance(made, str) else None
    if tail is not None and tail.norm.num_features != width:
        return f"{stage.name_of(tail.norm)} has {tail.norm.num_features} channels, not the block's; use 'naive'"
    return None


def _reason(module: nn.Module) -> str | None:
    """What is not standard about a module, seen without its submodules."""
    kind = type(module)
    if kind is nn.Conv2d or kind is nn.Conv3d:
        return None if _plain(module) else "has a bias, groups, a stride or padding that no dense layer has"
    if isinstance(module, MaxPool | AvgPool):
        return None if _pools_as_usual(module) else "pools in another way than a dense network"
    container = next((standard for standard in _CONTAINERS if isinstance(module, standard)), None)
    if container is None:
        return f"is {kind.__name__}; it takes BatchNorm2d, ReLU and Conv2d, or BatchNorm3d, ReLU and Conv3d"
    if kind.forward is not container.forward:
        return f"is {kind.__name__}, which has a forward of its own"
    if issubclass(kind, DenseLayer) and kind.dropout is not DenseLayer.dropout:
        return f"is {kind.__name__}, which has a dropout of its own"
    return _reason_of_parts(module)


def _reason_of_parts(container: nn.Module) -> str | None:
    if isinstance(container, Transition):
        if list(container._modules) not in (["norm", "relu", "conv"], ["norm", "relu", "conv", "pool"]):
            return f"is made of {', '.join(container._modules)}, not of norm, relu, conv and pool"
        return None if _is_1x1(container.conv) else "has a convolution that is not 1x1"
    if isinstance(container, DenseLayer) and container.bottleneck and not _is_1x1(container.conv1):
        return "has a first convolution that is not 1x1"
    return None


def _plain(conv: nn.Module) -> bool:
    """1x1, or 3x3 padded with zeros to keep the size; nothing else."""
    assert isinstance(conv, Conv)
    keeps_size = conv.padding == ((0,) * len(conv.stride) if _is_1x1(conv) else conv.dilation)
    usual = conv.bias is None and conv.groups == 1 and {*conv.stride} == {1} and conv.padding_mode == "zeros"
    return usual and keeps_size and ({*conv.kernel_size} == {3} or _is_1x1(conv))


def _is_1x1(conv: object) -> bool:
    return isinstance(conv, Conv) and {*conv.kernel_size} == {1}


def _pools_as_usual(pool: MaxPool | AvgPool) -> bool:
    """The stem's 3x3 maximum of stride 2, or the transition's 2x2 average."""
    size, stride, padding = (_all(value) for value in (pool.kernel_size, pool.stride, pool.padding))
    if isinstance(pool, MaxPool):
        plain = _all(pool.dilation) == {1} and not pool.return_indices
        return plain and not pool.ceil_mode and (size, stride, padding) == ({3}, {2}, {1})
    plain = pool.divisor_override is None and not pool.ceil_mode
    return plain and (size, stride, padding) == ({2}, {2}, {0})


def _all(value: int | tuple[int, ...]) -> set[int]:
    """The different values along the sides."""
    return {value} if isinstance(value, int) else {*value}
