"""The CPU path's passes over rows; operators make them tile by tile, so that scratch stays in the cache.

Each has two forms. Compiled (`passes.c`), it reads and writes every operand once; made of PyTorch's operators, it
serves machines without a C compiler. Both compute in float32 (float64 for float64): rows of lower precision are
converted, and rounded once. Sums are float64.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from densebench.kernels import compiled
from densebench.kernels.rows import Folded, accumulate_dtype, as_map

_FEW = 2**14  # values for which a second thread takes longer to wake than it helps


def relu_norm(x: Tensor, norm: Folded, out: Tensor) -> Tensor:
    """out = relu(norm(x)) of x [R, C]; NaN passes, as it does in PyTorch. `out` may be `x`."""
    if not x.dtype == out.dtype == norm.mean.dtype:
        wide = out if out.dtype == norm.mean.dtype else norm.mean.new_empty(x.shape)
        relu_norm(wide.copy_(x), norm, wide)
        return out if wide is out else out.copy_(wide)
    library = _library(x, out)
    if library is None:
        return torch.addcmul(norm.shift, x, norm.scale, out=out).relu_()
    library.relu_norm(*_matrix(x), *x.shape, *_at(norm.scale, norm.shift), *_matrix(out), _threads(x))
    return out


def add_column_sums(x: Tensor, pivot: Tensor, sums: Tensor, out: Tensor | None = None) -> None:
    """sums [2, C] += the column sums of x - pivot, and of its squares; with `out` [R, C], x is copied there."""
    wide = _wide(x, pivot)
    copied = out if out is not None and out.dtype == x.dtype == wide.dtype else None
    library = _library(wide, copied)
    if library is None:
        # By PyTorch's own two passes over the tile; the sums that belong to its mean and biased variance.
        mean, var = torch.ops.aten.batch_norm_update_stats(as_map(wide - pivot), None, None, 0.0)
        mean, var = mean.to(sums.dtype), var.to(sums.dtype)
        sums += x.shape[0] * torch.stack((mean, var + mean.square()))
    else:
        written = _matrix_or_none(copied)
        _check(library.column_sums(*_matrix(wide), *x.shape, *_at(pivot, sums), *written, _threads(x)))
    if out is not None and (library is None or copied is None):
        out.copy_(x)


def new_sums(x: Tensor) -> Tensor:
    """Where `relu_norm_backward` adds: [2, C] of zeros."""
    return x.new_zeros(2, x.shape[-1], dtype=torch.float64)


def norm_gradients(sums: Tensor, norm: Folded) -> tuple[Tensor, Tensor]:
    """(dgamma, dbeta) from those sums over all rows."""
    dtype = norm.mean.dtype
    return (sums[1] * norm.inv_std).to(dtype), sums[0].to(dtype, copy=True)


def relu_norm_backward(
    grad: Tensor, x: Tensor, norm: Folded, sums: Tensor, grad_x: Tensor | None, accumulate: bool
) -> None:
    """Through relu(norm(x)), but for what comes from the statistics being functions of x.

    With dz = grad where norm(x) > 0, else 0: sums [2, C] += the column sums of dz and dz * (x - mean);
    grad_x = scale * dz, or, with `accumulate`, grad_x += scale * dz.
    """
    grad, x, target = _wide(grad, norm.mean), _wide(x, norm.mean), grad_x
    if grad_x is not None and grad_x.dtype != x.dtype:
        target = _wide(grad_x, norm.mean) if accumulate else torch.empty_like(x)
    library = _library(grad, x, target)
    if library is None:
        values, dz = _masked(grad, x, norm)
        for total, more in zip(sums, _column_sums(dz, values, norm.mean), strict=True):
            total += more
        if target is not None:
            target.addcmul_(dz, norm.scale) if accumulate else torch.mul(dz, norm.scale, out=target)
    else:
        vectors = _at(norm.mean, norm.scale, norm.shift, sums)
        arguments = (*_matrix(grad), *_matrix(x), *x.shape, *vectors, *_matrix_or_none(target), accumulate)
        _check(library.relu_norm_backward(*arguments, _threads(x)))
    if grad_x is not None and target is not None and target is not grad_x:
        grad_x.copy_(target)


def relu_norm_backward_in_place(grad: Tensor, x: Tensor, norm: Folded, terms: Tensor | None) -> None:
    """grad = scale * dz - terms[0] - (x - mean) * terms[1], with dz = grad where norm(x) > 0, else 0."""
    target, x = _wide(grad, norm.mean), _wide(x, norm.mean)
    library = _library(target, x)
    if library is None:
        values, dz = _masked(target, x, norm)
        torch.mul(dz, norm.scale, out=target)
        if terms is not None:
            target -= torch.addcmul(terms[0], torch.sub(values, norm.mean, out=dz), terms[1], out=dz)
    else:
        vectors = (*_at(norm.mean, norm.scale, norm.shift), *((None, None) if terms is None else _at(*terms)))
        library.relu_norm_backward_in_place(*_matrix(target), *_matrix(x), *x.shape, *vectors, _threads(x))
    if target is not grad:
        grad.copy_(target)


def settle(grad: Tensor, x: Tensor, mean: Tensor, pending: Tensor, out: Tensor) -> None:
    """out = grad - pending[0] - (x - mean) * pending[1]; `out` may be `grad`."""
    grad, x = _wide(grad, mean), _wide(x, mean)
    target = out if out.dtype == x.dtype else grad
    library = _library(grad, x, target)
    if library is None:
        terms = torch.sub(x, mean)
        torch.sub(grad, torch.addcmul(pending[0], terms, pending[1], out=terms), out=target)
    else:
        library.settle(*_matrix(grad), *_matrix(x), *x.shape, *_at(mean, *pending), *_matrix(target), _threads(x))
    if target is not out:
        out.copy_(target)


def pass_bytes(tile: int, x: Tensor, made: int, converted: int) -> int:
    """Bytes that a pass over a tile of x allocates for the time that it takes.

    Args:
        tile: bytes of the tile.
        made, converted: tiles made by PyTorch's operators where the pass is not compiled, and tiles converted
            where x is of lower precision.
    """
    dtype = accumulate_dtype(x)
    return tile * ((made if compiled.library(dtype) is None else 0) + (converted if x.dtype != dtype else 0))


def backward_bytes(tile: int, x: Tensor, converted: int) -> int:
    """The same for `relu_norm_backward`, which makes x dense first where it is not compiled."""
    return pass_bytes(tile, x, 1 if x.is_contiguous() or x.dtype != accumulate_dtype(x) else 2, converted)


def _masked(grad: Tensor, x: Tensor, norm: Folded) -> tuple[Tensor, Tensor]:
    """x as a dense tile, and dz."""
    values = x.contiguous()
    z = torch.addcmul(norm.shift, values, norm.scale)
    return values, torch.ops.aten.threshold_backward(grad, z, 0, grad_input=z)


def _column_sums(dz: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """The column sums of dz and dz * (x - mean), by the one pass of PyTorch's batch norm with a variance of 1."""
    wanted = [False, True, True]  # without the gradient of x: that would cost two tiles, and time
    _, sum_dz_x, sum_dz = torch.ops.aten.native_batch_norm_backward(
        as_map(dz), as_map(x), None, mean, torch.ones_like(mean), None, None, False, 0.0, wanted
    )
    return sum_dz, sum_dz_x


def _wide(x: Tensor, like: Tensor) -> Tensor:
    """In the dtype that is computed in; a copy where that is another."""
    return x.to(like.dtype)


def _library(*matrices: Tensor | None) -> ctypes.CDLL | None:
    """The compiled form, if there is one for these matrices: the values of a row must lie side by side."""
    for matrix in matrices:
        if matrix is not None and matrix.stride(1) != 1 and matrix.shape[1] > 1:
            return None
    first = matrices[0]
    return None if first is None else compiled.library(first.dtype)


def _matrix(x: Tensor) -> tuple[int, int]:
    """Address and row stride."""
    return x.data_ptr(), x.stride(0)


def _matrix_or_none(x: Tensor | None) -> tuple[int | None, int]:
    return (None, 0) if x is None else _matrix(x)


def _at(*vectors: Tensor) -> list[int]:
    return [vector.data_ptr() for vector in vectors]


def _threads(x: Tensor) -> int:
    return torch.get_num_threads() if x.numel() >= _FEW else 1


def _check(status: int) -> None:
    if status:
        raise MemoryError("a pass over rows found no memory for its sums")
