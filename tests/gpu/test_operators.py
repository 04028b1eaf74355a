"""Every operator on a GPU, against its reference in float64; on the CPU the same calls by the CPU path."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from densebench.kernels import launch as kernel_launch
from densebench.kernels.bn_relu_conv1x1 import _tile
from densebench.kernels.tiling import share
from tests.conftest import lack
from tests.gpu.operators import COLUMNS, ROWS_BEFORE, arguments_on, far_shape, solve_far, solve_on
from tests.gpu.runs import CPU, CUDA, REPEATS, repeatable
from tests.kernels.problems import PROBLEMS, Shape
from tests.kernels.test_operators import SHAPES
from tests.kernels.values import GATE, VARIANTS, relative_error

TF32_GATE = 3e-3  # ten bits of mantissa in every factor
FEW = 3  # multiprocessors
PRODUCTS = [name for name in PROBLEMS if "conv1x1" in name]
LARGE = Shape(images=4, height=28, width=28, columns=96, outputs=128, extra=160)
# What large maps take on a GPU: the product's tiles of 64 and 128 rows, of 32 and 64 channels, of 256 outputs,
# once and more than once; rows that are not aligned.
MANY_TILES = {
    "32 channels": LARGE,
    "64 channels": dataclasses.replace(LARGE, columns=128, extra=128),
    "128 rows": dataclasses.replace(LARGE, columns=192, extra=64),
    "128 rows, 32 channels": dataclasses.replace(LARGE, columns=224, extra=32),
    "256 outputs": dataclasses.replace(LARGE, outputs=192),
    "more outputs": dataclasses.replace(LARGE, outputs=300),
    "odd": dataclasses.replace(LARGE, columns=93, outputs=70, extra=8),
}


# "outputs" are for what has some.
OF_MANY_TILES = [(n, s) for n in PROBLEMS for s in MANY_TILES if n in PRODUCTS or "outputs" not in s]


@pytest.fixture
def few_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    """As few as the interpreter has. On all those of a real GPU maps this size are one tile a program, a small
    one, and loops that load ahead, update in place or merge statistics would end before their second turn."""
    found = kernel_launch._cuda_device
    monkeypatch.setattr(kernel_launch, "_cuda_device", lambda index: found(index)._replace(multiprocessors=FEW))


def _assert_solved(name: str, shape: Shape, device: torch.device, gate: float | None = None) -> None:
    problem = PROBLEMS[name](shape)
    produced = solve_on(problem, device)
    assert produced.keys() == problem.expected.keys()
    for quantity, truth in problem.expected.items():
        error = relative_error(produced[quantity], truth)
        if name == "bn_relu_conv1x1" and quantity != "out":  # differences, which should be 0, of so many channels
            product = problem.expected["out"]
            rms = 1.0 if quantity == "var" else float(product.norm()) / product.numel() ** 0.5
            error /= rms * truth.numel() ** 0.5
        assert error <= (gate or GATE[shape.dtype]), f"{name}: {quantity} is off by {error:.1e}"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_values(name: str, variant: str, device: torch.device) -> None:
    if "avg" in name and VARIANTS[variant].get("width") == 1:
        pytest.skip("a map one pixel wide has no 2x2 windows; PyTorch refuses it")
    with repeatable():
        _assert_solved(name, Shape(**VARIANTS[variant]), device)


@pytest.mark.usefixtures("few_multiprocessors")
@pytest.mark.parametrize("dtype", GATE, ids=str)
@pytest.mark.parametrize(("name", "shape"), OF_MANY_TILES)
def test_values_of_many_tiles(name: str, shape: str, dtype: torch.dtype, device: torch.device) -> None:
    with repeatable():
        _assert_solved(name, dataclasses.replace(MANY_TILES[shape], dtype=dtype), device)


def test_many_tiles_are_many() -> None:
    """With few multiprocessors, on Hopper: every tile of the product, and several of them a program."""
    taken = set()
    with kernel_launch.compiling_for(kernel_launch.Device(FEW, (9, 0))):
        for shape in MANY_TILES.values():
            x = torch.empty(shape.rows, shape.columns, dtype=torch.bfloat16, device="meta")
            tile = _tile(x, x.new_empty(shape.outputs, shape.columns))
            taken.add((tile.rows, tile.columns, tile.outputs, tile.warps))
            assert share(shape.rows, tile.rows, tile.programs * FEW).rows >= 4 * tile.rows
    tiles = {(64, 32, 128, 4), (64, 64, 128, 4), (128, 64, 128, 8), (128, 32, 128, 8), (64, 32, 256, 8)}
    assert taken == tiles


@pytest.mark.gpu
@pytest.mark.usefixtures("few_multiprocessors")
@pytest.mark.parametrize("shape", MANY_TILES)
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_in_tf32(name: str, shape: str) -> None:
    """As PyTorch's own convolutions where they are allowed to; otherwise float32 is exact (test_values)."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        _assert_solved(name, dataclasses.replace(MANY_TILES[shape], dtype=torch.float32), CUDA, TF32_GATE)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_36_opcheck(name: str, shape: str) -> None:
    problem = PROBLEMS[name](SHAPES[shape])
    arguments = [a.clone() if isinstance(a, Tensor) else a for a in arguments_on(problem, CUDA)]
    torch.library.opcheck(getattr(torch.ops.densebench, problem.operator).default, arguments)


