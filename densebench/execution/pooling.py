"""norm-ReLU-pool over the rows of a stage: a stem's maximum and a transition's average, forward and backward.

The kernels pool planes. A volume is pooled plane by plane, and then through its depth: the maximum of 3x3x3 is the
maximum of three 3x3, and the first of equal values, to which the gradient goes, is the first in either order; the
average of 2x2x2 is that of two 2x2. The second step reads a quarter of the map.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from densebench.execution.pixels import Pixels
from densebench.kernels.bn_relu_pool import bn_relu_avg_pool, bn_relu_max_pool
from densebench.kernels.bn_relu_pool_backward import bn_relu_avg_pool_backward, bn_relu_max_pool_backward
from densebench.kernels.norm import Norm
from densebench.kernels.rows import accumulate_dtype

Sums = tuple[Tensor, Tensor]  # a norm's dgamma and dbeta


class Pooling(NamedTuple):
    """relu(norm(x)) pooled with stride 2, all maps being matrices of rows.

    Attributes:
        before, after: the pixels of x and of what is pooled.
    """

    before: Pixels
    after: Pixels

    @classmethod
    def stem(cls, before: Pixels) -> Pooling:
        """Maxima of three pixels a side, padded by one."""
        return cls(before, Pixels(before.images, tuple((side + 1) // 2 for side in before.size)))

    @classmethod
    def transition(cls, before: Pixels) -> Pooling:
        """Averages of two pixels a side; an odd last one is left out.

        Raises:
            RuntimeError: as PyTorch's pooling, if nothing is left.
        """
        size = tuple(side // 2 for side in before.size)
        if min(size) < 1:
            raise RuntimeError(f"maps of {'x'.join(map(str, before.size))} are too small to be pooled by two")
        return cls(before, Pixels(before.images, size))

    def largest(self, x: Tensor, norm: Norm, out: Tensor) -> None:
        """The maxima, into `out`."""
        if not self._deep:
            bn_relu_max_pool(self.before.grid(x), *norm, self.after.grid(out))
            return
        even, odd = _even_and_odd(self._largest_of_planes(x, norm))
        largest = self.after.grid(out)
        largest.copy_(even)
        for first, others in ((0, odd), (1, odd[:, : largest.shape[1] - 1])):
            if others.shape[1]:
                part = _within(largest, first, others)
                torch.maximum(part, others, out=part)

    def largest_backward(self, grad: Tensor, x: Tensor, norm: Norm, by_batch: bool) -> tuple[Tensor, Sums]:
        """From the gradient of the maxima to that of x."""
        grad_planes = self.after.grid(grad)
        if self._deep:
            grad_planes = _to_the_largest(grad_planes, self._largest_of_planes(x, norm)).flatten(0, 1)
        grad_x = x.new_empty(x.shape)  # as large as the largest map there is, so not before the planes are done
        sums = bn_relu_max_pool_backward(grad_planes, self._planes(x), *norm, by_batch, self._planes(grad_x))
        return grad_x, sums

    def mean(self, x: Tensor, norm: Norm) -> Tensor:
        """The averages, in the dtype of x."""
        pooled = x.new_empty(self.after.count, x.shape[1])
        if not self._deep:
            bn_relu_avg_pool(self.before.grid(x), *norm, self.after.grid(pooled))
            return pooled
        planes = self._between(x, accumulate_dtype(x))
        bn_relu_avg_pool(self._planes(x), *norm, planes.flatten(0, 1))
        even, odd = _even_and_odd(planes)
        self.after.grid(pooled).copy_((_within(even, 0, odd) + odd).mul_(0.5))
        return pooled

    def mean_backward(
        self, grad: Tensor, x: Tensor, norm: Norm, by_batch: bool, grad_x: Tensor, pending: Tensor
    ) -> Sums:
        """From the gradient of the averages to that of x, all of which is written, and what joins `pending`."""
        if self._deep:
            grad_planes = self._between(grad, grad.dtype)
            even, odd = _even_and_odd(grad_planes)
            torch.mul(self.after.grid(grad), 0.5, out=odd)
            _within(even, 0, odd).copy_(odd)
            if even.shape[1] > odd.shape[1]:  # an odd last plane is in no average
                even[:, -1].zero_()
        else:
            grad_planes = self.after.grid(grad)
        return bn_relu_avg_pool_backward(
            grad_planes.flatten(0, -4), self._planes(x), *norm, by_batch, self._planes(grad_x), pending
        )

    @property
    def _deep(self) -> bool:
        return len(self.before.size) == 3

    def _planes(self, rows: Tensor) -> Tensor:
        """What is to be pooled, plane by plane: [N, H, W, C], or of a volume [N D, H, W, C]."""
        return rows.view(-1, *self.before.size[-2:], rows.shape[1])

    def _between(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """An empty volume that is pooled in its planes only, [N, D, H', W', C]."""
        depth = self.before.size[0]
        return like.new_empty(self.before.images, depth, *self.after.size[1:], like.shape[1], dtype=dtype)

    def _largest_of_planes(self, x: Tensor, norm: Norm) -> Tensor:
        maxima = self._between(x, x.dtype)
        bn_relu_max_pool(self._planes(x), *norm, maxima.flatten(0, 1))
        return maxima


def _even_and_odd(planes: Tensor) -> tuple[Tensor, Tensor]:
    """The planes 0, 2, 4 ... and 1, 3, 5 ... of [N, D, ...]; of an odd depth there is one even more."""
    return planes[:, 0::2], planes[:, 1::2]


def _within(planes: Tensor, first: int, like: Tensor) -> Tensor:
    """As many planes as there are of `like`, from the first on."""
    return planes[:, first : first + like.shape[1]]


def _to_the_largest(grad: Tensor, planes: Tensor) -> Tensor:
    """The gradient of maxima over planes 2d - 1, 2d and 2d + 1, handed to the first largest of each three.

    As PyTorch's pooling does: a value takes the place of an earlier one if it is larger, or NaN.
    """
    even, odd = _even_and_odd(planes)
    made = torch.empty_like(planes, dtype=grad.dtype)
    grad_even, grad_odd = _even_and_odd(made)
    grad_even.copy_(grad)
    largest, later = even.clone(), even[:, 1:]  # which have a plane before them; empty where the depth is 2 or 1
    before = _within(odd, 0, later)
    if later.shape[1]:
        kept = _takes_over(later, before)
        largest[:, 1:] = torch.where(kept, later, before)
    if odd.shape[1]:
        taken = _takes_over(odd, _within(largest, 0, odd))
        grad_odd.copy_(_within(grad, 0, odd)).masked_fill_(~taken, 0)
        _within(grad_even, 0, odd).masked_fill_(taken, 0)
    if later.shape[1]:
        shared = grad_even[:, 1:]
        _within(grad_odd, 0, later).add_(shared.masked_fill(kept, 0))
        shared.masked_fill_(~kept, 0)
    return made


def _takes_over(value: Tensor, earlier: Tensor) -> Tensor:
    return (value > earlier).logical_or_(value.isnan())
