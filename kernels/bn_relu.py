"""relu(norm(x)): the operand of the 3x3 convolution, written, used, and in backward computed again, not kept."""

from __future__ import annotations

import torch
from torch import Tensor

from densebench.kernels.device import load_norm, relu
from densebench.kernels.language import tl, triton
from densebench.kernels.launch import launch, loadable
from densebench.kernels.library import NORM, operator
from densebench.kernels.norm import Norm
from densebench.kernels.passes import pass_bytes, pass_rows, relu_norm
from densebench.kernels.rows import tile_bytes
from densebench.kernels.tiling import Tile, cdiv, choice, elementwise_tile


def reference(x: Tensor, norm: Norm) -> Tensor:
    """relu(norm(x)) [M, C]; reads x, writes as much (2 M C)."""
    gamma, beta = norm.affine()
    z = (x.to(norm.mean.dtype) - norm.mean) * (norm.var + norm.eps).rsqrt()
    z = z if gamma is None else z * gamma
    return torch.relu(z if beta is None else z + beta).to(x.dtype)


def _cpu(
    x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, out: Tensor
) -> None:
    norm = Norm(mean, var, gamma, beta, eps).folded()
    for rows in pass_rows(x, out):
        relu_norm(x[rows], norm, out[rows])


@triton.jit
def _kernel(
    x_pointer, mean_pointer, var_pointer, gamma_pointer, beta_pointer, out_pointer,
    rows, columns, width,
    x_stride, out_stride,
    eps: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    kept = column < columns
    mask = (row < rows)[:, None]
    mean, _, scale, shift = load_norm(mean_pointer, var_pointer, gamma_pointer, beta_pointer, eps, column, kept)
    wide = row.to(tl.int64)[:, None]
    x = tl.load(x_pointer + wide * x_stride + column[None, :], mask=mask & (column < width)[None, :], other=0.0)
    a = relu((x.to(mean.dtype) - mean[None, :]) * scale[None, :] + shift[None, :])
    out = out_pointer + wide * out_stride + column[None, :]
    tl.store(out, a.to(out_pointer.dtype.element_ty), mask=mask & kept[None, :])


@choice
def _tile(columns: int) -> Tile:
    """32 values a thread: there are no sums to hold."""
    return elementwise_tile(columns)


def _cuda(
    x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, out: Tensor
) -> None:
    rows, columns = x.shape
    tile = _tile(columns)
    launch(
        _kernel, (cdiv(rows, tile.rows), cdiv(columns, tile.columns)),
        (x, mean, var, gamma, beta, out), (rows, columns, loadable(x), x.stride(0), out.stride(0)),
        tile=tile, eps=eps, BLOCK_ROWS=tile.rows, BLOCK_COLUMNS=tile.columns,
    )  # fmt: skip


bn_relu = operator(
    f"bn_relu(Tensor x, {NORM}, Tensor(a!) out) -> ()",
    "out = relu(norm(x)); x and out [M, C].",
    cpu=_cpu,
    cuda=_cuda,
    fake=lambda x, out: torch._check(out.shape == x.shape),
    workspace=lambda x, out: pass_bytes(tile_bytes(x), out, operator_tiles=0),
)