@pytest.mark.usefixtures("few_multiprocessors")
@pytest.mark.parametrize("repeats", REPEATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_38_operators_repeat_bit_by_bit(name: str, dtype: torch.dtype, device: torch.device, repeats: int) -> None:
    shape = MANY_TILES["128 rows" if name in PRODUCTS else "32 channels"]
    problem = PROBLEMS[name](dataclasses.replace(shape, dtype=dtype))
    first = solve_on(problem, device)
    for _ in range(repeats if device.type == "cuda" else 2):
        for quantity, value in solve_on(problem, device).items():
            assert torch.equal(value, first[quantity]), quantity


# bn_relu_conv1x1 by itself also takes the statistics of its product; those of all rows are another problem.
FAR = [name for name in PROBLEMS if "statistics" not in name and name != "bn_relu_conv1x1"]


def _check_far(name: str, device: torch.device, rows_before: int) -> None:
    problem = PROBLEMS[name](far_shape())
    produced = solve_far(problem, device, rows_before)
    for quantity, truth in problem.expected.items():
        error = relative_error(produced[quantity], truth)
        assert error <= GATE[torch.float16], f"{name}: {quantity} is off by {error:.1e}"


@pytest.mark.gpu
@pytest.mark.parametrize("name", FAR)
def test_15_buffers_of_more_than_2_31_elements(name: str, pytestconfig: pytest.Config) -> None:
    _require_memory(pytestconfig, 24)
    _check_far(name, CUDA, ROWS_BEFORE)


@pytest.mark.parametrize("name", FAR)
def test_15_large_buffers_rehearsed(name: str) -> None:
    _check_far(name, CPU, rows_before=1024)


def _far_statistics(device: torch.device, rows_before: int) -> None:
    """One value in the last rows alone: mean and variance are known."""
    rows = rows_before + 64
    x = torch.zeros(rows, COLUMNS, dtype=torch.float16, device=device)
    x[-64:] = 512
    mean, var = torch.empty(2, COLUMNS, device=device).unbind()
    torch.ops.densebench.channel_statistics(x, mean, var)
    share = 64 / rows
    assert torch.allclose(mean.cpu(), torch.full((COLUMNS,), 512 * share), rtol=1e-4, atol=0)
    assert torch.allclose(var.cpu(), torch.full((COLUMNS,), 512**2 * share * (1 - share)), rtol=1e-4, atol=0)


@pytest.mark.gpu
def test_15_statistics_of_more_than_2_31_elements(pytestconfig: pytest.Config) -> None:
    _require_memory(pytestconfig, 24)
    _far_statistics(CUDA, ROWS_BEFORE)


def test_15_statistics_rehearsed() -> None:
    _far_statistics(CPU, 1024)


def _require_memory(config: pytest.Config, gigabytes: int) -> None:
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes * 1e9:
        lack(config, f"needs {gigabytes} GB of free GPU memory; {free / 1e9:.0f} GB are free")


@pytest.mark.parametrize(("required", "outcome"), [(True, pytest.fail.Exception), (False, pytest.skip.Exception)])
def test_a_lack_of_memory_is_no_skip_where_a_gpu_was_promised(
    required: bool, outcome: type[BaseException], pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (8e9, 80e9))
    monkeypatch.setattr(pytestconfig.option, "require_gpu", required)
    _require_memory(pytestconfig, 8)
    with pytest.raises(outcome, match="needs 24 GB of free GPU memory; 8 GB are free"):
        _require_memory(pytestconfig, 24)


def test_operators_leave_what_lies_beside_their_slices(device: torch.device) -> None:
    """Slices lie in wider buffers filled with NaN: afterwards everything beside them still is."""
    for name in PROBLEMS:
        problem = PROBLEMS[name](Shape(before=4, extra=9))
        arguments: list[Any] = arguments_on(problem, device)
        getattr(torch.ops.densebench, problem.operator)(*arguments)
        for argument in arguments:
            if not isinstance(argument, Tensor) or argument.dim() != 2 or argument.shape[0] == 2:
                continue  # `pending` is drawn at full width
            if argument.stride(0) > argument.shape[1]:
                whole = argument.as_strided((argument.shape[0], argument.stride(0)), (argument.stride(0), 1), 0)
                beside = torch.cat((whole[:, :4], whole[:, 4 + argument.shape[1] :]), 1)
                assert bool(beside.isnan().all()), f"{name} wrote beside its columns"
