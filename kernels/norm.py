"""A norm's vectors, [C] each: as given, folded into one multiply-add, and from sums its statistics and gradients.

Beside the passes over rows (`passes`) they are little work, but some thirty of PyTorch's operators a layer, each
of which costs more than that work: compiled, they are a few calls. Made of PyTorch's operators they serve where
nothing is compiled.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from densebench.kernels import compiled
from densebench.kernels.rows import accumulate_dtype

PIVOT_ROWS = 64  # whose mean a channel's values are taken relative to
_FEW_ROWS = 32  # of which adding up one more thread's sums takes as long as the rows
_LINE = 8  # float64 values in a cache line


class Folded(NamedTuple):
    """A norm as one multiply-add, x * scale + shift, as PyTorch's own CPU kernel computes it.

    Attributes:
        table: mean, 1 / std, scale and shift, [4, C] in the accumulating dtype.
    """

    table: Tensor

    @property
    def mean(self) -> Tensor:
        return self.table[0]

    @property
    def inv_std(self) -> Tensor:
        return self.table[1]

    @property
    def scale(self) -> Tensor:
        return self.table[2]

    @property
    def shift(self) -> Tensor:
        return self.table[3]


class Norm(NamedTuple):
    """A batch norm over columns: (x - mean) / sqrt(var + eps) * gamma + beta; all [C].

    `mean` and `var` (biased) are in the accumulating dtype; gamma and beta may be None.
    """

    mean: Tensor
    var: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    eps: float

    def folded(self) -> Folded:
        """In the accumulating dtype."""
        mean, *others = self[:4]
        table = mean.new_empty(4, mean.shape[0])
        library = compiled.library(mean.dtype)
        if library is None or not _alike(mean, *others):
            return Folded(_fold(self, table))
        library.fold(mean, *others, self.eps, mean.shape[0], table)
        return Folded(table)

    def affine(self) -> tuple[Tensor | None, Tensor | None]:
        """gamma and beta in the accumulating dtype."""
        gamma, beta = self.gamma, self.beta
        return (
            None if gamma is None else gamma.to(self.mean.dtype),
            None if beta is None else beta.to(self.mean.dtype),
        )


def _fold(norm: Norm, table: Tensor) -> Tensor:
    gamma, beta = norm.affine()
    inv_std = (norm.var.to(norm.mean.dtype) + norm.eps).rsqrt_()
    scale = inv_std if gamma is None else inv_std * gamma
    beta = torch.zeros_like(scale) if beta is None else beta
    return torch.stack((norm.mean, inv_std, scale, torch.addcmul(beta, norm.mean, scale, value=-1)), out=table)


class Sums:
    """Two sums a column, [2, C], in float64: each thread's apart, so that none waits for another's lines."""

    def __init__(self, x: Tensor) -> None:
        self.columns = x.shape[-1]
        self.parts = x.new_zeros(threads_for(x), _stride(self.columns), dtype=torch.float64)

    def total(self) -> Tensor:
        """[2, C]."""
        return self.parts.sum(0)[: 2 * self.columns].view(2, self.columns)

    def add(self, first: Tensor, second: Tensor) -> None:
        """Add [C] to each."""
        self.parts[0, : self.columns] += first
        self.parts[0, self.columns : 2 * self.columns] += second

    def require(self, columns: int) -> None:
        """Raises ValueError unless they are of so many columns: compiled loops are given addresses."""
        if columns != self.columns:
            raise ValueError(f"sums of {self.columns} columns do not belong to vectors of {columns}")

    @property
    def given(self) -> tuple[Tensor, int, int]:
        """As compiled loops take them: with the stride from thread to thread, and how many threads."""
        return self.parts, self.parts.shape[1], self.parts.shape[0]


def sum_bytes(x: Tensor) -> int:
    """Bytes of `Sums`."""
    return threads_for(x) * _stride(x.shape[-1]) * 8


def threads_for(x: Tensor) -> int:
    """How many threads share out the rows of x, each with sums of its own."""
    return max(1, min(torch.get_num_threads(), x.numel() // x.shape[-1] // _FEW_ROWS))


def _stride(columns: int) -> int:
    return -(-2 * columns // _LINE) * _LINE


def pivot_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The mean [C] of some of x's rows, 0 where that is not finite.

    Raises:
        ValueError: if there are no rows.
    """
    if x.shape[0] == 0:
        raise ValueError(f"statistics take at least one row, got {list(x.shape)}")
    step = -(-x.shape[0] // PIVOT_ROWS)
    library = compiled.library(x.dtype) if accumulate_dtype(x) == dtype and x.stride(1) == 1 else None
    if library is None:
        return x[::step].to(dtype).mean(0).nan_to_num_(0, 0, 0)
    pivot = x.new_empty(x.shape[1], dtype=dtype)
    library.pivot(x, x.stride(0), *x.shape, step, pivot)
    return pivot


def store_statistics(sums: Sums, pivot: Tensor, rows: int, mean: Tensor, var: Tensor) -> None:
    """Mean and biased variance [C] from the sums of x - pivot and of its squares."""
    library = compiled.library(pivot.dtype)
    if library is None or not _alike(pivot, mean, var):
        difference, squares = sums.total() / rows
        mean.copy_(difference + pivot)
        var.copy_(squares.sub_(difference.square_()).clamp_min_(0))
    else:
        sums.require(pivot.shape[0])
        library.statistics(*sums.given, rows, *pivot.shape, pivot, mean, var)


class NormGradients(NamedTuple):
    """What a norm's backward sums come to.

    Attributes:
        gamma, beta: [C].
        terms: [2, C], what the statistics' being functions of x takes from the gradient of x:
            grad_x = scale * dz - terms[0] - (x - mean) * terms[1].
    """

    gamma: Tensor
    beta: Tensor
    terms: Tensor


def norm_gradients(sums: Sums, norm: Folded, rows: int) -> NormGradients:
    """From the sums of dz and dz * (x - mean) over all rows.

    grad_x = scale * dz - scale * dbeta / M - xhat * scale * dgamma / M, with xhat = (x - mean) / std.
    """
    columns = norm.table.shape[1]
    gamma, beta, terms = (norm.table.new_empty(shape) for shape in (columns, columns, (2, columns)))
    library = compiled.library(terms.dtype)
    if library is None:
        sum_dz, sum_dz_x = sums.total()
        gamma.copy_(sum_dz_x * norm.inv_std)
        beta.copy_(sum_dz)
        torch.stack((beta, gamma * norm.inv_std), out=terms).mul_(norm.scale / rows)
    else:
        sums.require(columns)
        library.norm_gradients(*sums.given, rows, columns, norm.table, gamma, beta, terms)
    return NormGradients(gamma, beta, terms)


def _alike(*vectors: Tensor | None) -> bool:
    """Whether compiled loops take them: on a CPU, of one length and dtype, values side by side."""
    first = vectors[0]
    assert first is not None
    given = [vector for vector in vectors if vector is not None]
    same = all(vector.dtype == first.dtype and vector.shape == first.shape for vector in given)
    return same and all(vector.is_cpu and vector.is_contiguous() for vector in given)
