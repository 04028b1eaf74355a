"""`python -m densebench.measure.ceilings`: what this device can do at most, measured.

A kernel that moves bytes is held against the rate of a large copy within the device's memory, one that multiplies
against that of a large matrix product by PyTorch's own library, both in the run that times the kernel.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from densebench.measure.environment import environment
from densebench.measure.timing import Effort, Step, elapsed, time_in_turns

# A gigabyte is twenty times the largest L2 cache; 8192^3 is large enough for every tensor core to be busy.
_CUDA_COPY_BYTES, _CUDA_MATMUL_SIDE = 2**30, 8192
# On a CPU what a second allows; the copy is several times the last-level cache.
_CPU_COPY_BYTES, _CPU_MATMUL_SIDE = 2**27, 1024
# Issued to a GPU ahead of what is timed, so that the host's launches are done when the device begins.
_HEAD_START_CYCLES = 4_000_000  # about 2 ms


@dataclass(frozen=True)
class Ceilings:
    """Measured rates: bytes read plus bytes written by a copy, 2 x multiply-adds of a matrix product."""

    copy_gb_s: float
    matmul_tflops: float


@functools.cache
def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The two rates of a device, matrices in `dtype`; measured once in a process."""
    effort = Effort(rounds=20 if device.type == "cuda" else 7, seconds=2.0, least=5)
    return Ceilings(_copy_gb_s(device, effort), _matmul_tflops(device, dtype, effort))


def _copy_gb_s(device: torch.device, effort: Effort) -> float:
    size = _CUDA_COPY_BYTES if device.type == "cuda" else _CPU_COPY_BYTES
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * size / _median(lambda: target.copy_(source), device, effort) / 1e9


def _matmul_tflops(device: torch.device, dtype: torch.dtype, effort: Effort) -> float:
    side = _CUDA_MATMUL_SIDE if device.type == "cuda" else _CPU_MATMUL_SIDE
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side**3 / _median(lambda: torch.mm(a, b, out=out), device, effort) / 1e12


def device_seconds(step: Step) -> float:
    """Seconds that the current CUDA device works on one step, without the host's time of issuing it.

    The device is kept waiting until the host is through, so gaps between launches do not count; a step that
    takes the host longer than 2 ms, or waits for the device, shows as more than its kernels.
    """
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(_HEAD_START_CYCLES)
    start.record()
    step()
    end.record()
    end.synchronize()
    return elapsed(0, start.elapsed_time(end) / 1000)


def _median(step: Step, device: torch.device, effort: Effort) -> float:
    clock = device_seconds if device.type == "cuda" else None
    turns = time_in_turns({"step": step}, device, effort, clock)
    if turns.failures:
        raise turns.failures["step"]
    return statistics.median(turns.samples["step"])


def main(arguments: list[str] | None = None) -> int:
    """Print the rates of every usual dtype as JSON, with the environment they were measured in."""
    parser = argparse.ArgumentParser(prog="python -m densebench.measure.ceilings", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    parser.add_argument("--out", type=Path, help="write to this file, too")
    options = parser.parse_args(arguments)
    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; leave out --device cuda to measure the CPU")
    dtypes = ("bfloat16", "float16", "float32") if name == "cuda" else ("float32",)
    rates = {dtype: asdict(measure_ceilings(torch.device(name), getattr(torch, dtype))) for dtype in dtypes}
    text = json.dumps({"ceilings": rates, "environment": environment(name)}, indent=1)
    print(text)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
