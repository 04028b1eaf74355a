"""Tiles that a kernel might take on an NVIDIA GPU, and which of them fit it, by what the compiler makes of them.

Compiled in processes of their own, one a core, and without a GPU: what a search starts later is in Triton's cache.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from typing import Any

import torch

from densebench.kernels.compile_report import resources
from densebench.kernels.launch import Device
from densebench.kernels.offline import TARGETS, Launch, compiled_kernel, recorded_launches
from densebench.kernels.tiling import Tile, changing

# Of a multiprocessor from compute capability 8.0 on (CUDA C++ Programming Guide, technical specifications).
REGISTERS = 65_536
RESERVED_BYTES = 1024  # of shared memory, for each program
SPILL = 64  # bytes a thread; more is not worth timing
MOST_COMPILERS = 16  # each has a PyTorch of its own in memory
GROWTH_RATE = 32  # DenseNet-121's


@dataclass(frozen=True, order=True)
class Candidate:
    """A tile in place of the one that a kernel's file chooses; what is None stays as chosen.

    Attributes:
        values: a thread's, from which the rows follow; for kernels without products.
        programs: on a multiprocessor, where the kernel shares rows out; None: as many as fit.
    """

    warps: int
    rows: int | None = None
    columns: int | None = None
    values: int | None = None
    stages: int | None = None
    registers: int | None = None
    programs: int | None = None

    @property
    def name(self) -> str:
        """In words: "rows 64, columns 32, warps 8"."""
        given = {name: getattr(self, name) for name in _ORDER}
        return ", ".join(f"{name} {value}" for name, value in given.items() if value is not None)

    def __call__(self, chosen: Tile) -> Tile:
        columns = self.columns or chosen.columns
        rows = self.rows or chosen.rows
        if self.values is not None:
            rows = max(1, 32 * self.warps * self.values // columns)
        return Tile(
            rows, columns, chosen.outputs, self.warps, self.stages or chosen.stages, self.registers,
            self.programs or chosen.programs,
        )  # fmt: skip


Task = tuple[str, Candidate]  # of a kernel
_ORDER = ("rows", "columns", "values", "warps", "stages", "registers", "programs")


@dataclass(frozen=True)
class Space:
    """What is tried of a kernel.

    Attributes:
        operators: the cases of the kernel benchmark that it is timed in.
        sizes: values of each of a candidate's fields.
        beside: how many programs a limit of registers is to let run side by side, beside no limit.
        programs: how many share out the rows on a multiprocessor; () for as many as fit.
        applies: to which of the kernel's launches.
    """

    operators: tuple[str, ...]
    sizes: dict[str, tuple[int, ...]]
    beside: tuple[int, ...] = ()
    programs: tuple[int, ...] = ()
    applies: Callable[[Launch], bool] = lambda launch: True


def _trains(launch: Launch) -> bool:
    """The forward product's launch that takes statistics; inference chooses by itself."""
    return ("next_mean_pointer", None) in launch.constants


_PRODUCT = {"rows": (32, 64, 128), "columns": (32, 64, 128), "warps": (4, 8, 16)}
_PASS = {"values": (8, 16, 32, 64), "warps": (4, 8)}
# By priority: what a step spends its time on first.
SPACES = {
    "bn_relu_conv1x1": Space(
        ("bn_relu_conv1x1",), _PRODUCT | {"stages": (3, 4, 6)}, beside=(2, 3, 4), applies=_trains
    ),
    "bn_relu_conv1x1_backward": Space(
        ("bn_relu_conv1x1_backward",), _PRODUCT | {"stages": (2, 3, 4, 5)}, beside=(2, 3)
    ),
    "bn_relu_backward": Space(
        ("bn_relu_backward",), _PASS | {"stages": (1, 2, 3, 4)}, programs=(2, 4, 8)
    ),
    "bn_relu": Space(("bn_relu",), _PASS),
    "channel_statistics": Space(
        ("channel_statistics",), _PASS | {"stages": (1, 2, 3, 4)}, programs=(2, 4, 8)
    ),
    "deferred": Space(("settled_gradient",), _PASS),
    "bn_relu_pool": Space(("bn_relu_max_pool", "bn_relu_avg_pool"), _PASS),
    "bn_relu_pool_backward": Space(
        ("bn_relu_max_pool_backward", "bn_relu_avg_pool_backward"), _PASS, programs=(2, 4, 8)
    ),
}  # fmt: skip


def candidates(kernel: str) -> list[Candidate]:
    """All that are to be compiled, without how many programs share out the rows."""
    space = SPACES[kernel]
    found = []
    for values in itertools.product(*space.sizes.values()):
        one = Candidate(**dict(zip(space.sizes, values, strict=True)))
        limits = {None, *(_limit(one.warps, programs) for programs in space.beside)}
        found += [replace(one, registers=limit) for limit in sorted(limits, key=lambda limit: limit or 0)]
    return found


