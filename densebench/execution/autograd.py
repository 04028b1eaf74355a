"""Autograd for a strategy that computes a stage itself: a short chain of nodes over shared buffers.

The computation writes features into one buffer and gradients into another, layer by layer. To autograd it is
a chain of nodes of a few layers each; the first also enters the stage, the last also leaves it. What passes
between nodes are empty tokens, since the maps stand in the buffers. There are several nodes so that gradients
of parameters can be accumulated and freed (and, under DDP, sent) while backward goes on: held until its end
they would grow with the square of the depth, as the parameters do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from densebench.execution.plan import Gradients, LayerPlan, StagePlan

LAYERS_A_NODE = 8


class Window:
    """A part of the flat list of parameters (or of what stands for each), indexed as in the whole list."""

    def __init__(self, values: Sequence[Any], start: int) -> None:
        self.values = values
        self.start = start

    def __getitem__(self, index: int) -> Any:
        return self.values[index - self.start]


class StageComputation(ABC):
    """One forward of one stage and, later, its backward.

    `enter` and `leave` may take over the stage's head and tail. Forward methods return the tensors that their
    backward will need; each gets them back, checked by autograd against changes in between. A computation is
    good for one forward and any number of backwards.

    Buffers are its attributes `features`, `gradient`, `statistics` and `scratch`, so that they can be let go of.

    Attributes:
        plan: what each norm does in this run, and where parameters stand.
        compute: the dtype that convolutions compute in; their weights are given in it.
    """

    def __init__(self, plan: StagePlan, compute: torch.dtype) -> None:
        self.plan = plan
        self.compute = compute

    def release(self) -> None:
        """Let go of the buffers: nothing more of this backward will come."""
        for name in ("features", "gradient", "statistics", "scratch"):
            self.__dict__.pop(name, None)

    @abstractmethod
    def enter(self, x: Tensor, parameters: Window, keep: bool) -> list[Tensor]:
        """Set up the buffers and write the block's input into them; without `keep` nothing is needed later."""

    @abstractmethod
    def layer(self, layer: LayerPlan, parameters: Window, keep: bool) -> list[Tensor]:
        """Run one layer, from the channels before it to its own; without `keep` nothing is needed later."""

    @abstractmethod
    def leave(self, parameters: Window) -> tuple[Tensor, list[Tensor]]:
        """The stage's output, and what backward needs; the computation lets go of its buffers."""

    @abstractmethod
    def leave_backward(
        self, grad_output: Tensor, parameters: Window, kept: list[Tensor], needs: Window
    ) -> Gradients:
        """Set up the gradient buffer from the gradient of the output, which must not be changed."""

    @abstractmethod
    def layer_backward(
        self, layer: LayerPlan, parameters: Window, kept: list[Tensor], needs: Window, needs_prefix: bool
    ) -> Gradients:
        """Backward through one layer; without `needs_prefix` nothing before it needs a gradient."""

    @abstractmethod
    def enter_backward(
        self, parameters: Window, kept: list[Tensor], needs: Window, needs_x: bool
    ) -> tuple[Tensor | None, Gradients]:
        """The gradient of x (None if not needed); the computation lets go of its buffers."""


def compute(computation: StageComputation, x: Tensor) -> Tensor:
    """Run a computation on x, [N, C, H, W]; the result is differentiable once, where autograd records."""
    values = [x]  # popping hands on the only reference: without gradients `enter` may free x
    del x
    for part in _parts(computation.plan):
        parameters = computation.plan.parameters[part.parameters]
        if torch.is_grad_enabled():
            values.append(_Node.apply(computation, part, values.pop(), *parameters))
        else:
            values.append(part.forward(computation, values.pop(), parameters, False)[0])
    return values.pop()


