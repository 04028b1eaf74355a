"""Batch statistics of a feature buffer's channels, computed once and shared by every norm that reads them.

In a dense block the mean and variance of a channel do not depend on who reads it; each reader applies its own
gamma, beta and eps, and moves its own running statistics.
"""

from __future__ import annotations

from torch import Tensor

from densebench.execution.batch_norm import Observed, check_batch
from densebench.execution.pixels import Pixels
from densebench.execution.plan import NormUnit, StagePlan
from densebench.kernels.channel_statistics import channel_statistics
from densebench.kernels.rows import accumulate_dtype, as_rows

MeanAndVar = tuple[Tensor, Tensor]


class SharedStatistics:
    """Mean and biased variance [C] of the channels written so far.

    Attributes:
        mean, var: in the accumulating dtype.
        observed: what each norm saw, for its running statistics.
    """

    def __init__(self, mean: Tensor, var: Tensor) -> None:
        self.mean, self.var = mean, var
        self.observed: list[Observed] = []

    @classmethod
    def empty(cls, plan: StagePlan, like: Tensor) -> SharedStatistics:
        return cls(*like.new_zeros(2, plan.channels, dtype=accumulate_dtype(like)).unbind())

    def places(self, channels: slice) -> MeanAndVar:
        """Where those of some channels belong."""
        return self.mean[channels], self.var[channels]

    def take(self, features: Tensor, channels: slice) -> None:
        """Compute those of channels that have just been written into the buffer [M, C]."""
        channel_statistics(features[:, channels], *self.places(channels))

    def take_and_store(self, new: Tensor, features: Tensor, channels: slice) -> None:
        """Write channels [M, k] into the buffer [M, C] and compute their statistics in the same pass."""
        channel_statistics(new, *self.places(channels), features[:, channels])

    def of(self, unit: NormUnit, width: int, pixels: Pixels, kept: list[Tensor]) -> MeanAndVar:
        """What a reader of the first channels normalizes by; running statistics are kept for backward."""
        if not unit.call.by_batch:
            kept += [buffer for buffer in unit.call.running if buffer is not None]
            return self.running(unit)
        check_batch(pixels.shape(width))
        return self._observe(unit, self.mean[:width], self.var[:width], pixels.count)

    def restored(self, unit: NormUnit, width: int, kept: list[Tensor]) -> MeanAndVar:
        """The same in backward; takes what `of` kept off the front of the list."""
        if unit.call.by_batch:
            return self.mean[:width], self.var[:width]
        mean, var = kept.pop(0), kept.pop(0)
        return mean.to(self.mean.dtype), var.to(self.mean.dtype)

    def of_map(self, unit: NormUnit, x: Tensor) -> MeanAndVar:
        """What the only reader of a dense channels-last map normalizes by."""
        if not unit.call.by_batch:
            return self.running(unit)
        check_batch(x.shape)
        mean, var = self.mean.new_empty(2, x.shape[1]).unbind()
        channel_statistics(as_rows(x), mean, var)
        return self._observe(unit, mean, var, x.numel() // x.shape[1])

    def to_be_written(self, unit: NormUnit, channels: int, pixels: Pixels) -> MeanAndVar:
        """Memory for the statistics of a product that its only reader will normalize by."""
        check_batch(pixels.shape(channels))
        mean, var = self.mean.new_empty(2, channels).unbind()
        return self._observe(unit, mean, var, pixels.count)

    def running(self, unit: NormUnit) -> MeanAndVar:
        mean, var = unit.call.running
        assert mean is not None
        assert var is not None
        return mean.to(self.mean.dtype), var.to(self.mean.dtype)

    def _observe(self, unit: NormUnit, mean: Tensor, var: Tensor, count: int) -> MeanAndVar:
        self.observed.append(Observed(unit.call, mean, var, count))
        return mean, var
