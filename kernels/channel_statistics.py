"""Mean and biased variance of each column of a matrix: the statistics of a batch norm.

In a dense block a channel's statistics do not depend on who reads it, so they are computed once, when the
channel has been written, from the values as stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from densebench.kernels.library import operator
from densebench.kernels.rows import accumulate_dtype, as_map, tile_bytes, tiles


def reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance over rows; reads x twice (2 M C), writes 2 C."""
    var, mean = torch.var_mean(x.to(accumulate_dtype(x)), dim=0, correction=0)
    return mean, var


def _cpu(x: Tensor, mean: Tensor, var: Tensor) -> None:
    """Native two-pass statistics of each tile, merged by Chan's formula, which never subtracts large squares."""
    rows = 0
    for part, (tile,) in tiles(x, 1):
        tile.copy_(x[part])
        tile_mean, tile_var = torch.ops.aten.batch_norm_update_stats(as_map(tile), None, None, 0.0)
        count = tile.shape[0]
        total, share = rows + count, count / (rows + count)
        if rows == 0:
            mean.copy_(tile_mean)
            var.copy_(tile_var)
        else:
            delta = tile_mean - mean
            var.mul_(1 - share).add_(tile_var, alpha=share).addcmul_(delta, delta, value=share * (1 - share))
            mean.add_(delta, alpha=share)
        rows = total


def _cuda(x: Tensor, mean: Tensor, var: Tensor) -> None:
    raise NotImplementedError


def _fake(x: Tensor, mean: Tensor, var: Tensor) -> None:
    torch._check(mean.shape == var.shape == x.shape[1:])


channel_statistics = operator(
    "channel_statistics(Tensor x, Tensor(a!) mean, Tensor(b!) var) -> ()",
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
    workspace=lambda x, mean, var: tile_bytes(x) + 8 * mean.nbytes,
)
