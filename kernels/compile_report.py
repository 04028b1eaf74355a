"""`python -m densebench.kernels.compile_report`: what the compiler makes of every kernel, without a GPU.

The launchers run on meta tensors of DenseNet's shapes; every launch is recorded, exactly as it would reach a GPU
(types, alignment, sizes that divide by 16, tile), and compiled for each target. The table says registers, spilled
bytes, shared memory, tensor-core instructions and 16-byte loads.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from densebench.counting import counted
from densebench.kernels.launch import H100, Device, compiling_for


@dataclass(frozen=True)
class Target:
    """What is compiled for: Triton's name, the device that tiles are chosen for, and the shared memory in bytes
    that a program may use (CUDA C++ Programming Guide, technical specifications; AMD CDNA 3 ISA)."""

    backend: tuple[str, int | str, int]
    device: Device
    shared_limit: int


TARGETS = {
    "sm_80": Target(("cuda", 80, 32), Device(108, (8, 0)), 166_912),  # A100
    "sm_86": Target(("cuda", 86, 32), Device(84, (8, 6)), 101_376),  # A10, RTX 30
    "sm_89": Target(("cuda", 89, 32), Device(142, (8, 9)), 101_376),  # L40S, RTX 40
    "sm_90": Target(("cuda", 90, 32), H100, 232_448),
    "sm_100": Target(("cuda", 100, 32), Device(148, (10, 0)), 232_448),  # B200
    "sm_120": Target(("cuda", 120, 32), Device(170, (12, 0)), 101_376),  # RTX 50
    "gfx942": Target(("hip", "gfx942", 64), Device(304, (9, 4), is_amd=True), 65_536),  # MI300X
}
GROWTH_RATES = (12, 32, 48)
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
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
    def name(self) -> str:
        """The operator's file and the kernel."""
        file = self.kernel.fn.__module__.rsplit(".", 1)[-1]
        suffix = self.kernel.fn.__name__.strip("_").removesuffix("kernel").strip("_")
        return f"{file}.{suffix}" if suffix else file


@dataclass(frozen=True)
class Compiled:
    """What became of a launch on a target; sizes in bytes, a program."""

    kernel: str
    target: str
    triton: str
    dtype: str
    growth_rates: tuple[int, ...]
    configuration: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    tensor_core_instructions: int
    wide_loads: int
    loads: int
    instructions: int
    narrow_offsets: bool


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m densebench.kernels.compile_report", description=__doc__)
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--growth-rates", default=",".join(map(str, GROWTH_RATES)), help="default: %(default)s")
    parser.add_argument("--dtypes", default="bfloat16,float32,float32-ieee", help="default: %(default)s")
    parser.add_argument("--kernels", default="", help="only those whose name contains this")
    parser.add_argument("--json", type=Path, help="write the table here, too")
    options = parser.parse_args(arguments)
    unknown = set(options.targets.split(",")) - set(TARGETS)
    if unknown:
        parser.error(f"unknown target {', '.join(sorted(unknown))}; known: {', '.join(TARGETS)}")
    rates = [int(rate) for rate in options.growth_rates.split(",")]
    table = []
    for compiled in compile_all(options.targets.split(","), rates, options.dtypes.split(","), options.kernels):
        print(_line(compiled), flush=True)
        table.append(compiled)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in table], indent=1) + "\n")
    spilled = [row for row in table if row.spill_bytes]
    print(f"{len(table)} compiled, {len(spilled)} of them with a spill", file=sys.stderr)
    return 0


def compile_all(
    targets: list[str], growth_rates: list[int], dtypes: list[str], containing: str = ""
) -> Iterator[Compiled]:
    """Every different launch of every operator, compiled for every target.

    Args:
        dtypes: names; products of "float32" are computed in TF32, as convolutions are by default, those of
            "float32-ieee" are not.
    """
    for target in targets:
        for dtype in dtypes:
            launches: dict[Launch, set[int]] = {}
            for rate in growth_rates:
                for launch in _recorded_in(dtype, rate, TARGETS[target].device):
                    launches.setdefault(launch, set()).add(rate)
            for launch, rates in launches.items():
                if containing in launch.name:
                    yield compile_launch(launch, target, dtype, tuple(sorted(rates)))


