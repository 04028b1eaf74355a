"""Autograd for a strategy that computes a stage itself: a short chain of nodes over shared buffers.

The computation writes features into one buffer and gradients into another, layer by layer. To autograd it is
a chain of nodes of a few layers each, before them one of the head's own; the first enters the stage, the last
leaves it. What passes between nodes are empty tokens, since the maps stand in the buffers.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.variable import Variable

from densebench.execution.computation import StageComputation
from densebench.execution.parts import Part, parts_of
from densebench.execution.precision import casts, without_autocast
from densebench.execution.requirements import require_dtypes, require_one_device, require_plain, require_shapes
from densebench.registry import those_with
from densebench.replay.recording import Tensors
from densebench.replay.tracks import Pass, Plain, Track, described, replayable, tracks_of


def compute(computation: StageComputation, x: Tensor) -> Tensor:
    """Run a computation on x, [N, C, H, W]; the result is differentiable once, where autograd records.

    Raises:
        ValueError: if x has another number of dimensions, as PyTorch's norms raise it, or of channels.
        TypeError: if its dtype is not that of the convolutions and norms, outside autocast.
        NotImplementedError: under forward-mode differentiation, where torch.func or torch.vmap transforms it with
            gradients enabled, and for what `requirements.require_plain` refuses.
        RuntimeError: if x, parameters and buffers are not on one device, or have other shapes than their modules.
    """
    plan = computation.plan
    if x.dim() != 2 + plan.spatial_dims:
        raise ValueError(f"expected {2 + plan.spatial_dims}D input (got {x.dim()}D input)")
    if x.shape[1] != plan.start:
        raise ValueError(f"input has {x.shape[1]} channels, the dense block takes {plan.start}")
    values = [x]  # popping hands on the only reference: without gradients `enter` may free x
    del x
    _refuse_tangents([*values, *plan.parameters])
    if not torch.is_grad_enabled():
        forward = _Forward(computation, keep=False)
        forward.run(values)
        return forward.output.pop()
    _refuse_transforms()
    forward = _Forward(computation, keep=True)
    if values[0].requires_grad:
        forward.origin = _Origin.apply(values[0])
    for part in forward.parts:
        parameters = plan.parameters[part.parameters]
        values.append(_Node.apply(forward, part, values.pop(), *parameters))
    return values.pop()


def _refuse_tangents(tensors: Sequence[Tensor | None]) -> None:
    """Forward-mode differentiation would lose them in silence where no gradients are computed: by no node."""
    given = [] if forward_ad._current_level < 0 else [tensor for tensor in tensors if tensor is not None]
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in given):
        raise NotImplementedError(f"forward-mode derivatives work with {those_with('autograd')} only")


def _refuse_transforms() -> None:
    """PyTorch would say that it wants a `setup_context`, which does not help who has not written this."""
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(f"gradients of torch.func (grad, vjp, ...) work with {those_with('all')} only")


class _Forward:
    """A computation's forward, what it leaves for the nodes of backward, and those that are under way.

    Attributes:
        parts: the nodes'.
        kept: of the parts whose nodes are still to be made, what each step of each needs.
        output: until the last node is made.
        track: on which forward runs, and backward after it; None where nothing is recorded.
        hooked: whether hooks see what is saved; what comes back may lie in memory in any way.
        autocast: whether it was on around this forward.
        origin: stands for x in gradients that must not be differentiated again; None where x needs none.
        backwards: by the task of autograd that each is part of; threads may go back through one graph at a time.
    """

    def __init__(self, computation: StageComputation, keep: bool) -> None:
        self.computation, self.keep = computation, keep
        self.parts = list(parts_of(computation.plan))
        self.kept: list[list[list[Tensor]]] = []
        self.output: list[Tensor] = []
        self.track: Track | None = None
        self.hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        self.autocast = False
        self.origin: Tensor | None = None
        self.backwards: dict[int, _Backward] = {}

    def run(self, values: list[Tensor]) -> None:
        """Compute; takes x out of the values."""
        plan = self.computation.plan
        inputs: Tensors = [values.pop(), *plan.parameters, *plan.buffers]
        self.autocast = casts(inputs[0])
        self.track = self._track(inputs)
        passing = Plain() if self.track is None else self.track.start()
        with without_autocast(inputs[0]):
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
        key = (signature, self.computation.settings(), self.keep, self.autocast, *map(described, inputs))
        return tracks_of(self.computation.block).of(key)

    def _compute(self, inputs: Tensors) -> tuple[Tensors, list[list[int]]]:
        """The output and what is kept, one after the other; and of how many tensors each step of each part."""
        plan = self.computation.plan
        require_plain(plan)
        require_one_device(inputs)
        require_shapes(plan)
        if not self.autocast:
            require_dtypes(plan, inputs[0])
        values = inputs[:1]
        inputs.clear()
        kept = [part.forward(self.computation, values, self.keep) for part in self.parts]
        self.computation.commit()
        counts = [[len(step) for step in part] for part in kept]
        return [values.pop(), *(tensor for part in kept for step in part for tensor in step)], counts

    def going_back(self, part: Part, grad: Tensor) -> _Backward:
        """The backward that this node is part of; the last part's node is the first to run."""
        task = torch._C._current_graph_task_id()
        if part.last:
            if task >= 0:  # where the parts before need no gradient, or are not asked for, the end comes early
                Variable._execution_engine.queue_callback(functools.partial(self.release, task))
            self.backwards[task] = _Backward(self, grad)
        return self.backwards[task]

    def release(self, task: int) -> None:
        """Nothing more of this backward will come; its buffers go even if an error's traceback holds on to it."""
        if backward := self.backwards.pop(task, None):
            backward.computation.release()
            backward.passing = Plain()


