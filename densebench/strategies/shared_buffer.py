"""One feature buffer a block, written slice by slice, and one scratch for everything normalized.

Nothing is concatenated and nothing normalized is kept: a layer copies its prefix of the buffer into the
scratch, normalizes it there, and its output lands in the next slice; backward refills the scratch. This is
the shared-memory form of Pleiss et al. 2017 (arXiv 1707.06990, section 3). Unlike the original, the feature
buffer belongs to one forward: two forwards before a backward are safe.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from densebench.execution.autograd import compute
from densebench.execution.batch_norm import check_batch, commit_copies
from densebench.execution.computation import StageComputation, Window
from densebench.execution.convolution import convolution_backward, convolve
from densebench.execution.maps import MapShape
from densebench.execution.plan import ConvUnit, Gradients, LayerPlan, StagePlan
from densebench.execution.precision import compute_dtype
from densebench.models.stage import Stage
from densebench.registry import strategy

aten = torch.ops.aten


@strategy(
    "shared_buffer",
    summary="one feature buffer a block, one normalized scratch refilled in backward",
    bypasses="block",
    derivatives="first",
)
def shared_buffer(stage: Stage, x: Tensor) -> Tensor:
    """Keep the feature buffer and each bottleneck output; refill all that is normalized in backward."""
    x = stage.run_head(x)
    x = compute(_SharedBuffer(stage, x), x)
    return stage.run_tail(x)


class _SharedBuffer(StageComputation):
    """The block over a feature buffer [N, C, H, W], a gradient buffer of its shape, and a scratch."""

    def __init__(self, stage: Stage, x: Tensor) -> None:
        super().__init__(StagePlan(stage, copied=True), compute_dtype(x), stage.block)
        self.maps = MapShape.of(x)

    def enter(self, x: Tensor, parameters: Window, keep: bool) -> list[Tensor]:
        dtype = torch.promote_types(x.dtype, self.compute)
        self.features = self.maps.empty(self.plan.channels, x, dtype)
        self.features[:, : self.plan.start] = x
        self.scratch = _Scratch(self.plan, self.maps, self.features)
        return []

    def layer(self, layer: LayerPlan, parameters: Window, keep: bool) -> list[Tensor]:
        new, kept = self.scratch.gather(self.features[:, : layer.start]), []
        for index, unit in enumerate(layer.units):
            # Channels-last weights give a channels-last map, which the norm could not write as `out` is laid out.
            new = new.contiguous(memory_format=self.maps.memory_format)
            kept += [new] if keep and index > 0 else []
            a = self.scratch.normalize(unit, new, parameters).a
            new = convolve(a, unit.options, unit.weight(parameters))
        if layer.drop_rate > 0:
            mask = F.dropout(torch.ones_like(new), layer.drop_rate)  # drawn as F.dropout(new) would
            new = new.mul_(mask)
            kept.append(mask)
        self.features[:, layer.new] = new
        return kept

    def leave(self, parameters: Window) -> tuple[Tensor, list[Tensor]]:
        features = self.features
        del self.features, self.scratch
        return features, [features]

    def commit(self) -> None:
        commit_copies(self.plan.calls)

    def leave_backward(
        self, grad_output: Tensor, parameters: Window, kept: list[Tensor], needs: Window
    ) -> Gradients:
        (self.features,) = kept
        self.gradient = self.maps.empty(self.plan.channels, self.features)
        self.gradient.copy_(grad_output)
        self.scratch = _Scratch(self.plan, self.maps, self.features)
        return {}

    def layer_backward(
        self, layer: LayerPlan, parameters: Window, kept: list[Tensor], needs: Window, needs_prefix: bool
    ) -> Gradients:
        gradients: Gradients = {}
        mask = kept.pop() if layer.drop_rate > 0 else None
        new: Tensor | None = self._gradient_of_new(layer, mask)
        for index in reversed(range(len(layer.units))):
            unit = layer.units[index]
            x = kept.pop() if index > 0 else self.scratch.gather(self.features[:, : layer.start])
            needs_x = needs_prefix or (index > 0 and layer.units[0].trained(needs))
            if new is not None:
                new = self._unit_backward(unit, new, x, parameters, needs, needs_x, gradients)
        if new is not None:
            self.gradient[:, : layer.start] += new
        return gradients

    def enter_backward(
        self, parameters: Window, kept: list[Tensor], needs: Window, needs_x: bool
    ) -> tuple[Tensor | None, Gradients]:
        grad: Tensor | None = None
        if needs_x:  # a copy, so that the whole buffer does not live on behind a view of it
            grad = self.gradient[:, : self.plan.start].clone(memory_format=self.maps.memory_format)
        self.release()
        return grad, {}

    def _gradient_of_new(self, layer: LayerPlan, mask: Tensor | None) -> Tensor:
        grad = self.gradient[:, layer.new].contiguous(memory_format=self.maps.memory_format)
        return grad if mask is None else grad * mask

    def _unit_backward(
        self,
        unit: ConvUnit,
        grad: Tensor,
        x: Tensor,
        parameters: Window,
        needs: Window,
        needs_x: bool,
        gradients: Gradients,
    ) -> Tensor | None:
        """From the gradient of a unit's output to that of its input x (None if not needed)."""
        needs_gamma, needs_beta = unit.affine(needs)
        needs_a, needs_weight = needs_x or needs_gamma or needs_beta, unit.weight(needs)
        if not needs_a and not needs_weight:
            return None
        a, statistics = self.scratch.normalize(unit, x, parameters, refill=True)
        weight = unit.weight(parameters)
        grad_a, grad_weight = convolution_backward(grad, a, unit.options, weight, needs_a, needs_weight)
        gradients |= unit.weight_gradient(needs, grad_weight)
        if not needs_a:
            return None
        grad_a = grad_a.to(x.dtype)
        aten.threshold_backward(grad_a, a, 0, grad_input=grad_a)
        call, wanted = unit.call, [needs_x, needs_gamma, needs_beta]
        grad_x, grad_gamma, grad_beta = aten.native_batch_norm_backward(
            grad_a, x, unit.affine(parameters)[0], *call.running, *statistics, call.by_batch, unit.eps, wanted
        )
        gradients |= unit.affine_gradients(needs, grad_gamma, grad_beta)
        return grad_x if needs_x else None


