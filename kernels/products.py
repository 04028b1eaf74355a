"""The CPU path's products, of rows that are normalized on the way (`products.c`).

They serve where everything has the dtype that is computed in. Whatever else there is, the operators work through
tile by tile, with PyTorch's products and the passes of `passes`.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from densebench.kernels import compiled
from densebench.kernels.norm import Folded, Sums, store_statistics, threads_for
from densebench.kernels.rows import accumulate_dtype

# Forward, with fewer rows, packing the weight takes longer than is saved; backward gains with any number.
FEW_ROWS = 64
AMX_COLUMNS = 32  # of bfloat16
_DENSE = ("norm", "the norm of out", "its gradient", "terms")  # what must have no gaps


class Statistics(NamedTuple):
    """Where a product's mean and biased variance [N] go."""

    mean: Tensor
    var: Tensor


def wanted(mean: Tensor | None, var: Tensor | None, outputs: int) -> Statistics | None:
    """Where an operator's caller wants statistics; None: nowhere.

    Raises:
        ValueError: unless both are given, [N] each, or neither.
    """
    if mean is None and var is None:
        return None
    if mean is None or var is None or not mean.shape == var.shape == (outputs,):
        given = [None if vector is None else list(vector.shape) for vector in (mean, var)]
        raise ValueError(f"statistics of {outputs} channels are a mean and a variance [{outputs}], got {given}")
    return Statistics(mean, var)


def library(*matrices: Tensor | None) -> SimpleNamespace | None:
    """The compiled products, if they take these matrices: of one dtype, the values of a row side by side."""
    given = [matrix for matrix in matrices if matrix is not None]
    dtype = given[0].dtype
    if any(matrix.dtype != dtype or not rows_apart(matrix) for matrix in given):
        return None
    return compiled.library(dtype, "products")


def tile_dtype(*matrices: Tensor | None) -> torch.dtype:
    """What tiles are made and multiplied in where PyTorch's products are taken: bfloat16 where all is and this
    processor multiplies it, else the dtype that is accumulated in.

    Of whole tiles of AMX only: with other numbers of channels oneDNN reads on, and multiplies what is there by 0,
    which makes NaN of NaN (PyTorch 2.13; a row's neighbour, or fresh memory).
    """
    given = [matrix for matrix in matrices if matrix is not None]
    halves = all(matrix.dtype == torch.bfloat16 and matrix.shape[1] % AMX_COLUMNS == 0 for matrix in given)
    if halves and multiplies_halves() and compiled.library(torch.bfloat16) is not None:
        return torch.bfloat16
    return accumulate_dtype(given[0])


