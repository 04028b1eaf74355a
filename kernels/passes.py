"""The CPU path's passes over rows.

Each has two forms. Compiled (`passes.c`), it reads and writes every operand once; made of PyTorch's operators, it
serves machines without a C compiler, and whatever the compiled form does not take. Both compute in float32
(float64 for float64), and round once: the compiled form reads and writes bfloat16 as it is, other rows of lower
precision are converted. Sums are added up in float64; PyTorch's operators round those of a tile to float32 first.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import torch
from torch import Tensor

from densebench.kernels import compiled
from densebench.kernels.norm import Folded, Sums, sum_bytes
from densebench.kernels.rows import accumulate_dtype, as_map, row_slices

FEW_VALUES = 2**14  # so many a thread does in 3 us; to wake a second one takes as long


def pass_rows(*matrices: Tensor | None) -> Iterator[slice]:
    """The rows of one pass each over matrices of one shape: a tile, or all where nothing is made on the way.

    Raises:
        ValueError: if their shapes differ; slices of them would be cut to fit.
    """
    given = [matrix for matrix in matrices if matrix is not None]
    x = given[0]
    _require_one_shape(given)
    if compiled.library(x.dtype) and all(m.dtype == x.dtype and m.stride(1) == 1 for m in given):
        yield slice(0, x.shape[0])
    else:
        yield from row_slices(x)


def relu_norm(x: Tensor, norm: Folded, out: Tensor) -> None:
    """out = relu(norm(x)) of x [R, C]; NaN passes, as it does in PyTorch. `out` may be `x`."""
    library, target = _library(x, written=out), out
    if library is None:
        target = out if out.dtype == norm.table.dtype else x.new_empty(x.shape, dtype=norm.table.dtype)
        if x.dtype != target.dtype:
            x = target.copy_(x)
        library = _library(x, written=target)
    if library is None:
        torch.addcmul(norm.shift, x, norm.scale, out=target).relu_()
    else:
        table = _dense(x, norm.table)
        library.relu_norm(*_matrix(x), *x.shape, table, *_matrix(target), _threads(x))
    if target is not out:
        out.copy_(target)


def add_column_sums(x: Tensor, pivot: Tensor, sums: Sums, out: Tensor | None = None) -> None:
    """sums += the column sums of x - pivot, and of its squares; with `out` [R, C], x is copied there."""
    wide = x if _library(x, written=None) is not None else x.to(pivot.dtype)
    stored = out if out is not None and out.dtype == x.dtype == wide.dtype else None
    library = _library(wide, written=stored)
    if library is None:
        # By PyTorch's own two passes over the tile; the sums that belong to its mean and biased variance.
        mean, var = torch.ops.aten.batch_norm_update_stats(as_map(wide - pivot), None, None, 0.0)
        mean, var = mean.double(), var.double()
        sums.add(x.shape[0] * mean, x.shape[0] * (var + mean.square()))
        stored = None
    else:
        pivot = _dense(wide, pivot)
        arguments = (*_matrix(wide), *x.shape, pivot, *sums.given[:2], *_matrix(stored))
        library.column_sums(*arguments, _threads(x, sums))
    if out is not None and stored is None:
        out.copy_(x)


def relu_norm_backward(
    grad: Tensor, x: Tensor, norm: Folded, sums: Sums, grad_x: Tensor | None, accumulate: bool
) -> None:
    """Through relu(norm(x)), but for what comes from the statistics being functions of x.

    With dz = grad where norm(x) > 0, else 0: sums += the column sums of dz and dz * (x - mean);
    grad_x = scale * dz, or, with `accumulate`, grad_x += scale * dz.
    """
    dtype, target = norm.table.dtype, grad_x
    library = _library(grad, x, written=target)
    if library is None:
        grad, x = grad.to(dtype), x.to(dtype)
        if grad_x is not None and grad_x.dtype != dtype:
            target = grad_x.to(dtype) if accumulate else torch.empty_like(x)
        library = _library(grad, x, written=target)
    if library is None:
        values, dz = _masked(grad, x, norm)
        sums.add(*_column_sums(dz, values, norm.mean))
        if target is not None:
            target.addcmul_(dz, norm.scale) if accumulate else torch.mul(dz, norm.scale, out=target)
    else:
        table = _dense(x, norm.table)
        arguments = (*_matrix(grad), *_matrix(x), *x.shape, table, *sums.given[:2], *_matrix(target))
        library.relu_norm_backward(*arguments, accumulate, _threads(x, sums))
    if grad_x is not None and target is not None and target is not grad_x:
        grad_x.copy_(target)


def relu_norm_backward_in_place(grad: Tensor, x: Tensor, norm: Folded, terms: Tensor | None) -> None:
    """grad = scale * dz - terms[0] - (x - mean) * terms[1], with dz = grad where norm(x) > 0, else 0."""
    library, target = _library(x, written=grad), grad
    if library is None:
        target, x = grad.to(norm.table.dtype), x.to(norm.table.dtype)
        library = _library(x, written=target)
    if library is None:
        values, dz = _masked(target, x, norm)
        torch.mul(dz, norm.scale, out=target)
        if terms is not None:
            target -= torch.addcmul(terms[0], torch.sub(values, norm.mean, out=dz), terms[1], out=dz)
    else:
        table, terms = _dense(x, norm.table), None if terms is None else _dense(x, terms)
        arguments = (*_matrix(target), *_matrix(x), *x.shape, table, terms)
        library.relu_norm_backward_in_place(*arguments, _threads(x))
    if target is not grad:
        grad.copy_(target)


def settle(grad: Tensor, x: Tensor, mean: Tensor, pending: Tensor, out: Tensor) -> None:
    """out = grad - pending[0] - (x - mean) * pending[1]; `out` may be `grad`."""
    library, wide, target = _library(grad, x, written=out), grad, out
    if library is None:
        wide, x = grad.to(mean.dtype), x.to(mean.dtype)
        if out.dtype != mean.dtype:
            target = wide if wide is not grad else torch.empty_like(x)
        library = _library(wide, x, written=target)
    if library is None:
        terms = torch.sub(x, mean)
        torch.sub(wide, torch.addcmul(pending[0], terms, pending[1], out=terms), out=target)
    else:
        mean, terms = _dense(x, mean), _dense(x, pending)
        arguments = (*_matrix(wide), *_matrix(x), *x.shape, mean, terms, *_matrix(target))
        library.settle(*arguments, _threads(x))
    if target is not out:
        out.copy_(target)


def pass_bytes(tile: int, *matrices: Tensor | None, operator_tiles: int) -> int:
    """Bytes that a pass over a tile allocates for the time that it takes. (Asking compiles, where nothing is yet.)

    Args:
        tile: bytes of a tile in the dtype that is computed in.
        matrices: those that are converted, where they are of lower precision.
        operator_tiles: tiles that PyTorch's operators make, where the pass is not compiled.
    """
    given = [matrix for matrix in matrices if matrix is not None]
    if compiled.library(given[0].dtype) is not None and len({matrix.dtype for matrix in given}) == 1:
        return 0
    made = operator_tiles if compiled.library(accumulate_dtype(given[0])) is None else 0
    return tile * (made + sum(matrix.dtype != accumulate_dtype(matrix) for matrix in given))


def backward_bytes(tile: int, grad: Tensor | None, x: Tensor, grad_x: Tensor | None) -> int:
    """The same for a backward pass, with its sums; PyTorch's operators take x as a dense tile, too.

    A gradient that is a tile, in the dtype that is computed in, is None.
    """
    copied = 0 if x.is_contiguous() or x.dtype != accumulate_dtype(x) else 1
    grad = x.new_empty(0, dtype=accumulate_dtype(x)) if grad is None else grad
    return pass_bytes(tile, x, grad, grad_x, operator_tiles=1 + copied) + sum_bytes(x)


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


def _require_one_shape(matrices: list[Tensor]) -> None:
    shape = matrices[0].shape
    for matrix in matrices:
        if matrix.shape != shape:
            raise ValueError(f"a pass over rows takes matrices of one shape, got {shape} and {matrix.shape}")


def _library(*read: Tensor, written: Tensor | None) -> SimpleNamespace | None:
    """The compiled form, if it takes these matrices: the values of a row side by side, written rows apart.

    Raises:
        ValueError: if their shapes differ; it would read and write beyond them.
    """
    first, given = read[0], [*read] if written is None else [*read, written]
    _require_one_shape(given)
    for matrix in given:
        if matrix.dtype != first.dtype or (matrix.stride(1) != 1 and matrix.shape[1] > 1):
            return None
    if written is not None and written.stride(0) < written.shape[1] and written.shape[0] > 1:
        return None
    return compiled.library(first.dtype)


def _dense(x: Tensor, vectors: Tensor) -> Tensor:
    """[C] or [n, C], as the compiled form takes them.

    Raises:
        ValueError: if they are not as long as x is wide, or of another dtype.
    """
    if vectors.shape[-1] != x.shape[1] or vectors.dtype != accumulate_dtype(x):
        raise ValueError(
            f"a pass over rows {list(x.shape)} takes vectors of as many channels in {accumulate_dtype(x)}, "
            f"got {list(vectors.shape)} of {vectors.dtype}"
        )
    return vectors.contiguous()


def _matrix(x: Tensor | None) -> tuple[Tensor | None, int]:
    """With its row stride."""
    return (None, 0) if x is None else (x, x.stride(0))


def _threads(x: Tensor, sums: Sums | None = None) -> int:
    """Of a pass; as many as there are sums for."""
    if x.numel() < FEW_VALUES:
        return 1
    return torch.get_num_threads() if sums is None else min(torch.get_num_threads(), sums.parts.shape[0])
