"""Shape rules for the operators that make up most of a network's step: a shortcut around FakeTensorMode.

FakeTensorMode answers a call it has not seen before in 1 to 4 ms (it runs decompositions written in Python),
and in a densely connected network most calls have shapes not seen before: 20 s for a DenseNet-264. A rule here
answers in 20 us. Each covers only what is beyond doubt (dense tensors of one memory format) and leaves the
rest to FakeTensorMode; tests/prediction/test_shapes.py holds every rule against the operator itself.

The rules need parts of PyTorch that are not public. Where they are missing, `rule_for` finds none, and
prediction is slower but the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from densebench.formats import CHANNELS_LAST

try:
    from torch._C import _DisableTorchDispatch
    from torch._subclasses.fake_tensor import FakeTensor, in_kernel_invocation_manager

    AVAILABLE = True
except ImportError:  # pragma: no cover - a PyTorch that has moved them
    AVAILABLE = False

Rule = Callable[[Any, Sequence[Any], dict[str, Any]], Any]
aten = torch.ops.aten
_RULES: dict[Any, Rule] = {}


def rule_for(func: Any) -> Rule | None:
    """The rule of an operator: `(func, args, kwargs) -> result`, or NotImplemented for a call it leaves."""
    return _RULES.get(func)


def _rule(*functions: Any) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        if AVAILABLE:
            _RULES.update(dict.fromkeys(functions, rule))
        return rule

    return register


@_rule(torch.ops.prim.device.default)
def _device(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    return args[0].fake_device if isinstance(args[0], FakeTensor) else NotImplemented


@_rule(
    aten.alias.default,
    aten.detach.default,
    aten.expand.default,
    aten.permute.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.t.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.view.default,
)
def _view(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """PyTorch's own view of the storage without data; only the bookkeeping around it is left out."""
    x = args[0]
    if not isinstance(x, FakeTensor):
        return NotImplemented
    with in_kernel_invocation_manager(x.fake_mode):
        view = func(*args, **kwargs)
    return FakeTensor(x.fake_mode, view, x.fake_device)


