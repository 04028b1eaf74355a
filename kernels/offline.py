"""Kernels compiled for GPUs that are not here: what a network launches, recorded, and the compiler's work on it.

The launchers run on meta tensors of DenseNet's shapes; every launch is recorded, exactly as it would reach a GPU
(types, alignment, sizes that divide by 16, tile).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from densebench.kernels.language import VERSION
from densebench.kernels.launch import H100, Device, compiling_for


@dataclass(frozen=True)
class Target:
    """What is compiled for: Triton's name, the device that tiles are chosen for, the shared memory in bytes that a
    program may use, and the most warps on a multiprocessor (CUDA C++ Programming Guide, technical specifications;
    AMD CDNA 3 ISA)."""

    backend: tuple[str, int | str, int]
    device: Device
    shared_limit: int
    warps: int = 64


TARGETS = {
    "sm_80": Target(("cuda", 80, 32), Device(108, (8, 0)), 166_912),  # A100
    "sm_86": Target(("cuda", 86, 32), Device(84, (8, 6)), 101_376, 48),  # A10, RTX 30
    "sm_89": Target(("cuda", 89, 32), Device(142, (8, 9)), 101_376, 48),  # L40S, RTX 40
    "sm_90": Target(("cuda", 90, 32), H100, 232_448),
    "sm_100": Target(("cuda", 100, 32), Device(148, (10, 0)), 232_448),  # B200
    "sm_120": Target(("cuda", 120, 32), Device(170, (12, 0)), 101_376, 48),  # RTX 50
    "gfx942": Target(("hip", "gfx942", 64), Device(304, (9, 4), is_amd=True), 65_536),  # MI300X
}
_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class Launch:
    """One specialization of a kernel, as Triton's launcher would make it."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    warps: int
    stages: int
    registers: int | None

    @property
    def file(self) -> str:
        """The operator's."""
        module: str = self.kernel.fn.__module__
        return module.rsplit(".", 1)[-1]

    @property
    def name(self) -> str:
        """The operator's file and the kernel."""
        suffix = self.kernel.fn.__name__.strip("_").removesuffix("kernel").strip("_")
        return f"{self.file}.{suffix}" if suffix else self.file


def recorded_launches(growth_rate: int, dtype: torch.dtype, device: Device = H100) -> list[Launch]:
    """What a training step and an inference of an ImageNet DenseNet launch at batch 64, without repetition."""
    from triton.runtime.jit import JITFunction

    found: dict[Launch, None] = {}

    def record(kernel: Any, *positional: Any, grid: Any, warmup: bool, **named: Any) -> None:
        found[_specialized(kernel, positional, named)] = None

    launched, JITFunction.run = JITFunction.run, record
    try:
        with compiling_for(device):
            for side, layers in ((56, 6), (28, 12), (14, 24), (7, 16)):
                for layer in sorted({0, 1, 4, layers - 1}):  # 4: the tile of 128 rows and 64 channels
                    _call_operators(64, side, growth_rate, layer, dtype)
    finally:
        JITFunction.run = launched
    return list(found)


