"""Operators of the fused path, one operation a file. They know matrices and maps, and nothing of networks.

Each file holds a PyTorch reference that notes its bytes, a cache-blocked CPU path (made of `passes`, `pools`,
`products` and `convolutions`), Triton kernels, and the registration as `torch.ops.densebench.<name>`. The
convolution with its norm is there for CPUs alone, where a compiler is; nowhere else does a strategy call it.

Of all operators: a matrix [M, C] has pixels as rows and channels as columns, a map is channels-last,
[N, H, W, C]. The values of a row lie side by side (on CUDA a ValueError otherwise); rows may be the prefix of a
wider buffer's. Dtypes are float16, bfloat16, float32 and float64; vectors [C], sums and products accumulate
in float32, for float64 in float64; on CPUs sums over pixels in float64. A norm is `mean, var` (biased) [C],
`gamma, beta` [C] or None, and `eps`. `by_batch` says that mean and var are those of x itself, whose gradient
then has the two terms that come from it (Ioffe and Szegedy 2015, section 3); `pending` [2, C] are such terms
that are not in a gradient buffer yet (see `deferred`). What a schema marks with `!` is written in place;
results are (dgamma, dbeta), [C] each, and a weight's gradient.
"""

if __name__ != "densebench.kernels":  # operators can be registered once
    raise ImportError(f"import densebench.kernels, which is this folder, instead of {__name__}")