class _Backward:
    """One backward of a forward.

    Attributes:
        computation: the forward's, with buffers of its own.
        passing: whether it is computed, recorded or played back.
    """

    def __init__(self, forward: _Forward, grad: Tensor) -> None:
        self.computation = copy.copy(forward.computation)
        self.passing: Pass = Plain()
        if forward.track is not None and not forward.hooked and replayable(grad, (), self.computation.compute):
            key = (described(grad), self.computation.settings())
            self.passing = forward.track.following.of(key).start()


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, forward: _Forward, part: Part, value: Tensor, *parameters: Tensor | None) -> Tensor:
        if part.first:
            forward.run([value])
        kept = forward.kept.pop(0)
        ctx.run, ctx.part, ctx.counts = forward, part, [len(step) for step in kept]
        ctx.save_for_backward(*parameters, *(tensor for step in kept for tensor in step))
        return forward.output.pop() if part.last else value.new_empty(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_batches(grad)
        with torch.no_grad():
            gradients = _backward(ctx, grad)
        if torch.is_grad_enabled():  # `create_graph=True`
            gradients = _differentiable_once(
                gradients, [grad, ctx.run.origin, *ctx.run.computation.plan.parameters]
            )
        return None, None, *gradients


def _backward(ctx: Any, grad: Tensor) -> Sequence[Tensor | None]:
    run, part = ctx.run, ctx.part
    needs_value, *needs = ctx.needs_input_grad[2:]
    saved = ctx.saved_tensors
    backward = run.going_back(part, grad)

    def function(inputs: Tensors) -> tuple[Tensors, None]:
        grad, *rest = inputs
        inputs.clear()
        ahead = iter(rest)
        parameters = list(islice(ahead, len(needs)))
        kept = [list(islice(ahead, count)) for count in ctx.counts]
        token, gradients = part.backward(backward.computation, grad, parameters, kept, needs, needs_value)
        return [token, *(gradients.get(part.parameters.start + at) for at in range(len(needs)))], None

    try:
        with without_autocast(grad):
            gradients, _ = backward.passing.advance(function, [grad, *saved])
        if last := part.first or not needs_value:  # the parts before this one will not run
            backward.passing.finish()
    except BaseException:
        run.release(torch._C._current_graph_task_id())
        raise
    if last:
        run.release(torch._C._current_graph_task_id())
    return gradients


def _refuse_batches(grad: Tensor) -> None:
    """Of `is_grads_batched` and `vectorize`: kernels take addresses, and what is batched has none."""
    if torch._C._functorch.is_batchedtensor(grad) or torch._C._functorch.is_legacy_batchedtensor(grad):
        raise NotImplementedError(f"is_grads_batched and vectorize=True work with {those_with('autograd')} only")


class _Origin(torch.autograd.Function):
    """An empty tensor that is made from x, for autograd: x itself would be kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.new_empty(0)


class _FirstDerivatives(torch.autograd.Function):
    """Gradients as they are, made from sources; to differentiate them again is an error."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(gradient.view_as(gradient) for gradient in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            "trying to differentiate twice what a strategy computed that has first derivatives only; second ones "
            f"come with {those_with('autograd')}: densebench.set_strategy(model, 'naive')"
        )


def _differentiable_once(
    gradients: Sequence[Tensor | None], sources: Sequence[Tensor | None]
) -> Sequence[Tensor | None]:
    """The same, depending for autograd on all that they are computed from.

    Handed out as constants they would drop out of a gradient penalty in silence, and so they would with an error
    that hangs on nothing: autograd only goes where what it was asked for lies.
    """
    there = [gradient for gradient in gradients if gradient is not None]
    given = [source for source in sources if source is not None]
    made = iter(_FirstDerivatives.apply(len(there), *there, *given))
    return [None if gradient is None else next(made) for gradient in gradients]
