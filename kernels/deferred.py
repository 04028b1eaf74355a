"""The gradient buffer, and the terms of it that are not in it yet.

Every reader of a channel adds to its gradient scale * dz, a map, and subtracts a + (x - mean) * b, which come
from the statistics being functions of x: two numbers a channel that are known only when the reader's whole
map has been seen. All readers of a channel share its mean, so those terms are kept apart, as `pending` [2, C]:

    gradient of channel c = buffer[:, c] - pending[0, c] - (x[:, c] - mean[c]) * pending[1, c]

at all times. A backward that passes over the buffer anyway may subtract what is pending and leave its own, or
add its own to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from densebench.kernels.library import operator
from densebench.kernels.rows import Norm, tile_bytes, tiles


def reference(grad: Tensor, x: Tensor, mean: Tensor, pending: Tensor) -> Tensor:
    """The gradient that a slice of the buffer stands for; reads buffer and x, writes as much (3 M C)."""
    return (grad.to(mean.dtype) - pending[0] - (x.to(mean.dtype) - mean) * pending[1]).to(grad.dtype)


def terms_of(norm: Norm, grad_gamma: Tensor, grad_beta: Tensor, rows: int) -> Tensor:
    """A reader's two terms [2, C].

    grad_x = scale * dz - scale * dbeta / M - xhat * scale * dgamma / M, with xhat = (x - mean) / std.
    """
    scale, _ = norm.folded()
    inv_std = (norm.var + norm.eps).rsqrt()
    return torch.stack((scale * grad_beta, scale * inv_std * grad_gamma)) / rows


def settle_rows(grad: Tensor, x: Tensor, mean: Tensor, pending: Tensor) -> None:
    """Subtract what is pending from the rows of a buffer, in place (CPU)."""
    for rows, (tile,) in tiles(x, 1):
        tile.copy_(x[rows]).sub_(mean)
        torch.addcmul(pending[0], tile, pending[1], out=tile)
        grad[rows] -= tile if grad.dtype == tile.dtype else tile.to(grad.dtype)


def defer(terms: Tensor, pending: Tensor, grad: Tensor, x: Tensor, mean: Tensor) -> None:
    """Take a reader's terms into `pending` (CPU).

    A buffer of low precision is settled first: what several readers leave pending is a common mean of the
    gradient, beside which the gradient itself would round away.
    """
    if grad.dtype in (torch.float16, torch.bfloat16):
        settle_rows(grad, x, mean, pending)
        pending.copy_(terms)
    else:
        pending += terms


def _cpu(grad: Tensor, x: Tensor, mean: Tensor, pending: Tensor, out: Tensor) -> None:
    for rows, (tile,) in tiles(x, 1):
        tile.copy_(x[rows]).sub_(mean)
        torch.addcmul(pending[0], tile, pending[1], out=tile)
        out[rows] = torch.sub(grad[rows], tile, out=tile)


def _cuda(grad: Tensor, x: Tensor, mean: Tensor, pending: Tensor, out: Tensor) -> None:
    raise NotImplementedError


settled_gradient = operator(
    "settled_gradient(Tensor grad, Tensor x, Tensor mean, Tensor pending, Tensor(a!) out) -> ()",
    cpu=_cpu,
    cuda=_cuda,
    fake=lambda grad, x, mean, pending, out: torch._check(out.shape == grad.shape == x.shape),
    workspace=lambda grad, x, *_: tile_bytes(x),
)
