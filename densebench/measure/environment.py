"""Where a number was measured: hardware, versions, switches, and the project's own commit."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from densebench.counting import counted
from densebench.kernels import compiled
from densebench.measure.nvml import Nvml
from densebench.replay import tracks
from densebench.source_code import benchmark_files, hash_of, package_files

_PACKAGES = ("densebench", "torch", "triton", "numpy", "torchvision", "timm", "monai", "pytest-benchmark")

_PROCESSORS = Path("/proc/cpuinfo")
_ALLOCATOR = re.compile("ALLOC_CONF|^MALLOC_|^THP_MEM_ALLOC_ENABLE$")
_COMPILERS = re.compile("^TRITON_(?!CACHE|HOME|.*(DUMP|PRINT))|^TORCHINDUCTOR_(?!CACHE)")


@functools.cache
def environment(device_type: str) -> dict[str, Any]:
    """Everything that a reader needs to judge or repeat a measurement on this machine; JSON types only."""
    device = torch.device(device_type)
    facts: dict[str, Any] = {
        "device": device_name(device),
        "python": platform.python_version(),
        "os": platform.platform(),
        "cpu": _processor(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "packages": _packages(),
        "torch_git": torch.version.git_version,
        "cuda": torch.version.cuda,
        "flags": _flags(),
        "cpu_kernels": compiled.description() if device.type == "cpu" else None,
        "why_not_compiled": compiled.reason() if device.type == "cpu" else None,
        "allocator": {k: v for k, v in os.environ.items() if _ALLOCATOR.search(k)},
        "compilers": {k: v for k, v in sorted(os.environ.items()) if _COMPILERS.search(k)} or None,
        "assembler": _assembler() if device.type == "cuda" else None,
        "commit": _git("rev-parse", "HEAD"),
        "source": hash_of(package_files() | benchmark_files()),  # so that changes not committed tell, too
        "dirty": _dirty(),
        "argv": sys.argv,
    }
    if device.type == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(device)
        facts["gpu"] = {
            "name": properties.name,
            "uuid": str(properties.uuid),
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "cudnn": torch.backends.cudnn.version(),
            **{key: value for key, value in Nvml(device).describe().items() if value is not None},
        }
    return facts


def device_name(device: torch.device) -> str:
    """The name to show: that of the GPU, or of the processor and its threads in use."""
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return "no CUDA device"
        return torch.cuda.get_device_name(device)
    return f"{_processor()} ({counted(torch.get_num_threads(), 'thread')})"


def _flags() -> dict[str, Any]:
    return {
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
        "matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "replays": tracks.enabled(),
    }


def _packages() -> dict[str, str]:
    versions = {name: version for name in _PACKAGES if (version := _version(name))}
    return versions | {"torch": torch.__version__}  # with what it was built for, which a wheel may not name


def _assembler() -> str | None:
    """The version of the ptxas that Triton's kernels are made with: TRITON_PTXAS_PATH may name another one."""
    with contextlib.suppress(Exception):  # no Triton, or none for NVIDIA
        from triton import knobs

        return f"ptxas {knobs.nvidia.ptxas.version}"
    return None


def _dirty() -> bool | None:
    """Whether tracked files differ from the commit; None where git does not say."""
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return None if changes is None else bool(changes)


def _processor() -> str:
    """Name and generation: on rented machines several are called `AMD EPYC` alike."""
    try:
        lines = _PROCESSORS.read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    said = [line.split(":", 1) for line in lines if ":" in line]
    facts = {key.strip(): value.strip() for key, value in reversed(said)}  # of the first processor
    name = facts.get("model name", "unknown CPU")
    if {"cpu family", "model"} <= facts.keys():
        name += f", family {facts['cpu family']} model {facts['model']}"
    return name


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """What git says of the folder this package lies in; None outside a checkout or without git."""
    folder = Path(__file__).resolve().parents[2]
    try:
        done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
