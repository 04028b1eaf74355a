"""What has to be true of tensors before kernels take their addresses; modules find it out call by call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from densebench.execution.plan import ConvUnit, NormUnit, StagePlan
from densebench.models.stage import overrides_functions

_HALVES = (torch.float16, torch.bfloat16)


def require_plain(plan: StagePlan) -> None:
    """No parameter or buffer says itself what operators do with it: little of what a stage does is an operator.

    Raises:
        NotImplementedError: for tensor subclasses that override functions or operators, and inside
            `torch.autograd.graph.allow_mutation_on_saved_tensors`, which follows operators by their arguments.
    """
    for tensor in (*plan.parameters, *plan.buffers):
        if tensor is not None and _overrides(type(tensor)):
            raise NotImplementedError(
                f"a parameter or buffer is a {type(tensor).__name__}, a kind of tensor that says itself what "
                "operators do; strategy 'naive' calls every operator: densebench.set_strategy(model, 'naive')"
            )
    if any(type(mode).__name__ == "_CloneArgBeforeMutateMode" for mode in _get_current_dispatch_mode_stack()):
        raise NotImplementedError("allow_mutation_on_saved_tensors works with strategy 'naive' only")


def _overrides(kind: type[Tensor]) -> bool:
    if kind is torch.nn.Buffer or issubclass(kind, FakeTensor):
        return False
    return overrides_functions(kind) or kind.__torch_dispatch__ is not Tensor.__torch_dispatch__


def require_one_device(tensors: Sequence[Tensor | None]) -> None:
    """As in PyTorch single values may lie elsewhere: a norm's counter.

    Raises:
        RuntimeError: if the others are on several devices.
    """
    devices = {tensor.device for tensor in tensors if tensor is not None and tensor.dim() > 0}
    if len(devices) > 1:
        named = " and ".join(sorted(map(str, devices)))
        raise RuntimeError(f"input, parameters and buffers have to be on one device, and are on {named}")


def require_shapes(plan: StagePlan) -> None:
    """Every vector of a norm has its channels, every convolution's weight the shape that its module says.

    Raises:
        RuntimeError: as `torch.nn.functional.batch_norm` says it, or naming the convolution's shapes.
    """
    for unit in plan.units():
        channels = unit.call.norm.num_features
        for name, vector in _vectors(plan, unit):
            if vector is not None and vector.shape != (channels,):
                raise RuntimeError(f"{name} should contain {channels} elements not {_size(vector)}")
        if isinstance(unit, ConvUnit):
            conv, shape = unit.conv, unit.weight(plan.parameters).shape
            if shape != (expected := (conv.out_channels, conv.in_channels, *conv.kernel_size)):
                raise RuntimeError(f"the weight of a convolution should be {list(expected)}, and is {list(shape)}")


def require_dtypes(plan: StagePlan, x: Tensor) -> None:
    """Without autocast convolutions have the input's dtype; so have norms, or float32 beside half precision.

    Raises:
        TypeError: where PyTorch's own operators would refuse the mixture, and kernels would convert.
    """
    of_norms = {x.dtype, torch.float32} if x.dtype in _HALVES else {x.dtype}
    for unit in plan.units():
        for name, vector in _vectors(plan, unit):
            if vector is not None and vector.dtype not in of_norms:
                raise TypeError(f"input is {x.dtype}, a norm's {name} {vector.dtype}; cast one")
        if isinstance(unit, ConvUnit) and (dtype := unit.weight(plan.parameters).dtype) != x.dtype:
            raise TypeError(f"input is {x.dtype}, a convolution {dtype}; cast one, or use torch.autocast")


def _vectors(plan: StagePlan, unit: NormUnit) -> Iterator[tuple[str, Tensor | None]]:
    yield from zip(("weight", "bias"), unit.affine(plan.parameters), strict=True)
    yield from zip(("running_mean", "running_var"), unit.call.running, strict=True)


def _size(vector: Tensor) -> str:
    return str(len(vector)) if vector.dim() == 1 else f"{list(vector.shape)}"