class _Part:
    """Some consecutive layers, with the way in before the first of all and the way out after the last."""

    def __init__(self, layers: list[LayerPlan], parameters: slice, first: bool, last: bool) -> None:
        self.layers = layers
        self.parameters = parameters
        self.first = first
        self.last = last

    def forward(
        self, computation: StageComputation, value: Tensor, parameters: Sequence[Tensor | None], keep: bool
    ) -> tuple[Tensor, list[Tensor], list[int]]:
        """The token or output, what backward needs, and how many of that belong to each step of the part."""
        window = Window(_for_convolutions(parameters, computation.compute), self.parameters.start)
        with torch.autocast(value.device.type, enabled=False):
            token, values = value.new_empty(0), [value]
            del value
            kept = [computation.enter(values.pop(), window, keep)] if self.first else []
            kept += [computation.layer(layer, window, keep) for layer in self.layers]
            if self.last:
                token, last = computation.leave(window)
                kept.append(last)
        return token, [tensor for step in kept for tensor in step], [len(step) for step in kept]

    def backward(
        self,
        computation: StageComputation,
        grad: Tensor,
        parameters: Sequence[Tensor | None],
        kept: list[list[Tensor]],
        needs: Sequence[bool],
        needs_value: bool,
    ) -> tuple[Tensor | None, Gradients]:
        """The gradient of the token or of x, and those of the parameters, in the parameters' dtypes."""
        start = self.parameters.start
        window, wanted = Window(_for_convolutions(parameters, computation.compute), start), Window(needs, start)
        gradients: Gradients = {}
        token: Tensor | None = grad.new_empty(0)
        with torch.autocast(grad.device.type, enabled=False):
            if self.last:
                gradients |= computation.leave_backward(grad, window, kept.pop(), wanted)
            for layer in reversed(self.layers):
                needs_prefix = needs_value or any(needs[: layer.parameters.start - start])
                if not needs_prefix and not any(needs[: layer.parameters.stop - start]):
                    break
                gradients |= computation.layer_backward(layer, window, kept.pop(), wanted, needs_prefix)
            if self.first:
                token, more = computation.enter_backward(window, kept[0], wanted, needs_value)
                gradients |= more
        return token, _as_parameters(gradients, Window(parameters, start))


def _for_convolutions(parameters: Sequence[Tensor | None], dtype: torch.dtype) -> Sequence[Tensor | None]:
    """The parameters, convolutions' weights [N, C, h, w] in a dtype."""
    places = [at for at, given in enumerate(parameters) if given is not None and given.dim() == 4]
    return _converted(parameters, dict.fromkeys(places, dtype))


def _as_parameters(gradients: Gradients, parameters: Window) -> Gradients:
    """The gradients in the dtypes of their parameters."""
    dtypes = {at: parameters[place].dtype for at, place in enumerate(gradients)}
    return dict(zip(gradients, _converted(list(gradients.values()), dtypes), strict=True))


def _converted(tensors: Sequence[Any], dtypes: dict[int, torch.dtype]) -> Sequence[Any]:
    """Some tensors in other dtypes; those that have another are converted in one launch, not in one each."""
    other = {at: dtype for at, dtype in dtypes.items() if tensors[at].dtype != dtype}
    if not other:
        return tensors
    made = {at: torch.empty_like(tensors[at], dtype=dtype) for at, dtype in other.items()}
    torch._foreach_copy_(list(made.values()), [tensors[at] for at in made])
    return [made.get(at, tensor) for at, tensor in enumerate(tensors)]


def _parts(plan: StagePlan) -> Iterator[_Part]:
    """The plan's layers, a few at a time; parameters of head and tail go with the first and last of them."""
    layers, start, done = iter(plan.layers), 0, 0
    while chunk := list(islice(layers, LAYERS_A_NODE)):
        done += len(chunk)
        last = done == len(plan.layers)
        stop = len(plan.parameters) if last else chunk[-1].parameters.stop
        yield _Part(chunk, slice(start, stop), first=start == 0, last=last)
        start = stop


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, computation: StageComputation, part: _Part, value: Tensor, *parameters: Tensor | None
    ) -> Tensor:
        output, kept, counts = part.forward(computation, value, parameters, keep=True)
        ctx.computation, ctx.part, ctx.counts = computation, part, counts
        ctx.save_for_backward(*parameters, *kept)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not grad.requires_grad:
            # `create_graph=True`: the gradients depend on the parameters, whatever is given. Handed out as
            # constants they would drop out of a gradient penalty in silence; so they refuse a second backward.
            grad = grad.detach().requires_grad_()
        return _backward(ctx, grad)


@once_differentiable
def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    count = len(ctx.needs_input_grad) - 3
    saved = iter(ctx.saved_tensors)
    parameters = list(islice(saved, count))
    kept = [list(islice(saved, number)) for number in ctx.counts]
    _, _, needs_value, *needs = ctx.needs_input_grad
    try:
        token, gradients = ctx.part.backward(ctx.computation, grad, parameters, kept, needs, needs_value)
    except BaseException:
        ctx.computation.release()
        raise
    if not needs_value:  # the parts before this one will not run
        ctx.computation.release()
    start = ctx.part.parameters.start
    return None, None, token, *(gradients.get(start + index) for index in range(count))