def _call_operators(images: int, side: int, growth_rate: int, layer: int, dtype: torch.dtype) -> None:
    """Each operator once, on meta tensors, as the fused strategy calls it in one layer of one block."""
    from densebench.kernels import bn_relu_pool, bn_relu_pool_backward  # noqa: F401  (registration)
    from densebench.kernels.bn_relu_conv1x1_backward import bn_relu_conv1x1_backward  # noqa: F401
    from densebench.kernels.library import IMPLEMENTATIONS
    from densebench.kernels.rows import accumulate_dtype

    rows, outputs = images * side * side, 4 * growth_rate
    start = 2 * growth_rate + layer * growth_rate
    whole = -(-(start + growth_rate) // 16) * 16
    meta = torch.empty(0, dtype=dtype, device="meta")
    accumulator = accumulate_dtype(meta)

    def norm(columns: int) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
        vectors = [meta.new_empty(columns, dtype=accumulator) for _ in range(4)]
        return vectors[0], vectors[1], vectors[2], vectors[3], 1e-5

    def call(name: str, *arguments: Any) -> None:
        launcher = IMPLEMENTATIONS[name].cuda
        assert launcher is not None
        launcher(*arguments)

    features, gradient = meta.new_empty(rows, whole), meta.new_empty(rows, whole)
    pending = meta.new_empty(2, whole, dtype=accumulator)[:, :start]
    x, grad_x = features[:, :start], gradient[:, :start]
    y, weight = meta.new_empty(rows, outputs), meta.new_empty(outputs, start)
    new, wide = slice(start, start + growth_rate), norm(start)
    statistics, inner = norm(outputs)[:2], norm(outputs)
    call("bn_relu_conv1x1", x, *wide, weight, y, *statistics)
    call("bn_relu_conv1x1", x, *wide, weight, y, None, None, *inner)
    call("bn_relu", y, *inner, torch.empty_like(y))
    out = meta.new_empty(rows, growth_rate)
    call("channel_statistics", features[:, new], *norm(growth_rate)[:2])
    call("channel_statistics", out, *norm(growth_rate)[:2], features[:, new])
    whole_pending = meta.new_empty(2, whole, dtype=accumulator)
    call("settled_gradient", gradient[:, new], features[:, new], norm(growth_rate)[0], whole_pending[:, new], out)
    call("bn_relu_backward", torch.empty_like(y), y, *inner, True)
    call("bn_relu_conv1x1_backward", y, x, *wide, True, weight, grad_x, True, pending, True, True)
    call("bn_relu_backward_into", meta.new_empty(rows, start), x, *wide, True, grad_x, True, pending)
    image = features.view(images, side, side, whole)[..., :start]
    small = meta.new_empty(images, side // 2, side // 2, start)
    call("bn_relu_avg_pool", image, *wide, small)
    grad_image = gradient.view(images, side, side, whole)[..., :start]
    call("bn_relu_avg_pool_backward", small, image, *wide, True, grad_image, pending)
    stem = meta.new_empty(images, 2 * side, 2 * side, 2 * growth_rate)
    pooled = meta.new_empty(images, side, side, whole)[..., : 2 * growth_rate]
    call("bn_relu_max_pool", stem, *norm(2 * growth_rate), pooled)
    grad_pooled = meta.new_empty(images, side, side, 2 * growth_rate)
    call("bn_relu_max_pool_backward", grad_pooled, stem, *norm(2 * growth_rate), True, torch.empty_like(stem))


def _specialized(kernel: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> Launch:
    """Types, constants and alignment of a call, by the rules of Triton's launcher."""
    names = [parameter.name for parameter in kernel.params]
    values = {**dict(zip(names, positional, strict=False)), **named}
    signature, constants, aligned = [], [], []
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            constants.append((parameter.name, value))
            kind = "constexpr"
        elif isinstance(value, Tensor):
            kind = "*" + _TYPES[value.dtype]
            if value.storage_offset() * value.element_size() % 16 == 0:
                aligned.append(index)
        else:
            kind = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                aligned.append(index)
        signature.append((parameter.name, kind))
    warps, stages = named["num_warps"], named["num_stages"]
    limit = named.get("maxnreg")
    return Launch(kernel, tuple(signature), tuple(constants), tuple(aligned), warps, stages, limit)


def compiled_kernel(launch: Launch, target: str) -> Any:
    """Triton's compiled kernel of a launch, for a target; no GPU is needed."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(launch.kernel, dict(launch.signature), dict(launch.constants), _attributes(launch))
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    if launch.registers is not None and target.startswith("sm"):
        options["maxnreg"] = launch.registers
    return triton.compile(source, target=GPUTarget(*TARGETS[target].backend), options=options)


def _attributes(launch: Launch) -> dict[tuple[int], list[list[Any]]]:
    """Of the parameters, as Triton's launcher names them: then it finds in its cache what was compiled here."""
    found: dict[tuple[int], list[list[Any]]] = {}
    constants = dict(launch.constants)
    for index, (name, kind) in enumerate(launch.signature):
        if index in launch.aligned:
            found[index,] = [["tt.divisibility", 16]]
        elif kind != "constexpr" or VERSION >= (3, 7) or isinstance(constants[name], str):
            found[index,] = []  # Triton 3.6 names constants only if they are texts
    return found
