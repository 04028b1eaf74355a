"""Autograd for a strategy that computes a stage itself: a short chain of nodes over shared buffers.

The computation writes features into one buffer and gradients into another, layer by layer. To autograd it is
a chain of nodes of a few layers each, before them one of the head's own; the first enters the stage, the last
leaves it. What passes between nodes are empty tokens, since the maps stand in the buffers. There are several
nodes so that gradients of parameters can be accumulated and freed (and, under DDP, sent) while backward goes on:
held until its end they would grow with the square of the depth, as the parameters do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from densebench.execution.computation import StageComputation, Window
from densebench.execution.plan import Gradients, LayerPlan, StagePlan
from densebench.replay.recording import Tensors
from densebench.replay.tracks import Pass, Plain, Track, described, replayable, tracks_of

LAYERS_A_NODE = 8


def compute(computation: StageComputation, x: Tensor) -> Tensor:
    """Run a computation on x, [N, C, H, W]; the result is differentiable once, where autograd records.

    Raises:
        ValueError: if x has another number of dimensions, as PyTorch's norms raise it, or of channels.
        TypeError: if its dtype is not that of the convolutions, outside autocast.
        NotImplementedError: under forward-mode differentiation, and where torch.func or torch.vmap transforms
            it with gradients enabled.
        RuntimeError: if x, parameters and buffers are not on one device.
    """
    if x.dim() != 2 + computation.plan.spatial_dims:
        raise ValueError(f"expected {2 + computation.plan.spatial_dims}D input (got {x.dim()}D input)")
    _check_input(computation.plan, x)
    values = [x]  # popping hands on the only reference: without gradients `enter` may free x
    del x
    _refuse_tangents([*values, *computation.plan.parameters])
    if not torch.is_grad_enabled():
        forward = _Forward(computation, keep=False)
        forward.run(values)
        return forward.output.pop()
    _refuse_transforms()
    forward = _Forward(computation, keep=True)
    for part in forward.parts:
        parameters = computation.plan.parameters[part.parameters]
        values.append(_Node.apply(forward, part, values.pop(), *parameters))
    return values.pop()


def _check_input(plan: StagePlan, x: Tensor) -> None:
    """What kernels would read past the end of, or convert without a word where PyTorch raises."""
    if x.shape[1] != plan.start:
        raise ValueError(f"input has {x.shape[1]} channels, the dense block takes {plan.start}")
    weight = plan.parameters[plan.layers[0].units[0].first + 2]
    if weight is not None and weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"input is {x.dtype}, the dense block {weight.dtype}; cast one, or use torch.autocast")


def _refuse_tangents(tensors: Sequence[Tensor | None]) -> None:
    """Forward-mode differentiation would lose them in silence where no gradients are computed: by no node."""
    given = [] if forward_ad._current_level < 0 else [tensor for tensor in tensors if tensor is not None]
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in given):
        raise NotImplementedError("forward-mode derivatives work with strategies 'naive' and 'checkpointed' only")


def _refuse_transforms() -> None:
    """PyTorch would say that it wants a `setup_context`, which does not help who has not written this."""
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError("with gradients, torch.func and torch.vmap work with strategy 'naive' only")


class _Part:
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


def _parts(plan: StagePlan) -> Iterator[_Part]:
    """The plan's head by itself, then its layers, a few at a time; the tail's parameters go with the last.

    A node's saved tensors live until it ends. The head's map may be the largest of all, and its backward is to
    find the layers' gone.
    """
    layers, start, done = iter(plan.layers), 0, 0
    if plan.head is not None:
        start = plan.layers[0].parameters.start
        yield _Part([], slice(0, start), first=True, last=False)
    while chunk := list(islice(layers, LAYERS_A_NODE)):
        done += len(chunk)
        last = done == len(plan.layers)
        stop = len(plan.parameters) if last else chunk[-1].parameters.stop
        yield _Part(chunk, slice(start, stop), first=start == 0, last=last)
        start = stop


class _Forward:
    """A computation's forward, what it leaves for the nodes of backward, and where that has come to.

    Attributes:
        parts: the nodes'.
        kept: of the parts whose nodes are still to be made, what each step of each needs.
        output: until the last node is made.
        track: on which forward runs, and backward after it; None where nothing is recorded.
        hooked: whether hooks see what is saved; what comes back may lie in memory in any way.
        going_back: the backward that is under way.
    """

    def __init__(self, computation: StageComputation, keep: bool) -> None:
        self.computation, self.keep = computation, keep
        self.parts = list(_parts(computation.plan))
        self.kept: list[list[list[Tensor]]] = []
        self.output: list[Tensor] = []
        self.track: Track | None = None
        self.hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        self.going_back: Pass = Plain()

    def run(self, values: list[Tensor]) -> None:
        """Compute; takes x out of the values."""
        plan = self.computation.plan
        inputs: Tensors = [values.pop(), *plan.parameters, *plan.buffers]
        self.track = self._track(inputs)
        passing = Plain() if self.track is None else self.track.start()
        with torch.autocast(inputs[0].device.type, enabled=False):
            tensors, counts = passing.advance(self._compute, inputs)
        passing.finish()
        ahead = iter(tensors)
        self.output = [next(ahead)]
        self.kept = [[list(islice(ahead, count)) for count in part] for part in counts]

    def _track(self, inputs: Tensors) -> Track | None:
        x, *others = inputs
        signature = self.computation.signature()
        if signature is None or not replayable(x, others, self.computation.compute):
            return None
        key = (signature, self.computation.settings(), self.keep, *map(described, inputs))
        return tracks_of(self.computation.block).of(key)

    def _compute(self, inputs: Tensors) -> tuple[Tensors, list[list[int]]]:
        """The output and what is kept, one after the other; and of how many tensors each step of each part."""
        _require_one_device(inputs)
        values = inputs[:1]
        inputs.clear()
        kept = [part.forward(self.computation, values, self.keep) for part in self.parts]
        self.computation.commit()
        counts = [[len(step) for step in part] for part in kept]
        return [values.pop(), *(tensor for part in kept for step in part for tensor in step)], counts

    def go_back(self, grad: Tensor) -> None:
        """Start a backward; the last part's node is the first to run."""
        if self.track is None or self.hooked or not replayable(grad, (), self.computation.compute):
            self.going_back = Plain()
        else:
            key = (described(grad), self.computation.settings())
            self.going_back = self.track.following.of(key).start()

    def release(self) -> None:
        """Nothing more of this backward will come."""
        self.computation.release()
        self.going_back = Plain()


