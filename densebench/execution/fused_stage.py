"""A whole stage of the fused strategies, forward and backward: who calls which operator on which channels.

Norms and ReLUs are part of the operators that read the features; what is shared by all readers of a channel - its
statistics, its gradient - is in `shared_statistics` and `feature_gradient`.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
import torch.nn.functional as F
from torch import Tensor

from densebench.execution.batch_norm import Observed, commit_observed
from densebench.execution.computation import StageComputation, Window
from densebench.execution.convolution import convolve, product, product_weight_gradient
from densebench.execution.feature_gradient import FeatureGradient
from densebench.execution.norm_convolution import NormConvolution
from densebench.execution.pixels import Pixels, Scratch
from densebench.execution.plan import ConvUnit, Gradients, LayerPlan, NormUnit, StagePlan
from densebench.execution.pooling import Pooling
from densebench.execution.precision import compute_dtype, pooled_dtype
from densebench.execution.shared_statistics import MeanAndVar, SharedStatistics
from densebench.formats import CHANNELS_LAST, memory_format_of
from densebench.kernels import compiled
from densebench.kernels.bn_relu import bn_relu
from densebench.kernels.bn_relu_backward import bn_relu_backward
from densebench.kernels.bn_relu_conv1x1 import bn_relu_conv1x1
from densebench.kernels.launch import matmul_precision
from densebench.kernels.norm import Norm
from densebench.kernels.rows import as_rows
from densebench.models.layers import Transition
from densebench.models.stage import Stage

# In inference so many pixels go through a layer at once: enough to keep the device busy.
PART_PIXELS = {"cpu": 2**13, "cuda": 2**15}


class FusedStage(StageComputation):
    """A whole stage over a feature buffer and a gradient buffer, both matrices [M, C] of M = N H W pixels.

    Attributes:
        features: the feature buffer.
        gradient: of the features, in a buffer of its own.
        statistics: of the features' channels, shared by all their readers.
        given, pixels: those of the stage's input, and of its block.
        dtype, pooled_dtype: of the block's input, and of a transition's output.
    """

    def __init__(self, stage: Stage, x: Tensor, recompute: bool) -> None:
        super().__init__(StagePlan(stage, whole=True), compute_dtype(x), stage.block)
        self.recompute = recompute
        self.format = memory_format_of(x)
        self.stem_pool = stage.head is not None and stage.head.pool is not None
        self.transition_pool = isinstance(stage.tail, Transition) and hasattr(stage.tail, "pool")
        self.given = Pixels(x.shape[0], tuple(x.shape[2:]))
        self.pixels = Pooling.stem(self.given).after if self.stem_pool else self.given
        self.dtype = pooled_dtype(x, x.dtype) if self.stem_pool else x.dtype
        self.pooled_dtype = pooled_dtype(x, self.compute)
        self.observed: list[Observed]

    def signature(self) -> Hashable:
        if any(call.moves_running_statistics and call.norm.momentum is None for call in self.plan.calls):
            return None  # cumulative averages: their momentum is another in every step
        pools, dtypes = (self.stem_pool, self.transition_pool), (self.compute, self.dtype, self.pooled_dtype)
        return (self.recompute, dtypes, self.format, pools, self.given, self.plan.signature)

    def settings(self) -> Hashable:
        libraries = torch.backends.cudnn.enabled, torch.backends.mkldnn.enabled
        return matmul_precision(self.compute), libraries, torch.get_num_threads(), compiled.settings()

    # Forward

    def enter(self, x: Tensor, parameters: Window, keep: bool) -> list[Tensor]:
        channels, like = self.plan.channels, x.new_empty(0, dtype=torch.promote_types(self.dtype, self.compute))
        self.statistics = SharedStatistics.empty(self.plan, x)
        self.scratch = Scratch()
        kept: list[Tensor] = []
        first = slice(0, self.plan.start)
        if self.plan.head is None:
            self.features = self.pixels.buffer(channels, like)
            self.pixels.grid(self.features)[..., first] = x.movedim(1, -1)
        elif keep:
            self.features = self.pixels.buffer(channels, like)
            kept = self._stem(self.plan.head, x, parameters, self.features[:, first])
        else:  # the stem's map, as large as the buffer, goes before the buffer comes
            pooled = self.pixels.buffer(self.plan.start, like)
            self._stem(self.plan.head, x, parameters, pooled)
            del x
            self.features = self.pixels.buffer(channels, like)
            self.features[:, first] = pooled
        self._take_statistics(first)
        return kept

    def _stem(self, head: NormUnit, x: Tensor, parameters: Window, out: Tensor) -> list[Tensor]:
        """The stem's norm, ReLU and pool into `out`; what their backward needs."""
        x = x.contiguous(memory_format=CHANNELS_LAST[x.dim()])
        mean, var = self.statistics.of_map(head, x)
        norm = head.reading((mean, var), parameters)
        if self.stem_pool:
            Pooling.stem(self.given).largest(as_rows(x), norm, out)
        else:
            bn_relu(as_rows(x), *norm, out)
        return [x, mean, var]

    def layer(self, layer: LayerPlan, parameters: Window, keep: bool) -> list[Tensor]:
        first, *inner = layer.units
        kept: list[Tensor] = []
        statistics = self.statistics.of(first, layer.start, self.pixels, kept)
        norm, prefix = first.reading(statistics, parameters), self.features[:, : layer.start]
        if inner and not keep and layer.drop_rate == 0 and not inner[0].call.by_batch:
            self._infer(layer, norm, parameters)
            self._take_statistics(layer.new)
            return kept
        if inner:
            prefix, norm = self._bottleneck(layer, norm, prefix, parameters, kept if keep else None)
        self._convolve(layer, prefix, norm, parameters, kept)
        return kept

    def _convolve(self, layer: LayerPlan, x: Tensor, norm: Norm, parameters: Window, kept: list[Tensor]) -> None:
        """norm-ReLU-3x3 of x [M, C] into the layer's channels, and their statistics."""
        unit, new = layer.units[-1], self.features[:, layer.new]
        weight = unit.weight(parameters)
        if layer.drop_rate == 0 and self._through.takes(unit, weight, x, new):
            taken = self.statistics.places(layer.new) if self.plan.shares_statistics else None
            self._through.forward_into(unit, x, norm, weight, new, taken)
            return
        made = self._through.forward(unit, x, norm, weight)
        if layer.drop_rate > 0:
            mask = F.dropout(torch.ones_like(made, memory_format=self.format), layer.drop_rate)
            made = made * mask  # drawn in the network's own memory format, as F.dropout(made) would be
            kept.append(mask)
        if self.plan.shares_statistics:
            self.statistics.take_and_store(as_rows(made), self.features, layer.new)
        else:
            new.copy_(as_rows(made))

    def _infer(self, layer: LayerPlan, norm: Norm, parameters: Window) -> None:
        """A layer of which nothing is kept: the second norm and ReLU go into the product's epilogue.

        A few images at a time, so that a bottleneck's output is small beside the buffer.
        """
        first, second = layer.units
        weight = first.matrix(parameters)
        inner = second.reading(self.statistics.running(second), parameters)
        filters = second.weight(parameters)
        for pixels, rows in self.pixels.parts(PART_PIXELS["cuda" if weight.is_cuda else "cpu"]):
            prefix = self.features[rows, : layer.start]
            a = self.scratch.rows("activation", prefix, weight.shape[0], self.compute)
            bn_relu_conv1x1(prefix, *norm, weight, a, None, None, *inner)
            self.features[rows, layer.new] = as_rows(convolve(pixels.map(a), second.options, filters))

    def _bottleneck(
        self, layer: LayerPlan, norm: Norm, prefix: Tensor, parameters: Window, kept: list[Tensor] | None
    ) -> tuple[Tensor, Norm]:
        """y = relu(norm1(prefix)) W^T [M, N], and the second norm, which reads it."""
        first, second = layer.units
        weight = first.matrix(parameters)
        if kept is None or self.recompute:
            y = self.scratch.rows("bottleneck", prefix, weight.shape[0], self.compute)
        else:
            y = prefix.new_empty(prefix.shape[0], weight.shape[0], dtype=self.compute)
            kept.append(y)
        statistics = self._multiply(second, prefix, norm, weight, y)
        if kept is not None:
            kept += statistics
        return y, second.reading(statistics, parameters)

    def _multiply(self, reader: ConvUnit, x: Tensor, norm: Norm, weight: Tensor, y: Tensor) -> MeanAndVar:
        """y = relu(norm(x)) W^T, and the statistics by which its reader normalizes it."""
        if not reader.call.by_batch:
            bn_relu_conv1x1(x, *norm, weight, y, None, None)
            return self.statistics.running(reader)
        mean, var = self.statistics.to_be_written(reader, weight.shape[0], self.pixels)
        bn_relu_conv1x1(x, *norm, weight, y, mean, var)
        return mean, var

    def leave(self, parameters: Window) -> tuple[Tensor, list[Tensor]]:
        tail, features, pixels = self.plan.tail, self.features, self.pixels
        del self.scratch
        kept = [features, self.statistics.mean, self.statistics.var]
        rows = features
        if tail is not None:
            statistics = self.statistics.of(tail, self.plan.channels, pixels, kept)
            norm = tail.reading(statistics, parameters)
            if not isinstance(tail, ConvUnit):
                rows = features.new_empty(features.shape)
                bn_relu(features, *norm, rows)
            elif self.transition_pool:
                pooling = Pooling.transition(pixels)
                pixels, pooled = pooling.after, pooling.mean(features, norm)
                kept += [] if self.recompute else [pooled]
                rows = product(pooled.to(self.compute), tail.matrix(parameters)).to(self.pooled_dtype)
            else:
                weight = tail.matrix(parameters)
                rows = features.new_empty(pixels.count, weight.shape[0], dtype=self.compute)
                bn_relu_conv1x1(features, *norm, weight, rows, None, None)
        self.observed = self.statistics.observed
        del self.features, self.statistics
        output = pixels.map(rows)
        return (output if tail is None else output.contiguous(memory_format=self.format)), kept

    def commit(self) -> None:
        commit_observed(self.plan.calls, self.observed)
        del self.observed

    # Backward

    def leave_backward(
        self, grad_output: Tensor, parameters: Window, kept: list[Tensor], needs: Window
    ) -> Gradients:
        self.features, mean, var, *kept = kept
        self.statistics = SharedStatistics(mean, var)
        self.gradient = FeatureGradient(self.features, mean, self.pixels)
        self.scratch = Scratch()
        tail = self.plan.tail
        if tail is None:
            self.gradient.start_with(grad_output)
            return {}
        norm = tail.reading(self.statistics.restored(tail, self.plan.channels, kept), parameters)
        rows = as_rows(grad_output)
        if not isinstance(tail, ConvUnit):
            return self.gradient.through_norm(tail, norm, rows, needs, needs_features=True)
        if not self.transition_pool:
            weight = tail.matrix(parameters)
            return self.gradient.through_product(tail, norm, weight, rows, needs, needs_features=True)
        return self._transition_backward(tail, norm, rows.to(self.compute), parameters, kept, needs)

    def _transition_backward(
        self, tail: ConvUnit, norm: Norm, rows: Tensor, parameters: Window, kept: list[Tensor], needs: Window
    ) -> Gradients:
        """Through the product on pooled pixels, then the pooling."""
        gradients: Gradients = {}
        if tail.weight(needs):
            pooling = Pooling.transition(self.pixels)
            pooled = pooling.mean(self.features, norm) if self.recompute else kept[-1]
            gradients = tail.weight_gradient(needs, product_weight_gradient(rows, pooled.to(self.compute)))
            del pooled
        grad_pooled = product(rows, tail.matrix(parameters).t())
        return gradients | self.gradient.through_avg_pool(tail, norm, grad_pooled, needs)

    def layer_backward(
        self, layer: LayerPlan, parameters: Window, kept: list[Tensor], needs: Window, needs_prefix: bool
    ) -> Gradients:
        first, *inner = layer.units
        norm = first.reading(self.statistics.restored(first, layer.start, kept), parameters)
        mask = kept.pop() if layer.drop_rate > 0 else None
        new = self.gradient.settled(layer.new)
        if mask is not None:
            new.mul_(as_rows(mask))
        if not inner:
            a = self._through.operand(self.features[:, : layer.start], norm)
            weight = first.weight(parameters)
            grad_a, gradients = self._through.backward_to_operand(first, new, a, weight, needs, True)
            return gradients | self.gradient.through_norm(first, norm, grad_a, needs, needs_prefix)
        needs_y = needs_prefix or first.trained(needs)
        grad_y, gradients = self._bottleneck_backward(layer, norm, new, parameters, kept, needs, needs_y)
        del new, mask
        if not needs_y:
            return gradients
        weight = first.matrix(parameters)
        return gradients | self.gradient.through_product(first, norm, weight, grad_y, needs, needs_prefix)

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
            weight = first.matrix(parameters)
            y = self.scratch.rows("bottleneck", self.features, weight.shape[0], self.compute)
            bn_relu_conv1x1(self.features[:, : layer.start], *norm, weight, y, None, None)
        inner = second.reading((mean, var), parameters)
        return self._through.backward(second, new, y, inner, parameters, needs, needs_y)

    def enter_backward(
        self, parameters: Window, kept: list[Tensor], needs: Window, needs_x: bool
    ) -> tuple[Tensor | None, Gradients]:
        head = self.plan.head
        del self.scratch  # before more memory is taken
        wanted = needs_x or (head is not None and any(head.affine(needs)))
        grad = self.gradient.settled(slice(0, self.plan.start)) if wanted else None
        self.release()
        if grad is None or head is None:
            return (None if grad is None else self.pixels.map(grad)), {}
        x, mean, var = kept
        # So it lies, but after `save_on_cpu(pin_memory=True)`.
        x = x.contiguous(memory_format=CHANNELS_LAST[x.dim()])
        norm = head.reading((mean, var), parameters)
        if self.stem_pool:
            pooling = Pooling.stem(self.given)
            rows, sums = pooling.largest_backward(grad, as_rows(x), norm, head.call.by_batch)
            grad_x = self.given.map(rows)
        else:
            sums = bn_relu_backward(grad, as_rows(x), *norm, head.call.by_batch)
            grad_x = self.pixels.map(grad)
        return (grad_x if needs_x else None), head.affine_gradients(needs, *sums)

    # Parts of both

    @property
    def _through(self) -> NormConvolution:
        return NormConvolution(self.pixels, self.scratch)

    def _take_statistics(self, channels: slice) -> None:
        """The statistics of channels that have just been written, if anyone reads them."""
        if self.plan.shares_statistics:
            self.statistics.take(self.features, channels)
