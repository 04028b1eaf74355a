"""A kernel started past Triton's launcher is handed what Triton's launcher would have handed it.

Held against each other at a driver that runs nothing and notes what reaches it, so without a GPU, and in a process
of its own (`python -m tests.kernels.test_starting`): in this one the kernels belong to the interpreter.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from densebench.kernels import bn_relu
from densebench.kernels import launch as starting
from densebench.kernels.language import tl, triton
from densebench.kernels.launch import launch
from densebench.kernels.library import IMPLEMENTATIONS
from densebench.kernels.started import STREAM
from densebench.kernels.tiling import Tile

pytest.importorskip("triton.backends.nvidia", reason="Triton for NVIDIA is not installed")
# The cases, and how many compiled kernels Triton tells apart in each.
KERNELS = {"alignment": 3, "absent": 2, "numbers": 5, "dtypes": 3, "constants": 3, "tiles": 5, "grids": 1}
KERNELS |= {"devices": 2, "functions": 2, "bn_relu": 6}
FUNCTION = 5  # its place in what a driver is handed: launcher, grid, stream, function, metadata, ...
WATCHED = slice(7, 10)  # ... what profilers of Triton's own are told, and how, arguments
MOST = 4
TILE = Tile(1, 64)
Start = Callable[[], None]


@triton.jit
def _scale(  # type: ignore[no-untyped-def]
    x_pointer, y_pointer, out_pointer, columns, stride,
    FACTOR: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64) * stride
    x = tl.load(x_pointer + row + column, mask=column < columns, other=0.0)
    if y_pointer is not None:
        x += tl.load(y_pointer + row + column, mask=column < columns, other=0.0)
    tl.store(out_pointer + row + column, x * FACTOR, mask=column < columns)


_same_again = triton.jit(_scale.fn)


def driver_of(machine: SimpleNamespace) -> SimpleNamespace:
    """As far as Triton asks; each load of a kernel is a function of its own."""
    serial = itertools.count(1)

    def receive(*handed: Any) -> None:
        """An address is as good as what has one; what profilers are told has a `get`."""
        plain = (a.data_ptr() if hasattr(a, "data_ptr") else a.get() if hasattr(a, "get") else a for a in handed)
        machine.received.append([repr(argument) for argument in plain])

    return SimpleNamespace(
        get_current_target=lambda: triton.backends.compiler.GPUTarget("cuda", 90, 32),
        get_current_device=lambda: machine.device,
        get_current_stream=lambda device: (device, machine.stream),
        launcher_cls=lambda source, metadata: functools.partial(receive, next(serial)),
        utils=SimpleNamespace(
            get_device_properties=lambda _: {"max_shared_mem": 232_448},
            load_binary=lambda *_: (1, next(serial), 0, 0, 1024),  # module, function, registers, spills, threads
            unload_module=lambda _: None,
        ),
    )


class OnSecond(Tensor):
    """Says that it is on the second GPU."""

    device = torch.device("cuda", 1)

    def get_device(self) -> int:
        return 1


def cases(start: Callable[..., None]) -> dict[str, list[Start]]:
    """Launches that differ in one thing, with tensors of their own."""
    x, y, out = torch.ones(3, 256)
    half = x.bfloat16()

    def scale(
        x: Tensor = x, y: Tensor | None = y, numbers: tuple[int, int] = (64, 17), *, factor: float = 2.0,
        tile: Tile = TILE, grid: tuple[int, ...] = (1,), kernel: Any = _scale,
    ) -> Start:  # fmt: skip
        constants = {"BLOCK": tile.columns, "FACTOR": factor}  # in another order than the kernel's
        return functools.partial(start, kernel, grid, (x, y, out), numbers, tile=tile, **constants)

    def norm(dtype: torch.dtype = x.dtype, first: int = 0, eps: float = 1e-5, affine: bool = True) -> Start:
        a, b = torch.ones(2, 300, 48, dtype=dtype)[:, :, first : first + 16]
        vectors = [*torch.ones(4, 16)] if affine else [*torch.ones(2, 16), None, None]
        return functools.partial(IMPLEMENTATIONS["bn_relu"].cuda, a, *vectors, eps, b)

    tiles = (TILE, Tile(1, 128), Tile(1, 64, warps=8), Tile(1, 64, stages=2), Tile(1, 64, registers=128))
    return {
        "alignment": [scale(x[first:]) for first in (0, 1, 4, 2, 8)] + [scale(x, y[1:])],
        "absent": [scale(y=None), scale()],
        "numbers": [scale(x, y, (n, 17)) for n in (1, 16, 17, 18, 2**31 + 16)] + [scale(x, y, (16, 1))],
        "dtypes": [scale(), scale(half), scale(half, half)],
        "constants": [scale(factor=factor) for factor in (2.0, 3.0, 64.0)],
        "tiles": [scale(tile=tile) for tile in tiles],
        "grids": [scale(grid=grid) for grid in ((3,), (5,), (3, 2), (2, 3))],
        "devices": [scale(), scale(x.as_subclass(OnSecond))],
        "functions": [scale(), scale(kernel=_same_again)],
        "bn_relu": [norm(dtype, first) for first in (0, 3) for dtype in (x.dtype, half.dtype)]
        + [norm(eps=0.1), norm(affine=False)],
    }


def everything() -> dict[str, Any]:
    """What the driver is handed in each case, forwards and backwards, all twice; and how many kernels are kept."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    machine = SimpleNamespace(device=0, stream=0, received=[])
    triton.runtime.driver.set_active(driver_of(machine))
    noted: list[dict[str, Any]] = []

    def both(kernel: Any, grid: Any, tensors: Any, numbers: Any, *, tile: Tile, **constants: Any) -> None:
        machine.device, machine.stream = max(0, tensors[0].get_device()), machine.stream + 1
        with mock.patch.object(JITFunction, "run", autospec=True, side_effect=JITFunction.run) as run:
            launch(kernel, grid, tensors, numbers, tile=tile, **constants)
        limit = {} if tile.registers is None else {"maxnreg": tile.registers}
        kernel[grid](*tensors, *numbers, **constants, num_warps=tile.warps, num_stages=tile.stages, **limit)
        ours, tritons = machine.received
        machine.received.clear()
        noted.append({"ours": ours, "tritons": tritons, "found": not run.called, "kept": len(starting._compiled)})

    def handed(launches: list[Start]) -> list[dict[str, Any]]:
        starting._compiled.clear()
        noted.clear()
        with mock.patch.object(bn_relu, "launch", both):
            for start in launches:
                start()
        return noted[:]

    first, second = cases(both), cases(both)  # the same at other addresses
    found: dict[str, Any] = {}
    for name in KERNELS:
        found[name] = [handed(first[name][::step] + second[name][::step]) for step in (1, -1)]
    with mock.patch.object(starting, "_MOST_COMPILED", MOST):
        sizes = first["numbers"] + first["tiles"] + first["grids"]
        found["many"] = [handed([start for start in sizes for _ in range(2)])]
    starting._compiled.clear()
    with mock.patch.object(JITFunction, "run", return_value=None):
        cases(launch)["grids"][0]()
    x, y, out = torch.ones(3, 64)
    launch(InterpretedFunction(_scale.fn), (1,), (x, y, out), (64, 64), tile=TILE, FACTOR=2.0, BLOCK=64)
    uncompiled = [len(starting._compiled), out.tolist()]
    return {**found, "uncompiled": uncompiled, "launchers": [past_launcher(size) for size in (0, 8)]}