def _require_one_device(tensors: Sequence[Tensor | None]) -> None:
    """Kernels take addresses. As in PyTorch single values may lie elsewhere: a norm's counter."""
    devices = {tensor.device for tensor in tensors if tensor is not None and tensor.dim() > 0}
    if len(devices) > 1:
        named = " and ".join(sorted(map(str, devices)))
        raise RuntimeError(f"input, parameters and buffers have to be on one device, and are on {named}")


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, forward: _Forward, part: _Part, value: Tensor, *parameters: Tensor | None) -> Tensor:
        if part.first:
            forward.run([value])
        kept = forward.kept.pop(0)
        ctx.run, ctx.part, ctx.counts = forward, part, [len(step) for step in kept]
        ctx.save_for_backward(*parameters, *(tensor for step in kept for tensor in step))
        return forward.output.pop() if part.last else value.new_empty(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not grad.requires_grad:
            # `create_graph=True`: the gradients depend on the parameters, whatever is given. Handed out as
            # constants they would drop out of a gradient penalty in silence; so they refuse a second backward.
            grad = grad.detach().requires_grad_()
        return _backward(ctx, grad)


@once_differentiable
def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    run, part = ctx.run, ctx.part
    needs_value, *needs = ctx.needs_input_grad[2:]
    saved = ctx.saved_tensors

    def function(inputs: Tensors) -> tuple[Tensors, None]:
        grad, *rest = inputs
        inputs.clear()
        ahead = iter(rest)
        parameters = list(islice(ahead, len(needs)))
        kept = [list(islice(ahead, count)) for count in ctx.counts]
        token, gradients = part.backward(run.computation, grad, parameters, kept, needs, needs_value)
        return [token, *(gradients.get(part.parameters.start + at) for at in range(len(needs)))], None

    try:
        if part.last:
            run.go_back(grad)
        with torch.autocast(grad.device.type, enabled=False):
            gradients, _ = run.going_back.advance(function, [grad, *saved])
        if last := part.first or not needs_value:  # the parts before this one will not run
            run.going_back.finish()
    except BaseException:
        run.release()
        raise
    if last:
        run.release()
    return None, None, *gradients
