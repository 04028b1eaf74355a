"""Whether a stage is built of the standard parts that a strategy without module calls can compute."""

from __future__ import annotations

from torch import nn

from densebench.models.layers import DenseLayer, Transition
from densebench.models.stage import Stage
from densebench.registry import Part


def irregularity(stage: Stage, part: Part) -> str | None:
    """What in the block (or the whole stage) is not a standard part, with the remedy; None where all is.

    Standard is what `densebench.models` builds: exactly `nn.BatchNorm2d`, ReLU and `nn.Conv2d` without bias
    or groups. A replaced norm (SyncBatchNorm, GroupNorm) computes something else.
    """
    containers = (DenseLayer, Transition, type(stage.block), nn.MaxPool2d, nn.AvgPool2d)
    for name, module in stage.named_modules(part):
        kind = type(module)
        if kind is nn.BatchNorm2d or issubclass(kind, (nn.ReLU, *containers)):
            continue
        if kind is not nn.Conv2d:
            return f"{name} is {kind.__name__}; it takes BatchNorm2d, ReLU and Conv2d. Use 'naive'"
        if module.bias is not None or module.groups != 1 or module.stride != (1, 1):
            return f"{name} has a bias, groups or a stride, which no dense layer has; use 'naive'"
    return None
