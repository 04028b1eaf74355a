"""Bandwidth and matrix rates of some GPUs, from their makers' data sheets; dense rates, no sparsity."""

from __future__ import annotations

from dataclasses import dataclass

import torch

GB, TERA = 10**9, 10**12


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        bandwidth: bytes a second.
        half, tf32, single, double: floating-point operations a second of matrix products in bf16 or fp16 with
            float32 sums, in TF32 (PyTorch's default for float32 convolutions), in float32 and in float64.
        capability: CUDA's compute capability.
        source: where the figures stand.
    """

    name: str
    bandwidth: float
    half: float
    tf32: float
    single: float
    double: float
    capability: tuple[int, int]
    source: str

    def rate(self, dtype: torch.dtype) -> float:
        """Operations a second of convolutions and products in a dtype."""
        if dtype in (torch.float16, torch.bfloat16):
            return self.half
        return self.double if dtype == torch.float64 else max(self.tf32, self.single)


def _gpu(
    name: str,
    gb_s: float,
    half: float,
    tf32: float,
    single: float,
    double: float,
    capability: tuple[int, int],
    source: str,
) -> Gpu:
    rates = (half * TERA, tf32 * TERA, single * TERA, double * TERA)
    return Gpu(name, gb_s * GB, *rates, capability, source)


_HOPPER = (989.4, 494.7, 66.9, 66.9, (9, 0))
_TABLE = (
    # name, GB/s, TFLOP/s in 16 bits, TF32, float32, float64, capability, source
    _gpu("H200", 4800, *_HOPPER, "NVIDIA H200 data sheet (SXM)"),
    _gpu("H100", 3350, *_HOPPER, "NVIDIA H100 data sheet (SXM)"),
    _gpu("A100-80GB", 2039, 312, 156, 19.5, 19.5, (8, 0), "NVIDIA A100 data sheet (SXM, 80 GB)"),
    _gpu("A100", 1555, 312, 156, 19.5, 19.5, (8, 0), "NVIDIA A100 data sheet (40 GB)"),
    _gpu("L40S", 864, 362, 183, 91.6, 1.4, (8, 9), "NVIDIA L40S data sheet"),
    _gpu("L4", 300, 121, 60, 30.3, 0.5, (8, 9), "NVIDIA L4 data sheet"),
    _gpu("RTX4090", 1008, 165.2, 82.6, 82.6, 1.3, (8, 9), "NVIDIA Ada architecture white paper"),
    _gpu("RTX3090", 936, 71, 35.6, 35.6, 0.6, (8, 6), "NVIDIA GA102 architecture white paper"),
    _gpu("V100", 900, 125, 15.7, 15.7, 7.8, (7, 0), "NVIDIA V100 data sheet (SXM2, 32 GB)"),
    _gpu("T4", 320, 65, 8.1, 8.1, 0.25, (7, 5), "NVIDIA Turing architecture white paper"),
)


def list_gpus() -> list[str]:
    """The names that `get_gpu` knows."""
    return [gpu.name for gpu in _TABLE]


def get_gpu(name: str) -> Gpu:
    """The GPU of that name; case, spaces and dashes do not matter.

    Raises:
        ValueError: if it is not in the table; the message lists the known names.
    """
    wanted = _plain(name)
    found = next((gpu for gpu in _TABLE if _plain(gpu.name) == wanted), None)
    if found is None:
        raise ValueError(f"unknown GPU {name!r}; known: {', '.join(list_gpus())}")
    return found


def _plain(name: str) -> str:
    return name.lower().replace(" ", "").replace("-", "").replace("_", "")
