"""What `nn.BatchNorm2d.forward` decides before it computes, for strategies that compute it themselves.

A module in training normalizes by the batch and moves its running statistics; in evaluation, or without
running statistics, it behaves as its flags say. Each module decides for itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class NormCall:
    """One call of one batch norm.

    Attributes:
        norm: the module.
        by_batch: normalize by the statistics of the batch; otherwise by the running ones.
        momentum: weight of the batch in the running statistics.
        running_mean, running_var: [C], copies: safe to overwrite, and unmoved by later calls. None where the
            call neither reads nor moves them.
    """

    norm: nn.BatchNorm2d
    by_batch: bool
    momentum: float
    running_mean: Tensor | None
    running_var: Tensor | None

    @property
    def running(self) -> tuple[Tensor | None, Tensor | None]:
        return self.running_mean, self.running_var

    @property
    def moves_running_statistics(self) -> bool:
        return self.by_batch and self.running_mean is not None

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Two empty tensors of the dtype in which PyTorch's batch norm returns the statistics of x.

        float32 at least on a GPU; on a CPU the parameters' dtype, or x's where there are none.
        """
        given = [t for t in (self.norm.weight, self.norm.bias, *self.running) if t is not None]
        dtype = given[0].dtype if given else x.dtype
        if x.is_cuda and dtype != torch.float64:
            dtype = torch.float32
        return x.new_empty(0, dtype=dtype), x.new_empty(0, dtype=dtype)


def call_norm(norm: nn.BatchNorm2d) -> NormCall:
    """What the module would do if it were called now; changes nothing."""
    by_batch = norm.training or (norm.running_mean is None and norm.running_var is None)
    used = not norm.training or norm.track_running_stats
    mean, var = norm.running_mean, norm.running_var
    momentum = 0.0 if norm.momentum is None else norm.momentum
    if norm.momentum is None and norm.training and used and norm.num_batches_tracked is not None:
        momentum = 1.0 / float(norm.num_batches_tracked + 1)  # cumulative average
    return NormCall(
        norm,
        by_batch,
        momentum,
        mean.clone() if used and mean is not None else None,
        var.clone() if used and var is not None else None,
    )


@torch.no_grad()
def commit(calls: list[NormCall]) -> None:
    """Store the running statistics that the calls have moved, and count the batch.

    Done once, after a whole stage has succeeded, so that a forward that fails halfway leaves no trace.
    """
    moved = [call for call in calls if call.moves_running_statistics]
    stored = [buffer for call in moved for buffer in (call.norm.running_mean, call.norm.running_var)]
    if moved:
        torch._foreach_copy_(_present(stored), _present([copy for call in moved for copy in call.running]))
    counters = [
        norm.num_batches_tracked
        for norm in (call.norm for call in calls)
        if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None
    ]
    if counters:
        torch._foreach_add_(counters, 1)


def _present(tensors: list[Tensor | None]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def check_batch(x: Tensor) -> None:
    """Raises PyTorch's own ValueError where a batch has one value a channel, so no variance."""
    if x.numel() // x.shape[1] == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
