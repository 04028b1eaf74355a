"""Whether a stage is built of the standard parts that a strategy without module calls can compute."""

from __future__ import annotations

from torch import nn

from densebench.models.dimensions import KINDS, AvgPool, Conv, MaxPool
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
