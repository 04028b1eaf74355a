"""`python -m densebench.kernels.compile_report`: what the compiler makes of every kernel, without a GPU.

Every launch of a DenseNet (see `offline`) is compiled for each target. The table says registers, spilled bytes,
shared memory, tensor-core instructions and 16-byte loads.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from densebench.counting import counted
from densebench.kernels.launch import Device
from densebench.kernels.offline import TARGETS, Launch, compiled_kernel, recorded_launches

GROWTH_RATES = (12, 32, 48)


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
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the table here, too")
    options = parser.parse_args(arguments)
    unknown = set(options.targets.split(",")) - set(TARGETS)
    if unknown:
        parser.error(f"unknown target {', '.join(sorted(unknown))}; known: {', '.join(TARGETS)}")
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: give 1 or more")
    rates = [int(rate) for rate in options.growth_rates.split(",")]
    tasks = list(tasks_of(options.targets.split(","), rates, options.dtypes.split(","), options.kernels))
    table = []
    for compiled in compile_all(tasks, options.jobs):
        print(_line(compiled), flush=True)
        table.append(compiled)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in table], indent=1) + "\n")
    spilled = [row for row in table if row.spill_bytes]
    print(f"{len(table)} compiled, {len(spilled)} of them with a spill", file=sys.stderr)
    return 0


class Task(NamedTuple):
    """A launch to compile, and whose it is."""

    launch: Launch
    target: str
    dtype: str
    growth_rates: tuple[int, ...]


def tasks_of(
    targets: list[str], growth_rates: list[int], dtypes: list[str], containing: str = ""
) -> Iterator[Task]:
    """Every different launch of every operator, for every target.

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
                    yield Task(launch, target, dtype, tuple(sorted(rates)))


_tasks: Sequence[Task] = ()


def compile_all(tasks: Sequence[Task], jobs: int = 1) -> Iterator[Compiled]:
    """What becomes of each, in their order. Processes are copies of this one: a launch cannot be sent to one."""
    global _tasks
    if jobs == 1:
        yield from (compile_launch(*task) for task in tasks)
        return
    _tasks = tasks
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        yield from pool.imap(_compile_number, range(len(tasks)))


def _compile_number(number: int) -> Compiled:
    return compile_launch(*_tasks[number])


def _recorded_in(dtype: str, growth_rate: int, device: Device) -> list[Launch]:
    name, _, precision = dtype.partition("-")
    convolutions: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before, convolutions.fp32_precision = convolutions.fp32_precision, precision or "tf32"
    try:
        return recorded_launches(growth_rate, getattr(torch, name), device)
    finally:
        convolutions.fp32_precision = before


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


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory, where spilled ones go, of a thread of an NVIDIA kernel."""
    said = _of_cubin(cubin, "--dump-resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    if found is None:
        raise RuntimeError(f"cuobjdump named no registers: {said!r}")
    return int(found[1]), int(found[2])


def _of_cubin(cubin: bytes, option: str) -> str:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _nvidia(ptx: str, cubin: bytes) -> dict[str, Any]:
    registers, spilled = resources(cubin)
    # Disassembling takes most of a second however small the kernel, as long as compiling most of them.
    code = _of_cubin(cubin, "-sass") if "mma" in ptx else ""
    loads = re.findall(r"\b(?:ld\.global|cp\.async\.c[ag]\.shared\.global)[^;]*;", ptx)
    wide = [load for load in loads if "v4.b32" in load or ", 0x10" in load or "v8.b32" in load or "v2.b64" in load]
    return {
        "registers": registers,
        "spill_bytes": spilled,
        "tensor_core_instructions": len(re.findall(r"\b(?:HGMMA|HMMA|DMMA|QGMMA|UTCHMMA|UTCOMMA|UTCMMA)", code)),
        "wide_loads": len(wide),
        "loads": len(loads),
        "instructions": _code_bytes(cubin) // 16,  # all of them are of 16 bytes since Volta
    }


def _code_bytes(cubin: bytes) -> int:
    """Of the sections of an ELF file that hold code."""
    (headers,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, of_names = struct.unpack_from("<3H", cubin, 0x3A)
    # Of each section: where its name is, type, flags, address, offset, bytes.
    sections = [struct.unpack_from("<2I4Q", cubin, headers + size * index) for index in range(count)]
    names = sections[of_names][4]
    return sum(section[5] for section in sections if cubin.startswith(b".text.", names + section[0]))


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
