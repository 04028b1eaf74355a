"""Pooling of volumes, which is that of planes and a step through the depth, against PyTorch's own.

On small integers, where every sum is exact and nothing may differ. Many values are equal there, so the gradient of
a maximum goes to the right one only if ties are told as PyTorch tells them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from densebench.execution.pixels import Pixels
from densebench.execution.pooling import Pooling
from densebench.kernels.norm import Norm
from densebench.kernels.rows import as_rows

CHANNELS = 3
SIZES = [(6, 4, 4), (5, 7, 6), (4, 5, 3), (2, 2, 2), (3, 3, 3), (1, 5, 5)]
every_size = pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))


class Problem(NamedTuple):
    """x [N, C, D, H, W] in channels-last, and relu(x) for a norm: in evaluation, by 0 and 1."""

    x: Tensor
    norm: Norm
    pixels: Pixels

    @classmethod
    def of(cls, size: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Problem:
        generator = torch.Generator().manual_seed(sum(size))
        x = torch.randint(-3, 4, (2, CHANNELS, *size), generator=generator).to(dtype)
        statistics = torch.promote_types(dtype, torch.float32)
        norm = Norm(
            torch.zeros(CHANNELS, dtype=statistics), torch.ones(CHANNELS, dtype=statistics), None, None, 0.0
        )
        return cls(x.contiguous(memory_format=torch.channels_last_3d), norm, Pixels(2, size))

    def gradient(self, *size: int) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return 8 * torch.randint(-4, 5, (2, CHANNELS, *size), generator=generator).to(self.x.dtype)


def _largest(x: Tensor) -> Tensor:
    return F.max_pool3d(x.relu(), 3, 2, 1)


def _mean(x: Tensor) -> Tensor:
    return F.avg_pool3d(x.relu(), 2)


def _differentiated(pooled: Tensor, x: Tensor, grad: Tensor) -> Tensor:
    return torch.autograd.grad(pooled, x, grad)[0]


def _largest_both_ways(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """The maxima, a gradient of them, and that of x; into the first columns of wider memory."""
    pooling, x = Pooling.stem(problem.pixels), as_rows(problem.x)
    wide = x.new_full((pooling.after.count, CHANNELS + 2), math.pi)
    pooling.largest(x, problem.norm, wide[:, :CHANNELS])
    assert torch.all(wide[:, CHANNELS:] == math.pi)
    grad = problem.gradient(*pooling.after.size)
    grad_x, _ = pooling.largest_backward(as_rows(grad), x, problem.norm, False)
    return pooling.after.map(wide[:, :CHANNELS]), grad, problem.pixels.map(grad_x)


@every_size
def test_maximum(size: tuple[int, ...]) -> None:
    problem = Problem.of(size)
    pooled, grad, grad_x = _largest_both_ways(problem)
    x = problem.x.clone().requires_grad_()
    expected = _largest(x)
    assert torch.equal(pooled, expected)
    assert torch.equal(grad_x, _differentiated(expected, x, grad))


def test_maximum_with_nan_and_infinity() -> None:
    """NaN wins over everything, the last of several; what it is given passes the ReLU, as in PyTorch."""
    problem = Problem.of((6, 4, 4))
    problem.x[0, 0, 1:3, 1, 1], problem.x[1, 1, 3, 2, 2], problem.x[0, 2, 4:, 0, 0] = math.nan, math.nan, math.inf
    pooled, grad, grad_x = _largest_both_ways(problem)
    x = problem.x.clone().requires_grad_()
    expected = _largest(x)
    assert torch.equal(pooled.nan_to_num(nan=-1), expected.nan_to_num(nan=-1))
    assert torch.equal(grad_x, _differentiated(expected, x, grad))


@every_size
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_mean(size: tuple[int, ...], dtype: torch.dtype) -> None:
    problem = Problem.of(size, dtype)
    if min(size) < 2:
        with pytest.raises(RuntimeError, match="maps of 1x5x5 are too small to be pooled"):
            Pooling.transition(problem.pixels)
        return
    pooling, x = Pooling.transition(problem.pixels), as_rows(problem.x)
    theirs = problem.x.double().clone().requires_grad_()
    expected = _mean(theirs)
    pooled = pooling.mean(x, problem.norm)
    assert pooled.dtype == dtype
    assert torch.equal(pooling.after.map(pooled).double(), expected)
    grad = problem.gradient(*pooling.after.size)
    wide, pending = x.new_full((x.shape[0], CHANNELS + 2), math.pi), problem.norm.mean.new_zeros(2, CHANNELS)
    pooling.mean_backward(as_rows(grad), x, problem.norm, False, wide[:, :CHANNELS], pending)
    assert torch.all(wide[:, CHANNELS:] == wide.new_tensor(math.pi))
    grad_x = problem.pixels.map(wide[:, :CHANNELS])
    assert torch.equal(grad_x.double(), _differentiated(expected, theirs, grad.double()))
    assert not pending.any()


@every_size
def test_statistics_take_part_in_the_gradient(size: tuple[int, ...]) -> None:
    """The norm's own gradients are sums over the whole volume, not over its planes."""
    problem, generator = Problem.of(size), torch.Generator().manual_seed(2)
    x = (problem.x + torch.rand(problem.x.shape, generator=generator)).requires_grad_()
    gamma = torch.tensor([0.5, -1.5, 2.0], dtype=x.dtype, requires_grad=True)
    beta = torch.tensor([0.1, 0.2, -0.3], dtype=x.dtype, requires_grad=True)
    expected = _largest(F.batch_norm(x, None, None, gamma, beta, training=True, eps=0.1))
    grad = problem.gradient(*expected.shape[2:])
    rows, pooling = as_rows(x.detach()), Pooling.stem(problem.pixels)
    norm = Norm(rows.mean(0), rows.var(0, unbiased=False), gamma.detach(), beta.detach(), 0.1)
    grad_x, sums = pooling.largest_backward(as_rows(grad), rows, norm, True)
    found = (problem.pixels.map(grad_x), *sums)
    for ours, theirs in zip(found, torch.autograd.grad(expected, (x, gamma, beta), grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