def _recorded_in(dtype: str, growth_rate: int, device: Device) -> list[Launch]:
    name, _, precision = dtype.partition("-")
    convolutions: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before, convolutions.fp32_precision = convolutions.fp32_precision, precision or "tf32"
    try:
        return recorded_launches(growth_rate, getattr(torch, name), device)
    finally:
        convolutions.fp32_precision = before


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
                for layer in sorted({0, 1, layers - 1}):
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

    attributes = {(index,): [["tt.divisibility", 16]] for index in launch.aligned}
    source = ASTSource(launch.kernel, dict(launch.signature), dict(launch.constants), attributes)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    if launch.registers is not None and target.startswith("sm"):
        options["maxnreg"] = launch.registers
    return triton.compile(source, target=GPUTarget(*TARGETS[target].backend), options=options)


def compile_launch(launch: Launch, target: str, dtype: str, growth_rates: tuple[int, ...]) -> Compiled:
    """Compile for a target, and count what came of it."""
    import triton

    built = compiled_kernel(launch, target)
    blocks = [f"{name.removeprefix('BLOCK_').lower()} {v}" for name, v in launch.constants if "BLOCK" in name]
    shared: dict[str, Any] = {
        "kernel": launch.name,
        "target": target,
        "triton": triton.__version__,
        "dtype": dtype,
        "growth_rates": growth_rates,
        "configuration": ", ".join([*blocks, counted(launch.warps, "warp"), counted(launch.stages, "stage")]),
        "shared_bytes": built.metadata.shared,
        "narrow_offsets": _narrow_offsets(built.asm["ttir"]),
    }
    if target.startswith("gfx"):
        return Compiled(**shared, **_amd(built.asm["amdgcn"]))
    return Compiled(**shared, **_nvidia(built.asm["ptx"], built.asm["cubin"]))


def _nvidia(ptx: str, cubin: bytes) -> dict[str, Any]:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = knobs.nvidia.cuobjdump.path
        usage = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        code = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump named no registers: {usage!r}")
    loads = re.findall(r"\b(?:ld\.global|cp\.async\.c[ag]\.shared\.global)[^;]*;", ptx)
    wide = [load for load in loads if "v4.b32" in load or ", 0x10" in load or "v8.b32" in load or "v2.b64" in load]
    return {
        "registers": int(found[1]),
        "spill_bytes": int(found[2]),
        "tensor_core_instructions": len(re.findall(r"\b(?:HGMMA|HMMA|DMMA|QGMMA|UTCHMMA|UTCOMMA|UTCMMA)", code)),
        "wide_loads": len(wide),
        "loads": len(loads),
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s", code, re.MULTILINE)),
    }


def _amd(assembly: str) -> dict[str, Any]:
    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", assembly)
        return int(found[1]) if found else 0

    loads = re.findall(r"\b(?:global|buffer)_load_\w+", assembly)
    return {
        "registers": number("vgpr_count"),
        "spill_bytes": 4 * number("vgpr_spill_count"),
        "tensor_core_instructions": len(re.findall(r"\bv_mfma_", assembly)),
        "wide_loads": sum(load.endswith("dwordx4") for load in loads),
        "loads": len(loads),
        "instructions": len(re.findall(r"^\t[vs]_|^\t(?:global|buffer|ds)_", assembly, re.MULTILINE)),
    }


def _narrow_offsets(ttir: str) -> bool:
    """Whether a row's number is multiplied by its stride in 32 bits, which a large buffer overflows unseen."""
    strides: set[str] = set()
    for line in ttir.splitlines():
        strides |= set(re.findall(r"%\w*_stride\b", line))
        copied = re.match(r"\s*(%\w+) = tt\.(?:splat|broadcast|expand_dims) (%\w+)", line)
        if copied and copied[2] in strides:
            strides.add(copied[1])
        product = re.match(r"\s*%\w+ = arith\.muli (%\w+), (%\w+).* : (\S+)", line)
        if product and strides & {product[1], product[2]} and "i32" in product[3]:
            return True
    return False


def _line(row: Compiled) -> str:
    spill = f"  SPILL {row.spill_bytes}" if row.spill_bytes else ""
    mma = f"  {row.tensor_core_instructions} mma" if row.tensor_core_instructions else ""
    rates = ",".join(map(str, row.growth_rates))
    return (
        f"{row.kernel:38} {row.target:7} {row.dtype:9} k={rates:9} {row.registers:4} registers"
        f"{row.shared_bytes:8,} B shared  {row.wide_loads}/{row.loads} wide loads{mma}{spill}"
        f"  [{row.configuration}]"
    )


if __name__ == "__main__":
    sys.exit(main())
