"""The contenders of the kernel benchmark: each makes, of operands, a call that is ready to be timed.

"ours" is the operator. It is given the batch statistics of its operand, as the layer before has computed them; a
forward product or convolution takes those of its result on the way out. The gradient that its backward leaves
includes the terms of the statistics, except for what it defers to the next operator.

"eager" is what the naive network does in its place: batch norm in training mode, ReLU, convolution or pooling,
as modules on a dense channels-last map (the concatenation that makes this map is left out), and the backward that
autograd makes of them; where the operator adds to a gradient buffer, so does eager. Its time includes the
statistics of the operand, which cost ours nothing here. "compiled" is `torch.compile` of the same.

"given_statistics" is eager with a norm in evaluation mode, given mean and variance as ours is: neither computes
the operand's statistics, so this is the comparison of the rest. It takes no statistics of its result, and its
backward has no terms of the statistics: it does less than ours. (That backward is checked against its own truth.)

"cudnn" is cuDNN's fused operation, see `benchmarks.kernel_cudnn`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.kernel_facts import (
    CONVOLUTION_BACKWARD,
    CONVOLUTIONS,
    OF_NEW_CHANNELS,
    OPERATORS,
    POOLS,
    PRODUCT_BACKWARD,
    STEM_POOLS,
    TRANSITION_POOLS,
    WITH_WEIGHT,
)
from benchmarks.kernel_operands import EPS, Operands
from densebench.kernels import channel_statistics, deferred
from densebench.models.layers import ReLU
from densebench.operators import load_all

load_all()

Results = dict[str, Tensor]
SUMS = ("grad_gamma", "grad_beta", "grad_weight")


@dataclass(frozen=True)
class Call:
    """One operator on one set of operands.

    Attributes:
        run: calls it once.
        results: what the call computed; right for the first call only, where calls accumulate.
        touched: what it reads, and what it writes once more.
        again: makes the same call on other operands with what was built, and compiled, for this one.
    """

    run: Callable[[], object]
    results: Callable[[], Results]
    touched: tuple[Tensor, ...] = ()
    again: Callable[[Operands], Call] | None = None

    @property
    def floor_bytes(self) -> int:
        """The fewest bytes that the operator can move."""
        return sum(tensor.nbytes for tensor in self.touched)


def ours(operator: str, copies: Sequence[Operands]) -> list[Call]:
    """Calls of `torch.ops.densebench.<operator>`."""
    return [_our_call(operator, operands) for operands in copies]


def _function(operator: str) -> Any:
    return getattr(torch.ops.densebench, operator).default


def _our_call(operator: str, operands: Operands) -> Call:
    function = _function(operator)
    if operator == "channel_statistics":
        return _our_statistics(function, operands)
    if operator == "settled_gradient":
        return _our_settling(function, operands)
    if OPERATORS[operator].is_gradient:
        return _our_backward(operator, function, operands)
    return _our_forward(operator, function, operands)


def _our_statistics(function: Any, operands: Operands) -> Call:
    mean, var = channel_statistics.reference(operands.x)
    touched = (operands.x, mean, var)
    return Call(lambda: function(*touched), lambda: {"mean": mean, "var": var}, touched)


def _our_settling(function: Any, operands: Operands) -> Call:
    mean, _ = channel_statistics.reference(operands.x)
    out = torch.empty_like(operands.grad)
    touched = (operands.buffer, operands.x, mean, operands.pending, out)
    return Call(lambda: function(*touched), lambda: {"out": out}, touched)


def _our_forward(operator: str, function: Any, operands: Operands) -> Call:
    x, norm, out = operands.x, operands.norm(), torch.empty_like(operands.grad)
    touched = (x, norm.mean, norm.var, operands.gamma, operands.beta, out)
    if operator not in WITH_WEIGHT:
        grids = (operands.grid(x), operands.grid(out)) if operator in POOLS else (x, out)
        return Call(lambda: function(grids[0], *norm, grids[1]), lambda: {"out": out}, touched)
    mean, var = norm.mean.new_empty(2, operands.geometry.outputs).unbind()
    arguments = (x, *_maps(operator, operands), *norm, operands.weight, out, mean, var)
    results = {"out": out, "mean": mean, "var": var}
    return Call(lambda: function(*arguments), lambda: results, (*touched, operands.weight, mean, var))


def _our_backward(operator: str, function: Any, operands: Operands) -> Call:
    x, norm, grad = operands.x, operands.norm(), operands.grad
    pending = operands.pending
    arguments: list[Any] = [grad, x, *_maps(operator, operands), *norm, True]
    touched: tuple[Tensor, ...]
    parameters = (norm.mean, norm.var, operands.gamma, operands.beta, operands.gamma, operands.beta)
    if operator == PRODUCT_BACKWARD:
        target = operands.buffer
        arguments += [operands.weight, target, True, pending, True, True]
        touched = (grad, x, target, target, pending, pending, operands.weight, operands.weight, *parameters)
    elif operator == CONVOLUTION_BACKWARD:
        target, pending = torch.empty_like(x), torch.zeros_like(pending)
        arguments += [operands.weight, target, True]
        touched = (grad, x, target, operands.weight, operands.weight, *parameters)
    elif operator == "bn_relu_backward":
        target, pending = grad, torch.zeros_like(pending)  # in place, with nothing left pending
        touched = (grad, x, grad, *parameters)
    else:
        target = operands.buffer
        pending = torch.zeros_like(pending)
        deferred_terms = [pending] if operator in TRANSITION_POOLS else []
        arguments[:2] = [operands.grid(grad), operands.grid(x)]
        arguments += [operands.grid(target), *deferred_terms]
        touched = (grad, x, target, *parameters)
    found: list[Any] = []

    def run() -> None:
        found[:] = function(*arguments)

    def results() -> Results:
        """The gradient as it is meant: what is pending in a buffer is taken off."""
        meant = deferred.reference(target.double(), x.double(), norm.mean.double(), pending.double())
        return {"grad_x": meant, **dict(zip(SUMS, found, strict=False))}

    return Call(run, results, touched)


def _maps(operator: str, operands: Operands) -> tuple[tuple[int, int], int] | tuple[()]:
    """The images' size and the filter's dilation, for operators that are not told them by a map."""
    return ((operands.geometry.height, operands.geometry.width), 1) if operator in CONVOLUTIONS else ()


def eager(operator: str, copies: Sequence[Operands]) -> list[Call]:
    """What PyTorch does in the operator's place, in the operands' dtype."""
    return _plain_calls(operator, copies, _plain(operator, copies[0]))


def given_statistics(operator: str, copies: Sequence[Operands]) -> list[Call]:
    """Eager with a norm that is given its mean and variance."""
    network = _modules(operator, copies[0])
    norm, given = network[0], copies[0].norm()
    norm.running_mean.copy_(given.mean)
    norm.running_var.copy_(given.var)
    norm.eval()
    return _plain_calls(operator, copies, network)


def compiled(operator: str, copies: Sequence[Operands]) -> list[Call]:
    """`torch.compile` of eager, for this shape alone; everything is compiled when this returns."""
    from torch._functorch import config

    torch._dynamo.reset()  # other shapes do not count towards the limit of recompilations
    plain = torch.compile(_plain(operator, copies[0]), dynamic=False)
    with config.patch(donated_buffer=False):  # backward is run more than once
        _plain_call(operator, copies[0].copied(), plain).run()
    return _plain_calls(operator, copies, plain)


def _plain_calls(operator: str, copies: Sequence[Operands], plain: Any) -> list[Call]:
    def again(operands: Operands) -> Call:
        return _plain_call(operator, operands, plain)

    return [dataclasses.replace(again(operands), again=again) for operands in copies]


def _plain(operator: str, operands: Operands) -> Any:
    """The naive network's modules in the operator's place; where it has none, a plain function."""
    if operator == "channel_statistics":
        return channel_statistics.reference
    if operator == "settled_gradient":
        return deferred.reference
    return _modules(operator, operands)


def _plain_call(operator: str, operands: Operands, plain: Any) -> Call:
    if operator in OF_NEW_CHANNELS:
        return _plain_function(operator, operands, plain)
    x = operands.map(operands.x).requires_grad_()
    if OPERATORS[operator].is_gradient:
        return _plain_backward(operator, operands, plain, x)
    found: list[Tensor] = []

    def run() -> None:
        found[:] = [plain(x)]

    return Call(run, lambda: {"out": _rows(found[0].detach())})


def _plain_function(operator: str, operands: Operands, plain: Any) -> Call:
    x, names = operands.x, ["mean", "var"]
    arguments: tuple[Tensor, ...] = (x,)
    if operator == "settled_gradient":
        mean, _ = channel_statistics.reference(x)
        arguments, names = (operands.buffer, x, mean, operands.pending), ["out"]
    found: list[Tensor] = []

    def run() -> None:
        outcome = plain(*arguments)
        found[:] = outcome if isinstance(outcome, tuple) else (outcome,)

    return Call(run, lambda: dict(zip(names, found, strict=True)))


def _modules(operator: str, operands: Operands) -> Any:
    """The naive network's modules in the operator's place; a norm's parameters keep the accumulating dtype."""
    x, shape = operands.x, operands.geometry
    norm = nn.BatchNorm2d(shape.columns, eps=EPS, device=x.device, dtype=operands.gamma.dtype)
    with torch.no_grad():
        norm.weight.copy_(operands.gamma)
        norm.bias.copy_(operands.beta)
    parts: list[nn.Module] = [norm, ReLU()]
    if operator in WITH_WEIGHT:
        side = 3 if operator in CONVOLUTIONS else 1
        conv = nn.Conv2d(
            shape.columns, shape.outputs, side, padding=side // 2, bias=False, device=x.device, dtype=x.dtype
        )
        with torch.no_grad():
            conv.weight.copy_(operands.weight.view(conv.weight.shape))
        parts.append(conv)
    elif operator in STEM_POOLS:
        parts.append(nn.MaxPool2d(3, stride=2, padding=1))
    elif operator in TRANSITION_POOLS:
        parts.append(nn.AvgPool2d(2))
    return nn.Sequential(*parts).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _plain_backward(operator: str, operands: Operands, plain: Any, x: Tensor) -> Call:
    adds = operator == PRODUCT_BACKWARD
    output, grad = plain(x), operands.map(operands.grad)
    wanted = [x, *plain.parameters()]
    if adds:
        mean, _ = channel_statistics.reference(operands.x)
        meant = deferred.reference(operands.buffer, operands.x, mean, operands.pending)
        target = operands.map(meant)
    found: list[Tensor] = []

    def run() -> None:
        grads = torch.autograd.grad(output, wanted, grad, retain_graph=True)
        found[:] = [target.add_(grads[0]) if adds else grads[0], *grads[1:]]

    def results() -> Results:
        grad_x, *sums = found
        named = {"grad_x": _rows(grad_x)} | dict(zip(SUMS, sums, strict=False))
        if "grad_weight" in named:
            named["grad_weight"] = named["grad_weight"].view_as(operands.weight)
        return named

    return Call(run, results)


def _rows(channels_last: Tensor) -> Tensor:
    return channels_last.permute(0, 2, 3, 1).reshape(-1, channels_last.shape[1])
