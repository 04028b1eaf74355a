"""The CPU path's pools of relu(norm(x)), compiled (`pools.c`): nothing of a map's size is made on the way.

They serve where everything has the dtype that is computed in. Whatever else there is, the operators work through a
few images at a time, with PyTorch's pools and the passes of `passes`.
"""

from __future__ import annotations

from types import SimpleNamespace

from torch import Tensor

from densebench.kernels import compiled
from densebench.kernels.norm import Folded, Sums, sum_bytes, threads_for
from densebench.kernels.products import require


def pooled_size(height: int, width: int, pool: str) -> tuple[int, int]:
    """Windows of a map: a stem's reach beyond an odd last line or pixel ("max"), a transition's leave it out."""
    return ((height + 1) // 2, (width + 1) // 2) if pool == "max" else (height // 2, width // 2)


def library(*maps: Tensor) -> SimpleNamespace | None:
    """The compiled pools, if they take these maps [N, H, W, C]: of one dtype, each a matrix of pixels."""
    if any(x.dtype != maps[0].dtype or _apart(x) is None for x in maps):
        return None
    return compiled.library(maps[0].dtype, "pools")


def largest(x: Tensor, norm: Folded, out: Tensor) -> None:
    """out [N, H', W', C] = the maximum of relu(norm(x)) over 3x3 windows, stride 2, padding 1; x [N, H, W, C].

    Of maps that `library` takes, as all of these.

    Raises:
        ValueError: if shapes or dtypes do not belong together.
    """
    form = _form(x, norm, {"out": (out, _pooled(x, "max"))})
    form.relu_norm_largest(*_map(x), *x.shape, norm.table, *_map(out), threads_for(x))


def mean(x: Tensor, norm: Folded, out: Tensor) -> None:
    """out [N, H // 2, W // 2, C] = the mean of relu(norm(x)) over 2x2 windows; x [N, H, W, C].

    Raises:
        ValueError: if shapes or dtypes do not belong together.
    """
    form = _form(x, norm, {"out": (out, _pooled(x, "avg"))})
    form.relu_norm_mean(*_map(x), *x.shape, norm.table, *_map(out), threads_for(x))


def largest_backward(
    grad: Tensor, x: Tensor, norm: Folded, terms: Tensor | None, sums: Sums | None, grad_x: Tensor | None
) -> None:
    """From the gradient of the maxima, with dz that of norm(x).

    Args:
        grad: [N, H', W', C].
        terms: [2, C], taken off grad_x: terms[0] + (x - mean) * terms[1].
        sums: take the sums of dz and dz * (x - mean); None: they are known.
        grad_x: [N, H, W, C], takes scale * dz; None: not yet.

    Raises:
        ValueError: if shapes or dtypes do not belong together.
    """
    form = _form(x, norm, {"grad": (grad, _pooled(x, "max")), "grad_x": (grad_x, tuple(x.shape))})
    require("a pool", x, {"terms": (terms, (2, x.shape[3]))})
    threads = _threads(x, sums)
    form.relu_norm_largest_backward(
        *_map(grad), *_map(x), *x.shape, norm.table, terms, *_given(sums, x), *_map(grad_x),
        x.new_empty(form.relu_norm_largest_backward_scratch(*x.shape[2:], threads)), threads,
    )  # fmt: skip


def mean_backward(grad: Tensor, x: Tensor, norm: Folded, sums: Sums, grad_x: Tensor) -> None:
    """From the gradient [N, H // 2, W // 2, C] of the means, with dz that of norm(x): grad_x [N, H, W, C] =
    scale * dz, and sums of dz and dz * (x - mean).

    Raises:
        ValueError: if shapes or dtypes do not belong together.
    """
    form = _form(x, norm, {"grad": (grad, _pooled(x, "avg")), "grad_x": (grad_x, tuple(x.shape))})
    outside = x.new_zeros(x.shape[3])
    form.relu_norm_mean_backward(
        *_map(grad), *_map(x), *x.shape, norm.table, *_given(sums, x), *_map(grad_x), outside, _threads(x, sums)
    )


def pool_bytes(x: Tensor) -> int:
    """What a forward pool allocates: its norm."""
    return 4 * x.shape[3] * x.element_size()


def pool_backward_bytes(x: Tensor, pool: str) -> int:
    """What a backward one does: its norm and sums, the terms made of them, and the scratch of maxima."""
    form, values = compiled.library(x.dtype, "pools"), 2 * x.shape[3]
    assert form is not None
    if pool == "max":
        values += form.relu_norm_largest_backward_scratch(*x.shape[2:], threads_for(x))
    return pool_bytes(x) + sum_bytes(x) + values * x.element_size()


def _form(x: Tensor, norm: Folded, maps: dict[str, tuple[Tensor | None, tuple[int, ...]]]) -> SimpleNamespace:
    """The compiled form, which is given addresses: what is of another shape it would read and write beyond."""
    require("a pool", x, {**maps, "norm": (norm.table, (4, x.shape[-1]))})
    form = library(x, *(given for given, _ in maps.values() if given is not None))
    if form is None:
        raise ValueError(f"compiled pools take maps [N, H, W, C] that are matrices of pixels, got {list(x.shape)}")
    return form


def _given(sums: Sums | None, x: Tensor) -> tuple[Tensor | None, int]:
    if sums is None:
        return None, 0
    sums.require(x.shape[3])
    return sums.given[:2]


def _threads(x: Tensor, sums: Sums | None) -> int:
    """As many as there are sums for."""
    return threads_for(x) if sums is None else min(threads_for(x), sums.parts.shape[0])


def _pooled(x: Tensor, pool: str) -> tuple[int, ...]:
    return (x.shape[0], *pooled_size(x.shape[1], x.shape[2], pool), x.shape[3])


def _apart(x: Tensor) -> int | None:
    """Values from a pixel to the next, the values of each side by side; None unless all are equally far apart."""
    if x.dim() != 4 or x.numel() == 0 or (x.shape[3] > 1 and x.stride(3) != 1):
        return None
    found, pixels = None, 1
    for extent in (2, 1, 0):
        if x.shape[extent] > 1:
            apart, rest = divmod(x.stride(extent), pixels)
            if rest or found not in (None, apart):
                return None
            found = apart
        pixels *= x.shape[extent]
    found = x.shape[3] if found is None else found
    return found if found >= x.shape[3] else None


def _map(x: Tensor | None) -> tuple[Tensor | None, int]:
    """With the stride of its pixels, of a map that `library` takes."""
    return (None, 0) if x is None else (x, _apart(x) or 0)
