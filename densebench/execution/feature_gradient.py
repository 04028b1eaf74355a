"""The gradient of a stage's features: one buffer that every reader adds to, and what is pending beside it.

A reader's two terms that come from the batch's statistics wait, as two numbers a channel, for the next pass over
the buffer (see `densebench.kernels.deferred`).
"""

from __future__ import annotations

from torch import Tensor

from densebench.execution.pixels import Pixels
from densebench.execution.plan import ConvUnit, Flat, Gradients, NormUnit
from densebench.execution.pooling import Pooling
from densebench.kernels.bn_relu_backward import bn_relu_backward_into
from densebench.kernels.bn_relu_conv1x1_backward import bn_relu_conv1x1_backward
from densebench.kernels.deferred import settled_gradient
from densebench.kernels.norm import Norm


class FeatureGradient:
    """The gradient of features [M, C], M = N H W pixels. The first to write it writes every channel.

    Each reader `through_...` has a norm of the first channels, as many as the norm is wide. It returns the
    gradients of its own parameters, those that are needed.

    Args:
        features: the buffer [M, C] that the readers read.
        mean: of each channel, [C], shared by all readers that normalize by the batch.
    """

    def __init__(self, features: Tensor, mean: Tensor, pixels: Pixels) -> None:
        self.features, self.mean, self.pixels = features, mean, pixels
        self.buffer = pixels.buffer(features.shape[1], features)
        self._pending = mean.new_zeros(2, features.shape[1])
        self._accumulates = self._left_pending = False

    def start_with(self, grad: Tensor) -> None:
        """Where nothing reads the features but what follows the stage: its gradient, a map [N, C, H, W]."""
        self.pixels.grid(self.buffer)[...] = grad.movedim(1, -1)
        self._accumulates = True

    def settled(self, channels: slice) -> Tensor:
        """A copy of some channels' gradient with nothing pending, [M, k]."""
        grad = self.features.new_empty(self.pixels.count, channels.stop - channels.start)
        if self._left_pending:
            slices = (self.features[:, channels], self.mean[channels], self._pending[:, channels])
            settled_gradient(self.buffer[:, channels], *slices, grad)
        else:  # nothing was ever pending; and a feature that is NaN, times 0, would be something
            grad.copy_(self.buffer[:, channels])
        return grad

    def through_product(
        self, unit: ConvUnit, norm: Norm, weight: Tensor, grad: Tensor, needs: Flat, needs_features: bool
    ) -> Gradients:
        """Through relu(norm(x)) W^T, from the product's gradient [M, N]; W is [N, C']."""
        width = norm.mean.shape[0]
        *sums, grad_weight = bn_relu_conv1x1_backward(
            grad,
            self.features[:, :width],
            *norm,
            unit.call.by_batch,
            weight,
            self.buffer[:, :width] if needs_features else None,
            self._accumulates,
            self._pending[:, :width],
            any(unit.affine(needs)),
            unit.weight(needs),
        )
        self._note(unit, needs_features)
        return unit.affine_gradients(needs, *sums) | unit.weight_gradient(needs, grad_weight)

    def through_norm(
        self, unit: NormUnit, norm: Norm, grad: Tensor, needs: Flat, needs_features: bool
    ) -> Gradients:
        """Through relu(norm(x)), from its gradient [M, C']."""
        width = norm.mean.shape[0]
        grad_x = self.buffer[:, :width] if needs_features else None
        x, pending = self.features[:, :width], self._pending[:, :width]
        sums = bn_relu_backward_into(grad, x, *norm, unit.call.by_batch, grad_x, self._accumulates, pending)
        self._note(unit, needs_features)
        return unit.affine_gradients(needs, *sums)

    def through_avg_pool(self, unit: NormUnit, norm: Norm, grad: Tensor, needs: Flat) -> Gradients:
        """Through a transition's pool of relu(norm(features)), from the pooled gradient; the first to write."""
        maps = (grad, self.features, norm, unit.call.by_batch, self.buffer, self._pending)
        sums = Pooling.transition(self.pixels).mean_backward(*maps)
        self._note(unit, written=True)
        return unit.affine_gradients(needs, *sums)

    def _note(self, reader: NormUnit, written: bool) -> None:
        self._accumulates |= written
        self._left_pending |= written and reader.call.by_batch
