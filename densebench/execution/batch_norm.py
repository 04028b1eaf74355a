"""What a batch norm module's `forward` decides before it computes, for strategies that compute it themselves.

A module in training normalizes by the batch and moves its running statistics; in evaluation, or without
running statistics, it behaves as its flags say. Each module decides for itself.

Running statistics are moved once, after a whole stage has been computed: a computation that fails halfway leaves
no trace, and what backward recomputes never moves them again.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from densebench.models.dimensions import BatchNorm


class NormCall(NamedTuple):
    """One call of one batch norm.

    Attributes:
        norm: the module.
        by_batch: normalize by the statistics of the batch; otherwise by the running ones.
        momentum: weight of the batch in the running statistics.
        eps: added to the variance; of the forward, also in its backward.
        running_mean, running_var: [C], the module's own (or copies, see `copied`); None where the call
            neither reads nor moves them.
    """

    norm: BatchNorm
    by_batch: bool
    momentum: float
    eps: float
    running_mean: Tensor | None
    running_var: Tensor | None

    @property
    def running(self) -> tuple[Tensor | None, Tensor | None]:
        return self.running_mean, self.running_var

    @property
    def moves_running_statistics(self) -> bool:
        return self.by_batch and self.running_mean is not None

    @property
    def signature(self) -> Hashable:
        """All that it says beside the statistics."""
        counts = self.norm.training and self.norm.track_running_stats
        return self.by_batch, self.momentum, self.eps, counts

    def copied(self) -> NormCall:
        """The same call on copies of the running statistics, which PyTorch's own kernels may move."""
        mean, var = self.running
        return self._replace(
            running_mean=None if mean is None else mean.clone(),
            running_var=None if var is None else var.clone(),
        )

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Two empty tensors of the dtype in which PyTorch's batch norm returns the statistics of x.

        float32 at least on a GPU; on a CPU the parameters' dtype, or x's where there are none.
        """
        given = [t for t in (self.norm.weight, self.norm.bias, *self.running) if t is not None]
        dtype = given[0].dtype if given else x.dtype
        if x.is_cuda and dtype != torch.float64:
            dtype = torch.float32
        return x.new_empty(0, dtype=dtype), x.new_empty(0, dtype=dtype)


class Observed(NamedTuple):
    """The statistics of one batch for one norm: mean and biased variance [C] over so many `values`."""

    call: NormCall
    mean: Tensor
    var: Tensor
    values: int


def call_norm(norm: BatchNorm, before: int = 0) -> NormCall:
    """What the module would do if it were called now; changes nothing.

    Args:
        norm: the module.
        before: calls of it that are not counted yet.

    Raises:
        ValueError: PyTorch's own, where eps is not positive.
    """
    by_batch = norm.training or (norm.running_mean is None and norm.running_var is None)
    if norm.eps <= 0.0:  # which of these are refused, and how, differs between PyTorch's versions
        F.batch_norm(torch.ones(2, 1), torch.ones(1), torch.ones(1), training=by_batch, eps=norm.eps)
    used = not norm.training or norm.track_running_stats
    momentum = 0.0 if norm.momentum is None else float(norm.momentum)  # which may be a tensor
    if norm.momentum is None and norm.training and used and norm.num_batches_tracked is not None:
        momentum = 1.0 / float(norm.num_batches_tracked + 1 + before)  # cumulative average
    mean, var = (norm.running_mean, norm.running_var) if used else (None, None)
    return NormCall(norm, by_batch, momentum, norm.eps, mean, var)


class NormCalls:
    """The calls of norms in one run, in order, where layers may share a norm.

    Args:
        copied: let them hold copies of the running statistics (see `NormCall.copied`), one where norms share.

    Attributes:
        calls: those added so far.
    """

    def __init__(self, copied: bool) -> None:
        self.calls: list[NormCall] = []
        self._copied = copied
        self._copies: dict[tuple[int, int], NormCall] = {}  # by the tensors

    def add(self, norm: BatchNorm) -> NormCall:
        """The next call, of this norm."""
        # A shared norm whose momentum is one over the batches it has seen sees one more a call.
        before = 0 if norm.momentum is not None else sum(call.norm is norm for call in self.calls)
        call = call_norm(norm, before)
        if self._copied:
            mean, var = call.running
            held = self._copies.setdefault((id(mean), id(var)), call.copied())
            call = call._replace(running_mean=held.running_mean, running_var=held.running_var)
        self.calls.append(call)
        return call


@torch.no_grad()
def commit_copies(calls: Sequence[NormCall]) -> None:
    """Store the copies of running statistics that the calls have moved, and count the batch."""
    moved = [call for call in calls if call.moves_running_statistics]
    stored = [buffer for call in moved for buffer in (call.norm.running_mean, call.norm.running_var)]
    if moved:
        torch._foreach_copy_(_present(stored), _present([copy for call in moved for copy in call.running]))
    _count_batch(calls)


@torch.no_grad()
def commit_observed(calls: Sequence[NormCall], observed: Sequence[Observed]) -> None:
    """Move the running statistics towards what was observed, and count the batch.

    running += momentum * (batch - running), with the unbiased variance; a few launches for all norms together.
    """
    by_momentum: dict[float, list[tuple[Tensor, Tensor, float]]] = {}
    for one in observed:
        call = one.call
        if call.moves_running_statistics and call.running_mean is not None and call.running_var is not None:
            moves = by_momentum.setdefault(call.momentum, [])
            moves.append((call.running_mean, one.mean, 1.0))
            moves.append((call.running_var, one.var, one.values / (one.values - 1)))
    for momentum, moves in sorted(by_momentum.items(), reverse=True):  # cumulative averages in their order
        running = [stored for stored, _, _ in moves]
        batch = [seen.to(stored.dtype) for stored, seen, _ in moves]
        unbiased = torch._foreach_mul(batch, [factor for _, _, factor in moves])
        torch._foreach_lerp_(running, unbiased, momentum)
    _count_batch(calls)


def _count_batch(calls: Sequence[NormCall]) -> None:
    norms = [call.norm for call in calls if call.norm.training and call.norm.track_running_stats]
    counters = _present([norm.num_batches_tracked for norm in norms])
    if counters:
        torch._foreach_add_(counters, 1)


def _present(tensors: list[Tensor | None]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def check_batch(shape: torch.Size) -> None:
    """Raises PyTorch's own ValueError where [N, C, H, W] has one value a channel, so no variance."""
    if shape[0] * shape[2:].numel() == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {shape}")
