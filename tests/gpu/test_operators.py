"""Every operator on a GPU, against its reference in float64; on the CPU the same calls by the CPU path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import lack
from tests.gpu.operators import COLUMNS, ROWS_BEFORE, arguments_on, far_shape, solve_far, solve_on
from tests.gpu.runs import CPU, CUDA, REPEATS, repeatable
from tests.kernels.problems import PROBLEMS, Shape
from tests.kernels.test_operators import SHAPES
from tests.kernels.values import GATE, VARIANTS, relative_error

TF32_GATE = 3e-3  # ten bits of mantissa in every factor
PRODUCTS = [name for name in PROBLEMS if "conv1x1" in name]
LARGE = Shape(images=4, height=28, width=28, columns=96, outputs=128, extra=160)  # several tiles a program


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


@pytest.mark.parametrize("dtype", GATE)
@pytest.mark.parametrize("name", PROBLEMS)
def test_values_of_many_tiles(name: str, dtype: torch.dtype, device: torch.device) -> None:
    with repeatable():
        _assert_solved(name, _with(LARGE, dtype), device)


def _with(shape: Shape, dtype: torch.dtype) -> Shape:
    return Shape(**{**vars(shape), "dtype": dtype})


@pytest.mark.gpu
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_in_tf32(name: str) -> None:
    """As PyTorch's own convolutions where they are allowed to; otherwise float32 is exact (test_values)."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        _assert_solved(name, _with(LARGE, torch.float32), CUDA, TF32_GATE)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_36_opcheck(name: str, shape: str) -> None:
    problem = PROBLEMS[name](SHAPES[shape])
    arguments = [a.clone() if isinstance(a, Tensor) else a for a in arguments_on(problem, CUDA)]
    torch.library.opcheck(getattr(torch.ops.densebench, problem.operator).default, arguments)


@pytest.mark.parametrize("repeats", REPEATS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_38_operators_repeat_bit_by_bit(name: str, device: torch.device, repeats: int) -> None:
    problem = PROBLEMS[name](_with(LARGE, torch.float32))
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
