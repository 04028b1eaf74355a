"""One feature buffer a block, written slice by slice, and one scratch for everything normalized.

Nothing is concatenated and nothing normalized is kept: a layer copies its prefix of the buffer into the
scratch, normalizes it there, and its output lands in the next slice; backward refills the scratch. This is
the shared-memory form of Pleiss et al. 2017 (arXiv 1707.06990, section 3), written as one autograd function
a block. Unlike the original, the feature buffer belongs to one forward: two forwards before a backward are
safe.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from densebench.execution.batch_norm import check_batch, commit
from densebench.execution.maps import MapShape
from densebench.execution.plan import BlockPlan, ConvUnit, Flat, LayerPlan
from densebench.execution.precision import compute_dtype
from densebench.execution.structure import irregularity
from densebench.models.stage import Stage
from densebench.registry import strategy

aten = torch.ops.aten


@strategy(
    "shared_buffer",
    summary="one feature buffer a block, one normalized scratch refilled in backward",
    bypasses="block",
    objection=lambda stage: irregularity(stage, "block"),
)
def shared_buffer(stage: Stage, x: Tensor) -> Tensor:
    """Keep the feature buffer and each bottleneck output; refill all that is normalized in backward."""
    x = stage.run_head(x)
    plan = BlockPlan(stage)
    run = _Run(plan, MapShape.of(x), compute_dtype(x))
    if torch.is_grad_enabled():
        features = _DenseBlock.apply(run, x, *plan.parameters)
    else:
        features, _ = run.forward(x, plan.parameters, keep=False)
    commit(plan.calls())
    del x
    return stage.run_tail(features)


class _DenseBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: _Run, x: Tensor, *parameters: Tensor | None) -> Tensor:
        features, kept = run.forward(x, parameters, keep=True)
        ctx.run = run
        ctx.save_for_backward(features, *parameters, *kept)
        return features

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        features, *saved = ctx.saved_tensors
        count = len(ctx.run.plan.parameters)
        _, needs_x, *needs = ctx.needs_input_grad
        gradients = _Gradients(ctx.run, features, saved[:count], needs)
        grad_x = gradients.of_input(grad_output, saved[count:], needs_x)
        return None, grad_x, *gradients.of_parameters


class _Run:
    """One forward of one block: its plan, the shape of its maps and the dtype its convolutions compute in."""

    def __init__(self, plan: BlockPlan, maps: MapShape, compute: torch.dtype) -> None:
        self.plan = plan
        self.maps = maps
        self.compute = compute

    def forward(self, x: Tensor, parameters: Flat, keep: bool) -> tuple[Tensor, list[Tensor]]:
        """[N, C, H, W] -> the feature buffer [N, C + L k, H, W], and what backward needs besides it.

        Kept are, layer by layer, the bottleneck's output (where there is one) and the dropout mask (where
        there is dropout).
        """
        features = self.maps.empty(self.plan.channels, x, torch.promote_types(x.dtype, self.compute))
        features[:, : x.shape[1]] = x
        scratch = _Scratch(self, features)
        kept: list[Tensor] = []
        with torch.autocast(x.device.type, enabled=False):
            for layer in self.plan.layers:
                new = scratch.gather(features[:, : layer.start])
                for index, unit in enumerate(layer.units):
                    kept += [new] if keep and index > 0 else []
                    a = scratch.normalize(unit, new, parameters).a
                    weight, conv = self.weight(unit, parameters), unit.conv
                    new = F.conv2d(a.to(self.compute), weight, None, 1, conv.padding, conv.dilation)
                if layer.drop_rate > 0:
                    mask = F.dropout(torch.ones_like(new), layer.drop_rate)  # drawn as F.dropout(new) would
                    new = new.mul_(mask)
                    kept += [mask] if keep else []
                features[:, layer.new] = new
        return features, kept

    def weight(self, unit: ConvUnit, parameters: Flat) -> Tensor:
        """The convolution's weight as autocast would cast it."""
        return unit.weight(parameters).to(self.compute)


class _Normalized(NamedTuple):
    """relu(norm(x)) in scratch, and the batch's mean and inverse standard deviation [C] (empty in eval)."""

    a: Tensor
    statistics: tuple[Tensor, Tensor]


class _Scratch:
    """Memory for one normalized map and the dense copy it is made from, as wide as the block ever needs."""

    def __init__(self, run: _Run, features: Tensor) -> None:
        layers = run.plan.layers
        self.maps = run.maps
        widest = max(layer.start for layer in layers)
        bottleneck = max(unit.call.norm.num_features for layer in layers for unit in layer.units)
        self.dense = features.new_empty(self.maps.pixels * widest)
        self.normalized = features.new_empty(self.maps.pixels * max(widest, bottleneck))

    def gather(self, prefix: Tensor) -> Tensor:
        """A dense copy of a slice of the buffer: on the slice itself batch norm is ten times slower."""
        return self.maps.view(self.dense, prefix.shape[1]).copy_(prefix)

    def normalize(self, unit: ConvUnit, x: Tensor, parameters: Flat, refill: bool = False) -> _Normalized:
        """relu(norm(x)) in scratch; a refill does not move the running statistics again."""
        call = unit.call
        gamma, beta = unit.affine(parameters)
        running = (None, None) if refill and call.by_batch else call.running
        if call.by_batch:
            check_batch(x)
        a, statistics = self.maps.view(self.normalized, x.shape[1]), call.statistics(x)
        mode = (call.by_batch, call.momentum, unit.eps)
        aten.native_batch_norm.out(
            x, gamma, beta, *running, *mode, out=a, save_mean=statistics[0], save_invstd=statistics[1]
        )
        return _Normalized(a.relu_(), statistics)


