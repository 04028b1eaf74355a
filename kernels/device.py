"""What kernels do to a tile: the norm, the ReLU, and the merging of partial results.

Parameters of a norm are vectors over a tile's columns; gamma and beta may be None. Everything is computed in
the statistics' dtype: float32, or float64 for float64.
"""

from __future__ import annotations

from densebench.kernels.language import tl, triton


@triton.jit
def load_norm(mean_pointer, var_pointer, gamma_pointer, beta_pointer, eps, columns, mask):
    """(mean, 1 / std, scale, shift) of some columns, with norm(x) = (x - mean) * scale + shift.

    Not folded into x * scale + shift: where mean / std is 100, that has three times the error.
    """
    mean = tl.load(mean_pointer + columns, mask=mask, other=0.0)
    inv_std = tl.rsqrt(tl.load(var_pointer + columns, mask=mask, other=1.0) + eps)
    scale = inv_std
    if gamma_pointer is not None:
        scale = inv_std * tl.load(gamma_pointer + columns, mask=mask, other=0.0).to(mean.dtype)
    shift = tl.zeros_like(mean)
    if beta_pointer is not None:
        shift = tl.load(beta_pointer + columns, mask=mask, other=0.0).to(mean.dtype)
    return mean, inv_std, scale, shift


@triton.jit
def write_norm(table, mean_pointer, var_pointer, gamma_pointer, beta_pointer, eps, columns):
    """A program's own table [3, columns] of a norm: mean, scale, shift.

    For kernels that come by each column many times: there the root and what else `load_norm` does would be most of
    their instructions.
    """
    for first in range(0, columns, 1024):  # all of most networks at once: nothing else is loaded before it is done
        column = first + tl.arange(0, 1024)
        kept = column < columns
        mean, _, scale, shift = load_norm(
            mean_pointer, var_pointer, gamma_pointer, beta_pointer, eps, column, kept
        )
        tl.store(table + column, mean, mask=kept)
        tl.store(table + columns + column, scale, mask=kept)
        tl.store(table + 2 * columns + column, shift, mask=kept)
    tl.debug_barrier()


@triton.jit
def read_norm(table, columns, column, WHOLE: tl.constexpr):
    """(mean, scale, shift) of some columns; WHOLE: there are all of them."""
    if WHOLE:
        return tl.load(table + column), tl.load(table + columns + column), tl.load(table + 2 * columns + column)
    kept = column < columns
    return (
        tl.load(table + column, mask=kept, other=0.0),
        tl.load(table + columns + column, mask=kept, other=0.0),
        tl.load(table + 2 * columns + column, mask=kept, other=0.0),
    )


@triton.jit
def operand(x, PRECISION: tl.constexpr):
    """A product's operand: rounded to TF32 where it is to be taken as that.

    The tensor core would drop the 13 bits that TF32 lacks, where PyTorch's own convolutions round to nearest.
    """
    if PRECISION == "tf32" and x.dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x1000) & ~0x1FFF).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, float("nan"))  # of a NaN the sum may make -0, and dropping bits infinity
    return x


@triton.jit
def relu(z):
    """As PyTorch's: NaN passes through, which `tl.maximum` by itself would turn into 0."""
    return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def rows_of_threads(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[rows, columns] in two halves [rows / 16, 8, columns], of rows 8 apart.

    Of what NVIDIA's tensor cores have made both are in the same thread's registers: nothing moves.
    """
    return tl.split(tl.permute(tl.reshape(x, (ROWS // 16, 2, 8, COLUMNS)), (0, 2, 3, 1)))


@triton.jit
def relu_backward(grad, z):
    """The gradient passes where not z <= 0, so at NaN too; instead of z, relu(z) will do."""
    return tl.where(z <= 0.0, 0.0, grad)


@triton.jit
def count_in(x, mask, count, mean, squares):
    """Each place's mean and sum of squared differences from it, with one more value there (Welford 1962).

    Of tile after tile each thread counts its own: exchanging what they have found takes several times the
    instructions of this, and is done once, by `merge_rows`. `count` is how many values a place has had; one that
    had fewer has no more (the mask says so).
    """
    delta = tl.where(mask, x - mean, 0.0)
    # Of the first value exactly all: division is rounded as the device likes, and delta is the value itself.
    share = tl.where(count == 0, 1.0, 1.0 / (count + 1).to(mean.dtype))
    return mean + delta * share, squares + delta * (delta * (1.0 - share))


@triton.jit
def merge_rows(counts, mean, squares, total):
    """Statistics of the rows of [rows, columns] as one; counts [rows, 1], some of which may be 0."""
    at_first = tl.arange(0, counts.shape[0])[:, None] == 0
    first = tl.sum(tl.where(at_first, mean, 0.0), axis=0)  # relative to it: means may be large beside differences
    shifted = mean - first[None, :]
    shift = tl.sum(shifted * counts, axis=0) / total
    between = shifted - shift[None, :]
    return first + shift, tl.sum(squares + between * between * counts, axis=0)