class _Normalized(NamedTuple):
    """relu(norm(x)) in scratch, and the batch's mean and inverse standard deviation [C] (empty in eval)."""

    a: Tensor
    statistics: tuple[Tensor, Tensor]


class _Scratch:
    """Memory for one normalized map and the dense copy it is made from, as wide as the block ever needs."""

    def __init__(self, plan: StagePlan, maps: MapShape, features: Tensor) -> None:
        self.maps = maps
        widest = max(layer.start for layer in plan.layers)
        bottleneck = max(unit.call.norm.num_features for layer in plan.layers for unit in layer.units)
        self.dense = features.new_empty(maps.pixels * widest)
        self.normalized = features.new_empty(maps.pixels * max(widest, bottleneck))

    def gather(self, prefix: Tensor) -> Tensor:
        """A dense copy of a slice of the buffer: on the slice itself batch norm is ten times slower."""
        return self.maps.view(self.dense, prefix.shape[1]).copy_(prefix)

    def normalize(self, unit: ConvUnit, x: Tensor, parameters: Window, refill: bool = False) -> _Normalized:
        """relu(norm(x)) in scratch; a refill does not move the running statistics again."""
        call = unit.call
        if call.by_batch:
            check_batch(x.shape)
        # Under autocast a bottleneck's output may be narrower than the features: so is what is made of it.
        a = self.maps.view(self.normalized.view(x.dtype), x.shape[1])
        mean, inv_std = call.statistics(x)
        running = (None, None) if refill and call.by_batch else call.running
        mode = (call.by_batch, call.momentum, unit.eps)
        aten.native_batch_norm.out(
            x, *unit.affine(parameters), *running, *mode, out=a, save_mean=mean, save_invstd=inv_std
        )
        return _Normalized(a.relu_(), (mean, inv_std))