def _limit(warps: int, programs: int) -> int | None:
    """Registers a thread with which so many programs fit; None where that is too few to be of use, or no limit."""
    registers = REGISTERS // (32 * warps * programs) // 8 * 8
    return registers if 80 <= registers < 255 else None


@dataclass(frozen=True)
class Fit:
    """What a candidate takes of a multiprocessor.

    Attributes:
        beside: programs that fit side by side; 0 if none does.
        why_not: in words, if it is not worth timing.
    """

    candidate: Candidate
    registers: int
    spill_bytes: int
    shared_bytes: int
    beside: int
    why_not: str | None


def fit(kernel: str, candidate: Candidate, target: str, device: Device) -> Fit:
    """Compile what DenseNet-121 launches of a kernel in bfloat16, with a candidate's tile, for a device.

    Args:
        target: of `densebench.kernels.offline.TARGETS`.
    """
    try:
        with changing(kernel, candidate):
            launches = recorded_launches(GROWTH_RATE, torch.bfloat16, device)
        chosen = [one for one in launches if one.file == kernel and _varies(one) and SPACES[kernel].applies(one)]
        built = [compiled_kernel(one, target) for one in chosen]
        shared = max(one.metadata.shared for one in built)
        registers, spill = map(max, zip(*(resources(one.asm["cubin"]) for one in built), strict=True))
    except Exception as error:  # whatever keeps one from being compiled; the others are tried
        said = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        return _unfit(candidate, f"does not compile: {said}")
    beside = min(
        REGISTERS // (32 * candidate.warps * -(-registers // 8) * 8),
        (TARGETS[target].shared_limit + RESERVED_BYTES) // (shared + RESERVED_BYTES),
        TARGETS[target].warps // candidate.warps,
    )
    why_not = f"spills {spill} bytes a thread" if spill > SPILL else None
    if not beside:
        why_not = f"does not fit: {registers} registers a thread, {shared:,} bytes of shared memory"
    return Fit(candidate, registers, spill, shared, beside, why_not)


def _unfit(candidate: Candidate, why: str) -> Fit:
    return Fit(candidate, 0, 0, 0, 0, why)


def _varies(launch: Launch) -> bool:
    """Not one that merges what programs have found, or adds their terms up: their tile is that of the parts."""
    return "BLOCK_PARTS" not in dict(launch.constants)


def compile_all(
    tasks: Sequence[Task], target: str, device: Device, workers: int | None = None
) -> Iterator[tuple[str, Fit]]:
    """Some candidates of some kernels, as they are done, in processes that have no GPU.

    A compiler that ends its process ends the others' pool: those left are then compiled one a process.
    """
    workers = workers or max(1, min(MOST_COMPILERS, len(os.sched_getaffinity(0))) - 1)
    left = dict.fromkeys(sorted(tasks, key=_size, reverse=True))  # what takes longest is not to be last
    try:
        for task, one in _compiled(list(left), target, device, workers):
            del left[task]
            yield task[0], one
    except BrokenProcessPool:
        for task in left:
            try:
                yield from ((task[0], one) for _, one in _compiled([task], target, device, 1))
            except BrokenProcessPool:
                yield task[0], _unfit(task[1], "does not compile: the compiler ended its process")


def _compiled(tasks: Sequence[Task], target: str, device: Device, workers: int) -> Iterator[tuple[Task, Fit]]:
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(tasks)), context, initializer=_compiler)
    try:
        futures = {pool.submit(fit, *task, target, device): task for task in tasks}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:  # without those that nobody waits for any more
        pool.shutdown(wait=False, cancel_futures=True)


def _size(task: Task) -> int:
    tile = task[1](Tile(64, 64, 128))
    return tile.rows * tile.columns * tile.stages


def _compiler() -> None:
    """What a process that compiles begins with: no GPU, one thread, and an end when it is interrupted."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(1)


def to_time(kernel: str, fits: Iterable[Fit]) -> list[Candidate]:
    """Those worth timing, with as many programs as share out the rows."""
    space, found = SPACES[kernel], {}
    for one in sorted(fits, key=lambda one: one.candidate.registers or 0):
        if one.why_not is None:
            programs: Sequence[Any] = space.programs or (one.beside if space.beside else None,)
            for count in programs:
                tried = replace(one.candidate, programs=count)
                # A limit of registers that changed nothing is no other tile.
                found.setdefault((replace(tried, registers=None), one.registers, one.shared_bytes), tried)
    return sorted(found.values(), key=lambda candidate: candidate.name)