@functools.cache
def multiplies_halves() -> bool:
    """Whether this processor has instructions for products of bfloat16."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def rows_apart(matrix: Tensor) -> bool:
    """Whether there are values, those of a row side by side, and no two rows share one."""
    rows, columns = matrix.shape
    side_by_side = columns == 1 or matrix.stride(1) == 1
    return rows * columns > 0 and side_by_side and (rows == 1 or matrix.stride(0) >= columns)


def multiply(
    x: Tensor, norm: Folded, weight: Tensor, out: Tensor, following: Folded | None, statistics: Statistics | None
) -> None:
    """out [M, N] = relu(norm(x)) W^T of x [M, C] and weight [N, C]; with a `following` norm, relu of that of it.

    `statistics` are those of `out`.

    Raises:
        ValueError: if shapes or dtypes do not belong together.
    """
    compiled_form = library(x, weight, out)
    assert compiled_form is not None
    (rows, columns), outputs = x.shape, weight.shape[0]
    require("a product", x, {"weight": (weight, (outputs, columns)), "out": (out, (rows, outputs))})
    require("a product", x, {"norm": (norm.table, (4, columns))})
    if following is not None:
        require("a product", x, {"the norm of out": (following.table, (4, outputs))})
    threads = threads_for(x)
    scratch = x.new_empty(compiled_form.relu_norm_product_scratch(columns, outputs, threads))
    pivot, sums = (None, None) if statistics is None else (x.new_empty(outputs), Sums(out))
    compiled_form.relu_norm_product(
        x, x.stride(0), rows, columns, norm.table,
        weight, weight.stride(0), outputs,
        None if following is None else following.table, out, out.stride(0),
        pivot, *((None, 0) if sums is None else sums.given[:2]), scratch, threads,
    )  # fmt: skip
    if statistics is not None and sums is not None and pivot is not None:
        store_statistics(sums, pivot, rows, *statistics)


def multiply_backward(
    grad: Tensor,
    x: Tensor,
    norm: Folded,
    weight: Tensor,
    sums: Sums | None,
    grad_x: Tensor | None,
    accumulate: bool,
    grad_weight: Tensor | None,
) -> None:
    """From grad [M, N], that of relu(norm(x)) W^T, all but what comes from the statistics being functions of x.

    Args:
        sums: take the column sums of dz and dz * (x - mean), with dz the gradient of norm(x); None: not needed.
        grad_x: [M, C], takes scale * dz, or, with `accumulate`, adds it; None: not needed.
        grad_weight: [N, C]; None: not needed.

    Raises:
        ValueError: if shapes or dtypes do not belong together, or grad_x is wanted without sums.
    """
    compiled_form = library(grad, x, weight, grad_x)
    assert compiled_form is not None
    (rows, columns), outputs = x.shape, weight.shape[0]
    of_x, of_weight = (rows, columns), (outputs, columns)
    require("a product", x, {"grad": (grad, (rows, outputs)), "grad_x": (grad_x, of_x)})
    require("a product", x, {"weight": (weight, of_weight), "its gradient": (grad_weight, of_weight)})
    require("a product", x, {"norm": (norm.table, (4, columns))})
    threads = threads_for(x)
    if sums is not None:
        sums.require(columns)
        threads = min(threads, sums.parts.shape[0])
    elif grad_x is not None:
        raise ValueError("the gradient of x comes with sums only")
    size = compiled_form.relu_norm_product_backward_scratch(columns, outputs, grad_weight is not None, threads)
    scratch = x.new_empty(size)
    compiled_form.relu_norm_product_backward(
        grad, grad.stride(0), x, x.stride(0), rows, columns,
        norm.table, weight, weight.stride(0), outputs,
        grad_x, 0 if grad_x is None else grad_x.stride(0), accumulate,
        *((None, 0) if sums is None else sums.given[:2]), grad_weight, scratch, threads,
    )  # fmt: skip


def multiply_bytes(x: Tensor, weight: Tensor) -> int:
    """Scratch of `multiply`, without statistics' sums."""
    return _bytes(x, weight, "relu_norm_product_scratch", threads_for(x))


def multiply_backward_bytes(x: Tensor, weight: Tensor, needs_weight: bool) -> int:
    """Scratch of `multiply_backward`."""
    return _bytes(x, weight, "relu_norm_product_backward_scratch", needs_weight, threads_for(x))


def _bytes(x: Tensor, weight: Tensor, name: str, *arguments: int) -> int:
    values: int = getattr(compiled.library(x.dtype, "products"), name)(x.shape[1], weight.shape[0], *arguments)
    return values * x.element_size()


def require(what: str, x: Tensor, matrices: dict[str, tuple[Tensor | None, tuple[int, ...]]]) -> None:
    """The compiled form is given addresses: what is of another shape it would read and write beyond.

    Raises:
        ValueError: if a matrix has not the shape beside it or not x's dtype, or gaps where there may be none.
    """
    for name, (matrix, shape) in matrices.items():
        if name in _DENSE and matrix is not None and not matrix.is_contiguous():
            raise ValueError(f"{what} takes {name} without gaps, got strides {matrix.stride()}")
        if matrix is not None and (matrix.shape != shape or matrix.dtype != x.dtype):
            raise ValueError(
                f"{what} of rows {list(x.shape)} of {x.dtype} takes {name} of {list(shape)} in that dtype, "
                f"got {list(matrix.shape)} of {matrix.dtype}"
            )