class _Gradients:
    """The backward of a block: one gradient buffer, walked from the last layer to the first.

    Args:
        run: the forward's.
        features: the feature buffer [N, C, H, W].
        parameters: the flat list, and `needs`: which of them need a gradient.
    """

    def __init__(self, run: _Run, features: Tensor, parameters: Flat, needs: Sequence[bool]) -> None:
        self.run = run
        self.features = features
        self.parameters = parameters
        self.needs = needs
        self.of_parameters: list[Tensor | None] = [None] * len(parameters)
        self.scratch = _Scratch(run, features)

    def of_input(self, grad_output: Tensor, kept: Sequence[Tensor], needs_x: bool) -> Tensor | None:
        """The gradient of the block's input (None if not needed); fills `of_parameters` on the way."""
        maps, layers, stack = self.run.maps, self.run.plan.layers, list(kept)
        grad = maps.empty(self.features.shape[1], self.features)
        grad.copy_(grad_output)  # autograd's own tensor may be shared, expanded or of another layout
        with torch.autocast(grad.device.type, enabled=False):
            for layer in reversed(layers):
                needs_prefix = needs_x or any(self.needs[: layer.parameters.start])
                if not needs_prefix and not any(self.needs[layer.parameters]):
                    break
                self._through_layer(layer, grad, stack, needs_prefix)
        return maps.empty(layers[0].start, grad).copy_(grad[:, : layers[0].start]) if needs_x else None

    def _through_layer(self, layer: LayerPlan, grad: Tensor, stack: list[Tensor], needs_prefix: bool) -> None:
        """Backward through one layer: from its channels of the gradient buffer, into those before them."""
        new: Tensor | None = grad[:, layer.new].contiguous(memory_format=self.run.maps.memory_format)
        if new is not None and layer.drop_rate > 0:
            new *= stack.pop()
        for index in reversed(range(len(layer.units))):
            unit = layer.units[index]
            x = stack.pop() if index > 0 else self.scratch.gather(self.features[:, : layer.start])
            needs_x = needs_prefix or any(self.needs[layer.parameters.start : unit.first])
            if new is not None:
                new = self._through_unit(unit, new, x, needs_x)
        if new is not None and needs_prefix:
            grad[:, : layer.start] += new

    def _through_unit(self, unit: ConvUnit, grad: Tensor, x: Tensor, needs_x: bool) -> Tensor | None:
        """Backward through norm-ReLU-convolution, from the convolution's output to the norm's input x."""
        needs_gamma, needs_beta = unit.affine(self.needs)
        needs_weight = unit.weight(self.needs)
        needs_a = needs_x or needs_gamma or needs_beta
        if not needs_a and not needs_weight:
            return None
        normalized = self.scratch.normalize(unit, x, self.parameters, refill=True)
        grad_a, grad_weight = self._through_convolution(unit, grad, normalized.a, needs_a, needs_weight)
        if needs_weight:
            self.of_parameters[unit.first + 2] = grad_weight.to(unit.conv.weight.dtype)
        if not needs_a:
            return None
        grad_a = grad_a.to(x.dtype)
        aten.threshold_backward(grad_a, normalized.a, 0, grad_input=grad_a)
        grad_x, grad_gamma, grad_beta = aten.native_batch_norm_backward(
            grad_a,
            x,
            unit.affine(self.parameters)[0],
            *unit.call.running,
            *normalized.statistics,
            unit.call.by_batch,
            unit.eps,
            [needs_x, needs_gamma, needs_beta],
        )
        self.of_parameters[unit.first] = grad_gamma if needs_gamma else None
        self.of_parameters[unit.first + 1] = grad_beta if needs_beta else None
        return grad_x if needs_x else None

    def _through_convolution(
        self, unit: ConvUnit, grad: Tensor, a: Tensor, needs_a: bool, needs_weight: bool
    ) -> tuple[Tensor, Tensor]:
        conv, compute = unit.conv, self.run.compute
        grad_a, grad_weight, _ = aten.convolution_backward(
            grad.to(compute),
            a.to(compute),
            self.run.weight(unit, self.parameters),
            None,
            [1, 1],
            list(conv.padding),
            list(conv.dilation),
            False,
            [0, 0],
            1,
            [needs_a, needs_weight, False],
        )
        return grad_a, grad_weight
