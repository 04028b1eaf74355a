"""Normalized activations never exist: the 1x1 convolution normalizes and rectifies while it loads.

One feature buffer and one gradient buffer a block. A channel's statistics are computed once, when it is
written; each later norm reads them with its own gamma, beta and eps. In backward every layer touches the
channels before it in one pass; the two terms that come from the statistics wait, as two numbers a channel, for
the next pass (see `densebench.kernels.deferred`). Kept for backward are the feature buffer and the bottleneck
outputs, with `recompute="bottleneck"` the buffer alone. The stem's norm-ReLU-pool, the transition (pooled
before its 1x1 convolution: both are linear) and the final norm are taken over.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from densebench.execution.autograd import Gradients, StageComputation, Window, compute
from densebench.execution.batch_norm import Observed, check_batch, commit_observed
from densebench.execution.maps import memory_format_of
from densebench.execution.plan import ConvUnit, LayerPlan, NormUnit, StagePlan
from densebench.execution.precision import compute_dtype
from densebench.execution.structure import irregularity
from densebench.kernels.bn_relu import bn_relu
from densebench.kernels.bn_relu_backward import bn_relu_backward, bn_relu_backward_into
from densebench.kernels.bn_relu_conv1x1 import bn_relu_conv1x1
from densebench.kernels.bn_relu_conv1x1_backward import bn_relu_conv1x1_backward
from densebench.kernels.bn_relu_pool import bn_relu_avg_pool, bn_relu_max_pool
from densebench.kernels.bn_relu_pool_backward import bn_relu_avg_pool_backward, bn_relu_max_pool_backward
from densebench.kernels.channel_statistics import channel_statistics
from densebench.kernels.deferred import settled_gradient
from densebench.kernels.rows import Norm, accumulate_dtype, as_rows
from densebench.models.layers import Transition
from densebench.models.stage import Stage
from densebench.registry import strategy

Recompute = Literal["nothing", "bottleneck"]


def _objection(stage: Stage) -> str | None:
    return irregularity(stage, "stage")


@strategy(
    "fused",
    summary="norm and ReLU inside the 1x1 kernel, statistics once, backward in one pass",
    bypasses="stage",
    objection=_objection,
)
def fused(stage: Stage, x: Tensor, recompute: Recompute = "nothing") -> Tensor:
    """Keep the feature buffer and each bottleneck output (or, recomputing it, the buffer alone).

    Layers without bottleneck have no 1x1 to fuse into: they go through one shared normalized buffer.
    """
    computation = _Fused(stage, x, recompute)
    output = compute(computation, x)
    commit_observed(computation.plan.calls, computation.observed)
    return output


@strategy(
    "fused_recompute",
    summary="fused, and bottleneck outputs are recomputed in backward",
    bypasses="stage",
    objection=_objection,
)
def fused_recompute(stage: Stage, x: Tensor) -> Tensor:
    """Keep the feature buffer alone."""
    return fused(stage, x, recompute="bottleneck")


class _Fused(StageComputation):
    """A whole stage over a feature buffer and a gradient buffer, both matrices [M, C] of M = N H W pixels.

    Attributes:
        features, gradient: the buffers.
        mean, var: [C], the batch's statistics of each channel, shared by all its readers.
        pending: [2, C], see `densebench.kernels.deferred`.
        observed: what each norm saw, for its running statistics.
    """

    def __init__(self, stage: Stage, x: Tensor, recompute: Recompute) -> None:
        super().__init__(StagePlan(stage, whole=True))
        self.recompute = recompute == "bottleneck"
        self.compute = compute_dtype(x)
        self.format = memory_format_of(x)
        self.stem_pool = stage.head is not None and stage.head.pool is not None
        self.transition_pool = isinstance(stage.tail, Transition) and hasattr(stage.tail, "pool")
        images, _, height, width = x.shape
        if self.stem_pool:
            height, width = (height + 1) // 2, (width + 1) // 2
        self.shape = (images, height, width)
        self.pixels = images * height * width
        self.observed: list[Observed] = []

    # Forward

    def enter(self, x: Tensor, parameters: Window) -> list[Tensor]:
        start, head = self.plan.start, self.plan.head
        dtype = torch.promote_types(x.dtype, self.compute)
        self.features = x.new_empty(self.pixels, self.plan.channels, dtype=dtype)
        self.mean, self.var = x.new_zeros(2, self.plan.channels, dtype=accumulate_dtype(x)).unbind()
        self.scratch = Scratch()
        kept: list[Tensor] = []
        if head is None:
            self._grid(self.features)[..., :start] = x.permute(0, 2, 3, 1)
        else:
            x = x.contiguous(memory_format=torch.channels_last)
            statistics = self._statistics_of_input(head, x)
            kept = [x, *statistics]
            norm = self._norm(head, statistics, parameters)
            if self.stem_pool:
                bn_relu_max_pool(x.permute(0, 2, 3, 1), *norm, self._grid(self.features)[..., :start])
            else:
                bn_relu(as_rows(x), *norm, self.features[:, :start])
        self._take_statistics(slice(0, start))
        return kept

    def layer(self, layer: LayerPlan, parameters: Window, keep: bool) -> list[Tensor]:
        first, *inner = layer.units
        kept: list[Tensor] = []
        norm = self._norm(first, self._statistics(first, layer.start, kept), parameters)
        prefix = self.features[:, : layer.start]
        if inner:
            a = self._bottleneck(layer, norm, prefix, parameters, kept if keep else None)
        else:
            a = self.scratch.rows("activation", prefix)
            bn_relu(prefix, *norm, a)
        new = self._convolve(layer.units[-1], a, parameters)
        if layer.drop_rate > 0:
            mask = F.dropout(torch.ones_like(new, memory_format=self.format), layer.drop_rate)
            new = new * mask  # drawn in the network's own memory format, as F.dropout(new) would be
            kept.append(mask)
        self.features[:, layer.new] = as_rows(new)
        self._take_statistics(layer.new)
        return kept

    def _bottleneck(
        self, layer: LayerPlan, norm: Norm, prefix: Tensor, parameters: Window, kept: list[Tensor] | None
    ) -> Tensor:
        """The operand of the 3x3 convolution [M, N]: relu(norm2(y)) of y = relu(norm1(prefix)) W^T."""
        first, second = layer.units
        weight = self._matrix(first, parameters)
        a = self.scratch.rows("activation", prefix, weight.shape[0], self.compute)
        if kept is None and not second.call.by_batch:
            # Nothing else reads y: the second norm and ReLU go into the product's epilogue.
            scale, shift = self._norm(second, self._running(second), parameters).folded()
            bn_relu_conv1x1(prefix, *norm, weight, a, None, None, scale, shift)
            return a
        if kept is None or self.recompute:
            y = self.scratch.rows("bottleneck", prefix, weight.shape[0], self.compute)
        else:
            y = torch.empty_like(a)
            kept.append(y)
        statistics = self._multiply(second, prefix, norm, weight, y)
        if kept is not None:
            kept += statistics
        bn_relu(y, *self._norm(second, statistics, parameters), a)
        return a

    def _multiply(
        self, reader: ConvUnit, x: Tensor, norm: Norm, weight: Tensor, y: Tensor
    ) -> tuple[Tensor, Tensor]:
        """y = relu(norm(x)) W^T, and the statistics by which its reader normalizes it."""
        if not reader.call.by_batch:
            bn_relu_conv1x1(x, *norm, weight, y, None, None, None, None)
            return self._running(reader)
        self._check_batch(weight.shape[0])
        mean, var = self.mean.new_empty(2, weight.shape[0]).unbind()
        bn_relu_conv1x1(x, *norm, weight, y, mean, var, None, None)
        self.observed.append(Observed(reader.call, mean, var, self.pixels))
        return mean, var

    def leave(self, parameters: Window) -> tuple[Tensor, list[Tensor]]:
        tail, features, (images, height, width) = self.plan.tail, self.features, self.shape
        kept = [features, self.mean, self.var]
        rows = features
        if tail is not None:
            norm = self._norm(tail, self._statistics(tail, self.plan.channels, kept), parameters)
            if not isinstance(tail, ConvUnit):
                rows = torch.empty_like(features)
                bn_relu(features, *norm, rows)
            elif self.transition_pool:
                height, width = height // 2, width // 2
                pooled = self._pool(norm)
                kept += [] if self.recompute else [pooled]
                rows = pooled.to(self.compute) @ self._matrix(tail, parameters).t()
            else:
                weight = self._matrix(tail, parameters)
                rows = features.new_empty(self.pixels, weight.shape[0], dtype=self.compute)
                bn_relu_conv1x1(features, *norm, weight, rows, None, None, None, None)
        del self.features, self.mean, self.var, self.scratch
        output = rows.view(images, height, width, -1).permute(0, 3, 1, 2)
        return (output if tail is None else output.contiguous(memory_format=self.format)), kept

    # Backward

    def leave_backward(
        self, grad_output: Tensor, parameters: Window, kept: list[Tensor], needs: Window
    ) -> Gradients:
        self.features, self.mean, self.var, *kept = kept
        self.gradient = torch.empty_like(self.features)
        self.pending = self.mean.new_zeros(2, self.plan.channels)
        self.scratch = Scratch()
        tail = self.plan.tail
        if tail is None:
            self._grid(self.gradient)[...] = grad_output.permute(0, 2, 3, 1)
            return {}
        norm = self._norm(tail, self._restored(tail, self.plan.channels, kept), parameters)
        rows = as_rows(grad_output)
        if not isinstance(tail, ConvUnit):
            return self._norm_backward(tail, norm, rows, self.gradient, False, needs)
        if not self.transition_pool:
            return self._product_backward(tail, norm, rows, self.gradient, False, parameters, needs)
        gradients = self._pooled_product_backward(tail, norm, rows.to(self.compute), kept, needs)
        grad_pooled = rows.to(self.compute) @ self._matrix(tail, parameters)
        sums = bn_relu_avg_pool_backward(
            self._grid(grad_pooled, halved=True),
            self._grid(self.features),
            *norm,
            tail.call.by_batch,
            self._grid(self.gradient),
            self.pending,
        )
        return gradients | _of_affine(tail, needs, *sums)

    def layer_backward(
        self, layer: LayerPlan, parameters: Window, kept: list[Tensor], needs: Window, needs_prefix: bool
    ) -> Gradients:
        first, *inner = layer.units
        norm = self._norm(first, self._restored(first, layer.start, kept), parameters)
        mask = kept.pop() if layer.drop_rate > 0 else None
        new = self._settled(layer.new, mask)
        grad_prefix = self.gradient[:, : layer.start] if needs_prefix else None
        prefix = self.features[:, : layer.start]
        if not inner:
            a = self.scratch.rows("activation", prefix)
            bn_relu(prefix, *norm, a)
            grad_a, gradients = self._convolution_backward(first, new, a, parameters, needs, True)
            return gradients | self._norm_backward(first, norm, grad_a, grad_prefix, True, needs)
        needs_y = needs_prefix or first.trained(needs)
        grad_y, gradients = self._bottleneck_backward(layer, norm, new, parameters, kept, needs, needs_y)
        if not needs_y:
            return gradients
        return gradients | self._product_backward(first, norm, grad_y, grad_prefix, True, parameters, needs)

    def _bottleneck_backward(
        self,
        layer: LayerPlan,
        norm: Norm,
        new: Tensor,
        parameters: Window,
        kept: list[Tensor],
        needs: Window,
        needs_y: bool,
    ) -> tuple[Tensor, Gradients]:
        """From the layer's new channels to the bottleneck's output y [M, N]."""
        first, second = layer.units
        *rest, mean, var = kept
        if rest:
            y = rest[0]
        else:
            weight = self._matrix(first, parameters)
            y = self.scratch.rows("bottleneck", self.features, weight.shape[0], self.compute)
            bn_relu_conv1x1(self.features[:, : layer.start], *norm, weight, y, None, None, None, None)
        inner = self._norm(second, (mean, var), parameters)
        a = self.scratch.rows("activation", y)
        bn_relu(y, *inner, a)
        needs_a = needs_y or any(second.affine(needs))
        grad, gradients = self._convolution_backward(second, new, a, parameters, needs, needs_a)
        if needs_a:
            sums = bn_relu_backward(grad, y, *inner, second.call.by_batch)
            gradients |= _of_affine(second, needs, *sums)
        return grad, gradients

    def enter_backward(
        self, parameters: Window, kept: list[Tensor], needs: Window, needs_x: bool
    ) -> tuple[Tensor | None, Gradients]:
        head = self.plan.head
        grad = self._settled(slice(0, self.plan.start), None) if needs_x or head is not None else None
        del self.features, self.gradient, self.mean, self.var, self.pending, self.scratch
        if grad is None or head is None:
            return (None if grad is None else self._grid(grad).permute(0, 3, 1, 2)), {}
        x, *statistics = kept
        norm = self._norm(head, (statistics[0], statistics[1]), parameters)
        if self.stem_pool:
            grad_x = torch.empty_like(x)
            grids = (self._grid(grad), x.permute(0, 2, 3, 1))
            sums = bn_relu_max_pool_backward(*grids, *norm, head.call.by_batch, grad_x.permute(0, 2, 3, 1))
        else:
            sums = bn_relu_backward(grad, as_rows(x), *norm, head.call.by_batch)
            grad_x = self._grid(grad).permute(0, 3, 1, 2)
        return (grad_x if needs_x else None), _of_affine(head, needs, *sums)

    def _product_backward(
        self,
        unit: ConvUnit,
        norm: Norm,
        grad: Tensor,
        grad_x: Tensor | None,
        accumulate: bool,
        parameters: Window,
        needs: Window,
    ) -> Gradients:
        """Through relu(norm(x)) W^T, x being as many channels of the features as the norm has."""
        width = norm.mean.shape[0]
        *sums, grad_weight = bn_relu_conv1x1_backward(
            grad,
            self.features[:, :width],
            *norm,
            unit.call.by_batch,
            self._matrix(unit, parameters),
            grad_x,
            accumulate,
            self.pending[:, :width],
            any(unit.affine(needs)),
            unit.weight(needs),
        )
        gradients = _of_affine(unit, needs, *sums)
        return gradients | (_of_weight(unit, grad_weight) if unit.weight(needs) else {})

    def _norm_backward(
        self, unit: NormUnit, norm: Norm, grad: Tensor, grad_x: Tensor | None, accumulate: bool, needs: Window
    ) -> Gradients:
        """Through relu(norm(x)), x being as many channels of the features as the norm has."""
        width = norm.mean.shape[0]
        x, pending = self.features[:, :width], self.pending[:, :width]
        by_batch = unit.call.by_batch
        sums = bn_relu_backward_into(grad, x, *norm, by_batch, grad_x, accumulate, pending)
        return _of_affine(unit, needs, *sums)

    def _pooled_product_backward(
        self, tail: ConvUnit, norm: Norm, rows: Tensor, kept: list[Tensor], needs: Window
    ) -> Gradients:
        """The gradient of a transition's weight, from pooled pixels."""
        if not tail.weight(needs):
            return {}
        pooled = kept[-1] if not self.recompute else self._pool(norm)
        return _of_weight(tail, rows.t() @ pooled.to(self.compute))

    # Parts of both

    def _convolve(self, unit: ConvUnit, a: Tensor, parameters: Window) -> Tensor:
        conv, weight = unit.conv, unit.weight(parameters).to(self.compute)
        image = self._grid(a).permute(0, 3, 1, 2).to(self.compute)
        return F.conv2d(image, weight, None, 1, conv.padding, conv.dilation)

    def _convolution_backward(
        self, unit: ConvUnit, grad: Tensor, a: Tensor, parameters: Window, needs: Window, needs_a: bool
    ) -> tuple[Tensor, Gradients]:
        """Through the 3x3 convolution: the gradient of its operand [M, N] and of its weight."""
        conv, wanted = unit.conv, [needs_a, unit.weight(needs), False]
        grad_a, grad_weight, _ = torch.ops.aten.convolution_backward(
            self._grid(grad).permute(0, 3, 1, 2).to(self.compute),
            self._grid(a).permute(0, 3, 1, 2).to(self.compute),
            unit.weight(parameters).to(self.compute),
            None,
            [1, 1],
            list(conv.padding),
            list(conv.dilation),
            False,
            [0, 0],
            1,
            wanted,
        )
        gradients = _of_weight(unit, grad_weight) if unit.weight(needs) else {}
        return (as_rows(grad_a) if needs_a else grad), gradients

    def _pool(self, norm: Norm) -> Tensor:
        """relu(norm(features)) averaged over 2x2 pixels, [M / 4, C]."""
        images, height, width = self.shape
        pooled = self.features.new_empty(images, height // 2, width // 2, self.features.shape[1])
        bn_relu_avg_pool(self._grid(self.features), *norm, pooled)
        return pooled.flatten(0, 2)

    def _settled(self, channels: slice, mask: Tensor | None) -> Tensor:
        """The gradient of some channels with nothing pending, [M, k], through their dropout."""
        grad = self.features.new_empty(self.pixels, channels.stop - channels.start)
        slices = (self.features[:, channels], self.mean[channels], self.pending[:, channels])
        settled_gradient(self.gradient[:, channels], *slices, grad)
        return grad if mask is None else grad.mul_(as_rows(mask))

    def _norm(self, unit: NormUnit, statistics: Iterable[Tensor], parameters: Window) -> Norm:
        return Norm(*statistics, *unit.affine(parameters), unit.eps)

    def _statistics(self, unit: NormUnit, width: int, kept: list[Tensor]) -> tuple[Tensor, Tensor]:
        """What a reader of the first channels normalizes by; running statistics are kept for backward."""
        if not unit.call.by_batch:
            kept += [buffer for buffer in unit.call.running if buffer is not None]
            return self._running(unit)
        self._check_batch(width)
        mean, var = self.mean[:width], self.var[:width]
        self.observed.append(Observed(unit.call, mean, var, self.pixels))
        return mean, var

    def _restored(self, unit: NormUnit, width: int, kept: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The same in backward; takes what `_statistics` kept off the front of the list."""
        if unit.call.by_batch:
            return self.mean[:width], self.var[:width]
        mean, var = kept.pop(0), kept.pop(0)
        return mean.to(self.mean.dtype), var.to(self.mean.dtype)

    def _statistics_of_input(self, head: NormUnit, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the stem's norm normalizes the stage's input by."""
        if not head.call.by_batch:
            return self._running(head)
        check_batch(x.shape)
        mean, var = self.mean.new_empty(2, x.shape[1]).unbind()
        channel_statistics(as_rows(x), mean, var)
        self.observed.append(Observed(head.call, mean, var, x.numel() // x.shape[1]))
        return mean, var

    def _running(self, unit: NormUnit) -> tuple[Tensor, Tensor]:
        mean, var = unit.call.running
        assert mean is not None
        assert var is not None
        return mean.to(self.mean.dtype), var.to(self.mean.dtype)

    def _take_statistics(self, channels: slice) -> None:
        """Compute the statistics of channels that have just been written, if anyone reads them."""
        if self.plan.shares_statistics:
            channel_statistics(self.features[:, channels], self.mean[channels], self.var[channels])

    def _check_batch(self, channels: int) -> None:
        check_batch(torch.Size((self.shape[0], channels, *self.shape[1:])))

    def _matrix(self, unit: ConvUnit, parameters: Window) -> Tensor:
        """A 1x1 convolution's weight as a matrix [N, C] in the dtype it computes in."""
        return unit.weight(parameters).flatten(1).to(self.compute)

    def _grid(self, rows: Tensor, halved: bool = False) -> Tensor:
        """A matrix [M, C] as [N, H, W, C]."""
        images, height, width = self.shape
        if halved:
            height, width = height // 2, width // 2
        return rows.view(images, height, width, rows.shape[1])


class Scratch:
    """Named pieces of memory, made at their widest use so far and used again by every layer."""

    def __init__(self) -> None:
        self._flat: dict[str, Tensor] = {}

    def rows(
        self, name: str, like: Tensor, columns: int | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """A dense matrix with the rows (and by default columns and dtype) of `like`."""
        columns = like.shape[1] if columns is None else columns
        size = like.shape[0] * columns
        if name not in self._flat or self._flat[name].numel() < size:
            self._flat.pop(name, None)
            self._flat[name] = like.new_empty(size, dtype=dtype or like.dtype)
        return self._flat[name][:size].view(like.shape[0], columns)


def _of_affine(unit: NormUnit, needs: Window, grad_gamma: Tensor, grad_beta: Tensor) -> Gradients:
    """The gradients of a norm's weight and bias that are needed, in the parameters' dtype."""
    gradients: Gradients = {}
    for place, parameter, grad in ((0, unit.call.norm.weight, grad_gamma), (1, unit.call.norm.bias, grad_beta)):
        if needs[unit.first + place]:
            gradients[unit.first + place] = grad.to(parameter.dtype)
    return gradients


def _of_weight(unit: ConvUnit, grad: Tensor) -> Gradients:
    weight = unit.conv.weight
    return {unit.first + 2: grad.reshape(weight.shape).to(weight.dtype)}