@_rule(aten.add_.Tensor, aten.mul_.Tensor, aten.copy_.default, aten.relu_.default)
def _in_place(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    tensors = [value for value in args if isinstance(value, Tensor)]
    return args[0] if _all_fake(tensors) and _same(tensors, "shape") else NotImplemented


@_rule(aten.add.Tensor, aten.mul.Tensor, aten.relu.default, aten.threshold_backward.default)
def _pointwise(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Inputs that agree in shape, dtype and order of strides give a dense output in that order."""
    tensors = [value for value in args if isinstance(value, Tensor)]
    if kwargs.keys() - {"alpha"} or not _all_fake(tensors):
        return NotImplemented
    x, order = tensors[0], _stride_order(tensors[0])
    agree = _same(tensors, "shape") and _same(tensors, "dtype") and all(_stride_order(t) == order for t in tensors)
    if order is None or not agree or not x.dtype.is_floating_point:
        return NotImplemented
    return _new(x, tuple(x.shape), strides=_dense_strides(x.shape, order))


@_rule(aten.threshold_backward.grad_input)
def _threshold_backward_into(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    tensors = [args[0], args[1], kwargs["grad_input"]]
    fits = _all_fake(tensors) and _same(tensors, "shape") and _same(tensors, "dtype")
    return kwargs["grad_input"] if fits else NotImplemented


@_rule(aten.cat.default)
def _cat(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    tensors = args[0]
    if kwargs or len(args) != 2 or args[1] != 1 or not _all_fake(tensors) or not _same(tensors, "dtype"):
        return NotImplemented
    first = tensors[0]
    rest = (first.shape[0], *first.shape[2:])
    if _format(first) is None or any(
        _format(t) is not _format(first) or (t.shape[0], *t.shape[2:]) != rest for t in tensors
    ):
        return NotImplemented
    return _like(first, (rest[0], sum(t.shape[1] for t in tensors), *rest[1:]))


@_rule(aten.native_batch_norm.default)
def _batch_norm(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Statistics come in the parameters' dtype (FakeTensorMode has it that of x: wrong under autocast)."""
    x, weight, _, running_mean, _, training, *_ = args
    if kwargs or not _plain_norm(x, weight) or (running_mean is None and not training):
        return NotImplemented
    count = x.shape[1] if training else 0
    return _like(x, x.shape), _new(x, (count,), weight.dtype), _new(x, (count,), weight.dtype)


@_rule(aten.native_batch_norm_backward.default)
def _batch_norm_backward(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    grad, x, weight, *_, wanted = args
    if kwargs or not all(wanted) or not _plain_norm(x, weight) or _format(grad) is not _format(x):
        return NotImplemented
    sums = (x.shape[1],)
    return _like(x, x.shape), _new(x, sums, weight.dtype), _new(x, sums, weight.dtype)


@_rule(aten.native_batch_norm.out)
def _batch_norm_into(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    x, weight, _, _, _, training, *_ = args
    results = kwargs["out"], kwargs["save_mean"], kwargs["save_invstd"]
    if not _plain_norm(x, weight) or results[0].shape != x.shape:
        return NotImplemented
    count = x.shape[1] if training else 0
    if any(r.numel() not in (0, count) for r in results[1:]):
        return NotImplemented
    with in_kernel_invocation_manager(x.fake_mode):
        for result in results[1:]:
            result.resize_([count])
    return results


@_rule(aten.clone.default)
def _clone(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    x, wanted = args[0], kwargs.get("memory_format", torch.preserve_format)
    if len(args) != 1 or not _all_fake([x]) or _format(x) is None:
        return NotImplemented
    return _like(x, x.shape) if wanted in (torch.preserve_format, None, _format(x)) else NotImplemented


@_rule(aten.new_empty.default)
def _new_empty(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    x, size = args
    if kwargs.keys() - {"dtype", "pin_memory"} or not _all_fake([x]):
        return NotImplemented
    return _new(x, tuple(size), kwargs.get("dtype"))


def _all_fake(tensors: Sequence[Any]) -> bool:
    return bool(tensors) and all(isinstance(tensor, FakeTensor) for tensor in tensors)


def _same(tensors: Sequence[Tensor], attribute: str) -> bool:
    first = getattr(tensors[0], attribute)
    return all(getattr(tensor, attribute) == first for tensor in tensors[1:])


def _plain_norm(x: Any, weight: Any) -> bool:
    """Dense, with parameters of the same dtype, or of float32 for maps in 16 bits."""
    if not _all_fake([x, weight]) or _format(x) is None:
        return False
    mixed = x.dtype in (torch.bfloat16, torch.float16) and weight.dtype == torch.float32
    return weight.dtype == x.dtype or mixed


def _format(x: Tensor) -> torch.memory_format | None:
    """The one memory format in which x is dense; None where it is in both (or neither), as maps of 1x1 are."""
    contiguous = x.is_contiguous()
    last = CHANNELS_LAST.get(x.dim())
    if last is None:
        return torch.contiguous_format if contiguous else None
    channels_last = x.is_contiguous(memory_format=last)
    if contiguous == channels_last:
        return None
    return torch.contiguous_format if contiguous else last


def _stride_order(x: Tensor) -> tuple[int, ...] | None:
    """Dimensions from the innermost out; None where strides leave it open (sizes of 1, expanded dimensions)."""
    strides = x.stride()
    if 1 in x.shape or 0 in strides or len(set(strides)) < len(strides):
        return None
    return tuple(sorted(range(len(strides)), key=strides.__getitem__))


def _dense_strides(shape: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    strides, step = [0] * len(shape), 1
    for dimension in order:
        strides[dimension], step = step, step * max(1, shape[dimension])
    return tuple(strides)


def _like(x: Any, shape: Sequence[int]) -> Any:
    """A new tensor in the dtype and (unambiguous) memory format of x."""
    inner = range(len(shape) - 1, -1, -1)
    order = inner if _format(x) is torch.contiguous_format else (1, *(at for at in inner if at != 1))
    return _new(x, tuple(shape), strides=_dense_strides(shape, tuple(order)))


def _new(x: Any, shape: tuple[int, ...], dtype: torch.dtype | None = None, strides: Any = None) -> Any:
    strides = strides or _dense_strides(shape, range(len(shape) - 1, -1, -1))
    with _DisableTorchDispatch():
        data = torch.empty_strided(shape, strides, dtype=dtype or x.dtype, device="meta")
    return FakeTensor(x.fake_mode, data, x.fake_device)
