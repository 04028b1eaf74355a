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
    """As PyTorch's: NaN passes through, which `tl.maximum(z, 0)` would turn into 0."""
    return tl.where(z <= 0.0, 0.0, z)


@triton.jit
def relu_backward(grad, a):
    """The gradient passes where not a <= 0, so at NaN too."""
    return tl.where(a <= 0.0, 0.0, grad)


@triton.jit
def tile_statistics(x, mask, count):
    """Mean and sum of squared differences from it of each column, over the rows that the mask [rows, 1] keeps."""
    mean = tl.sum(tl.where(mask, x, 0.0), axis=0) / count
    difference = tl.where(mask, x - mean[None, :], 0.0)
    return mean, tl.sum(difference * difference, axis=0)


@triton.jit
def merge_statistics(count, mean, squares, more_count, more_mean, more_squares):
    """Two sets of rows as one, by Chan's formula, which never subtracts large squares from one another."""
    total = count + more_count
    delta = more_mean - mean
    share = more_count / total
    return total, mean + delta * share, squares + more_squares + delta * delta * (count * share)