def past_launcher(scratch: int) -> dict[str, Any]:
    """What Triton's own launcher hands to its function in C, and what is handed to that past it."""
    from triton.backends.nvidia.driver import CudaLauncher

    received: list[list[str]] = []
    launcher = object.__new__(CudaLauncher)  # without what it compiles
    facts = {"gsan_enabled": False, "num_ctas": 1, "launch_cooperative_grid": False, "launch_pdl": True}
    facts |= {"global_scratch_size": scratch, "global_scratch_align": 1}
    facts |= {"profile_scratch_size": 0, "profile_scratch_align": 1}
    facts |= {"arg_annotations": ("annotations",), "kernel_signature": b"signature"}
    vars(launcher).update(facts, launch=lambda *handed: received.append([repr(one) for one in handed]))
    arguments = (3, 2, 1, STREAM, 9, (8, 1, 1024), None, None, None, 4096, None, 17, 0.5)
    start, handed = starting._without_scratch(launcher, arguments)
    if scratch == 0:
        launcher(*_streamed(arguments))
        start(*_streamed(handed))
    return {"received": received, "past": start is not launcher, "given": handed == arguments}


def _streamed(arguments: tuple[Any, ...]) -> list[Any]:
    return [77 if argument is STREAM else argument for argument in arguments]


@pytest.fixture(scope="module")
def handed(repository: Path) -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.test_starting"]
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", [*KERNELS, "many"])
def test_driver_is_handed_the_same(handed: dict[str, Any], case: str) -> None:
    for order in handed[case]:
        for one in order:
            ours, tritons = one["ours"], one["tritons"]
            if one["found"]:  # there is nobody to watch
                assert ours[WATCHED] == ["None"] * 3
                ours, tritons = (launch[: WATCHED.start] + launch[WATCHED.stop :] for launch in (ours, tritons))
            assert ours == tritons


@pytest.mark.parametrize("case", KERNELS)
def test_triton_is_not_asked_twice(handed: dict[str, Any], case: str) -> None:
    """And what it is asked differs, or that the driver is handed the same would mean little."""
    for order in handed[case]:
        assert not order[0]["found"]
        assert all(one["found"] for one in order[len(order) // 2 :])
        assert len({one["tritons"][FUNCTION] for one in order}) == KERNELS[case]


def test_not_every_size_is_kept(handed: dict[str, Any]) -> None:
    (launches,) = handed["many"]
    assert max(one["kept"] for one in launches) == MOST
    assert all(one["found"] for one in launches[1::2])


def test_past_the_launcher_the_same_is_handed_on(handed: dict[str, Any]) -> None:
    """But not where a kernel needs scratch, which the launcher allocates."""
    without, with_scratch = handed["launchers"]
    assert without["past"]
    ours, tritons = without["received"]
    assert ours == tritons
    assert "77" in ours
    assert with_scratch == {"received": [], "past": False, "given": True}


def test_what_was_not_compiled_is_not_kept(handed: dict[str, Any]) -> None:
    """A launch that was only recorded, as for the compile report, and one that was interpreted."""
    assert handed["uncompiled"] == [0, [4.0] * 64]


if __name__ == "__main__":
    print(json.dumps(everything()))
