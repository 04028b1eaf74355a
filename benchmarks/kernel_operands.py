"""What the contenders of the kernel benchmark are given."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.kernel_cases import Geometry, geometry
from benchmarks.kernel_facts import CONVOLUTIONS, POOLS, WITH_WEIGHT
from densebench.kernels import channel_statistics
from densebench.kernels.norm import Norm
from densebench.kernels.rows import accumulate_dtype
from densebench.records import Case

EPS = 1e-5
_TENSORS = ("x", "gamma", "beta", "weight", "grad", "buffer", "pending")


@dataclass(frozen=True)
class Operands:
    """An operator's operands as matrices over pixels.

    Attributes:
        x: [M, C], columns of a wider buffer.
        gamma, beta: [C]; weight: [N, C] or [N, C, 3, 3], empty where nothing is multiplied.
        grad: of the result.
        buffer: [M, C], a gradient that others have added to already; pending: [2, C], terms of it to be settled.
    """

    geometry: Geometry
    x: Tensor
    gamma: Tensor
    beta: Tensor
    weight: Tensor
    grad: Tensor
    buffer: Tensor
    pending: Tensor

    @classmethod
    def draw(cls, case: Case, seed: int = 0) -> Operands:
        """Random ones. Scales stay near one, so that an operator in place can be called again and again."""
        shape, dtype = geometry(case), getattr(torch, case.dtype)
        generator = torch.Generator(case.device).manual_seed(seed)

        def values(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=case.device).to(dtype)

        def slice_of_buffer() -> Tensor:
            return values(shape.rows, shape.buffer)[:, shape.first : shape.first + shape.columns]

        x = slice_of_buffer()
        taps = (3, 3) if case.model in CONVOLUTIONS else ()
        gamma, beta, *pending = (values(shape.columns).to(accumulate_dtype(x)) for _ in range(4))
        return cls(
            shape,
            x,
            gamma=torch.where(gamma < 0, -1.0, 1.0).to(gamma.dtype) + 0.02 * gamma.tanh(),
            beta=0.3 * beta,
            weight=values(shape.outputs, shape.columns, *taps) / (shape.columns * math.prod(taps)) ** 0.5,
            grad=values(*_result_shape(case.model, shape)),
            buffer=slice_of_buffer(),
            pending=0.1 * torch.stack(pending),
        )

    def copied(self, dtype: torch.dtype | None = None) -> Operands:
        """The same values elsewhere, buffers at their full width; in another dtype if one is given."""
        return Operands(self.geometry, *(_copied(getattr(self, name), dtype) for name in _TENSORS))

    def norm(self) -> Norm:
        """The norm of x by its own statistics."""
        mean, var = channel_statistics.reference(self.x)
        return Norm(mean, var, self.gamma, self.beta, EPS)

    def map(self, rows: Tensor) -> Tensor:
        """A matrix [M, C] (or of pooled pixels) as a dense channels-last map [N, C, H, W] of its own."""
        shape = self.geometry
        pixels = (shape.images, shape.height, shape.width) if rows.shape[0] == shape.rows else shape.pooled
        return (
            rows.reshape(*pixels, rows.shape[1]).clone(memory_format=torch.contiguous_format).permute(0, 3, 1, 2)
        )

    def grid(self, rows: Tensor) -> Tensor:
        """The same memory as [N, H, W, C]."""
        shape = self.geometry
        pixels = (shape.images, shape.height, shape.width) if rows.shape[0] == shape.rows else shape.pooled
        return rows.view(*pixels, rows.shape[1])


def _copied(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    whole = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
    whole = whole.to(dtype or tensor.dtype, copy=True)
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _result_shape(operator: str, shape: Geometry) -> tuple[int, int]:
    if operator in WITH_WEIGHT:
        return shape.rows, shape.outputs
    if operator in POOLS:
        images, height, width = shape.pooled
        return images * height * width, shape.columns
    return shape.rows, shape.columns
