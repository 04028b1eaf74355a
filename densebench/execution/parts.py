"""A stage's forward and backward in parts: some consecutive layers each, for each node of autograd.

There are several so that gradients of parameters can be accumulated and freed (and, under DDP, sent) while
backward goes on: held until its end they would grow with the square of the depth, as the parameters do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from densebench.execution.computation import StageComputation, Window
from densebench.execution.plan import Gradients, LayerPlan, StagePlan
from densebench.replay.recording import Tensors

LAYERS_A_NODE = 8


class Part:
    """Some consecutive layers, or none; with the way in before the first of all and the way out after the last."""

    def __init__(self, layers: list[LayerPlan], parameters: slice, first: bool, last: bool) -> None:
        self.layers = layers
        self.parameters = parameters
        self.first = first
        self.last = last

    def forward(self, computation: StageComputation, values: Tensors, keep: bool) -> list[list[Tensor]]:
        """What the backward of each step needs; x is taken out of the values, and the output put there."""
        parameters = computation.plan.parameters[self.parameters]
        window = Window(_for_convolutions(parameters, computation.compute), self.parameters.start)
        kept = [computation.enter(values.pop(), window, keep)] if self.first else []
        for layer in self.layers:
            kept.append(computation.layer(layer, window, keep))
            window.forget(layer.parameters.start, layer.parameters.stop)
        if self.last:
            output, last = computation.leave(window)
            values.append(output)
            kept.append(last)
        return kept

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
        if self.last:
            gradients |= computation.leave_backward(grad, window, kept.pop(), wanted)
            window.forget(self.layers[-1].parameters.stop, self.parameters.stop)
        for layer in reversed(self.layers):
            needs_prefix = needs_value or any(needs[: layer.parameters.start - start])
            if not needs_prefix and not any(needs[: layer.parameters.stop - start]):
                break
            gradients |= computation.layer_backward(layer, window, kept.pop(), wanted, needs_prefix)
            window.forget(layer.parameters.start, layer.parameters.stop)
        if self.first:
            token, more = computation.enter_backward(window, kept[0], wanted, needs_value)
            gradients |= more
        return token, _as_parameters(gradients, Window(parameters, start))


def _for_convolutions(parameters: Sequence[Tensor | None], dtype: torch.dtype) -> Sequence[Tensor | None]:
    """The parameters, convolutions' weights [N, C, h, w] (or with a depth) in a dtype."""
    places = [at for at, given in enumerate(parameters) if given is not None and given.dim() > 2]
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


def parts_of(plan: StagePlan) -> Iterator[Part]:
    """The plan's head by itself, then its layers, a few at a time; the tail's parameters go with the last.

    A node's saved tensors live until it ends. The head's map may be the largest of all, and its backward is to
    find the layers' gone.
    """
    layers, start, done = iter(plan.layers), 0, 0
    if plan.head is not None:
        start = plan.layers[0].parameters.start
        yield Part([], slice(0, start), first=True, last=False)
    while chunk := list(islice(layers, LAYERS_A_NODE)):
        done += len(chunk)
        last = done == len(plan.layers)
        stop = len(plan.parameters) if last else chunk[-1].parameters.stop
        yield Part(chunk, slice(start, stop), first=start == 0, last=last)
        start = stop
