"""The compiled form of the CPU path's passes: how rows are shared out, and how it comes to be there or not."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from densebench.kernels import compiled, passes
from densebench.kernels.rows import Folded, Norm

WIDE = 40


@pytest.fixture
def library() -> None:
    if compiled.library(torch.float32) is None:
        pytest.skip(f"nothing is compiled here: {compiled.description()}")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache folder, and nothing loaded yet; what other tests load is left as it was."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiled, "_loaded", compiled._loaded.__wrapped__)
    return tmp_path / "densebench"


def drawn(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Folded]:
    """x and grad, prefixes of wider matrices, and a norm."""
    x, grad = (torch.randn(rows, WIDE, dtype=torch.float64).to(dtype)[:, :columns] for _ in range(2))
    vectors = torch.randn(4, columns, dtype=torch.float64).to(dtype).unbind()
    return x, grad, Norm(vectors[0], vectors[1].abs(), *vectors[2:], 1e-5).folded()


def every_pass(rows: int, columns: int, dtype: torch.dtype, source: Path | None) -> list[Tensor]:
    """What all passes write, from the same operands."""
    torch.manual_seed(0)
    x, grad, norm = drawn(rows, columns, dtype)
    terms = torch.randn(2, columns, dtype=torch.float64).to(dtype)
    with compiled.using(source):
        out, buffer, settled, in_place = torch.empty_like(x), grad.clone(), torch.empty_like(x), grad.clone()
        statistics, sums = passes.new_sums(x), passes.new_sums(x)
        fresh, copied = torch.empty_like(x), torch.empty(rows, WIDE, dtype=dtype)[:, :columns]
        passes.relu_norm(x, norm, out)
        passes.add_column_sums(x, norm.mean, statistics, copied)
        passes.relu_norm_backward(grad, x, norm, sums, buffer, True)
        passes.relu_norm_backward(grad, x, norm, sums, fresh, False)
        passes.relu_norm_backward(grad, x, norm, sums, None, False)
        passes.relu_norm_backward_in_place(in_place, x, norm, terms)
        without = grad.clone()
        passes.relu_norm_backward_in_place(without, x, norm, None)
        passes.settle(grad, x, norm.mean, terms, settled)
    return [out, copied, buffer, settled, in_place, without, fresh, statistics, sums]


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threads_in_use", [1, 2, 3, 7])
@pytest.mark.parametrize(("rows", "columns"), [(0, 3), (1, 1), (2, 17), (5, 16), (64, 33), (999, 40)])
def test_as_pytorch_does(
    rows: int, columns: int, threads_in_use: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with more threads than rows, none of them left out or counted twice."""
    monkeypatch.setattr(passes, "_FEW", 0)
    torch.set_num_threads(threads_in_use)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    uncompiled = every_pass(rows, columns, dtype, None) if rows else None
    for at, result in enumerate(every_pass(rows, columns, dtype, compiled.SOURCE)):
        assert bool(result.isfinite().all())
        if uncompiled is not None:
            torch.testing.assert_close(result, uncompiled[at], rtol=tolerance, atol=tolerance * max(rows, 1))


@pytest.mark.usefixtures("library")
def test_as_many_threads_the_same_bits() -> None:
    torch.set_num_threads(3)
    first = every_pass(999, 40, torch.float32, compiled.SOURCE)
    for _ in range(20):
        for again, before in zip(every_pass(999, 40, torch.float32, compiled.SOURCE), first, strict=True):
            assert torch.equal(again, before)


@pytest.mark.usefixtures("library")
def test_sums_are_float64() -> None:
    """A million values near 1,000: in float32 their sum would be off by hundreds, and their squares' by more."""
    x = torch.full((2**20, 1), 1000.1)
    sums = passes.new_sums(x)
    passes.add_column_sums(x, torch.zeros(1), sums)
    exact = x.double()
    torch.testing.assert_close(sums[0], exact.sum(0), rtol=1e-10, atol=0)
    torch.testing.assert_close(sums[1], exact.square().sum(0), rtol=1e-10, atol=0)


def test_columns_far_apart_take_the_other_form() -> None:
    """A matrix whose rows are not dense cannot be read by the compiled form; nobody has to know."""
    x, _, norm = drawn(12, 5)
    across = x.t().contiguous().t()
    torch.testing.assert_close(
        passes.relu_norm(across, norm, torch.empty(12, 5)), passes.relu_norm(x, norm, torch.empty(12, 5))
    )


@pytest.mark.usefixtures("library")
def test_compiled_once_and_kept(anew: Path) -> None:
    assert compiled.library(torch.float32) is not None
    (first,) = anew.iterdir()
    written = first.stat().st_mtime_ns
    assert compiled.library(torch.float32) is not None
    assert [path.stat().st_mtime_ns for path in anew.iterdir()] == [written]
    assert compiled.library(torch.float64) is not None
    assert len(list(anew.iterdir())) == 2


@pytest.mark.usefixtures("library")
def test_a_home_that_cannot_be_written(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    anew.parent.joinpath("a file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(anew.parent / "a file"))
    assert compiled.library(torch.float32) is not None


@pytest.mark.usefixtures("anew")
@pytest.mark.parametrize(
    ("compiler", "reason"), [("no-such-compiler", "no C compiler found"), ("false", "failed"), ("true", "failed")]
)
def test_without_a_compiler(compiler: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """None at all, one that fails, one that writes nothing: PyTorch's operators, and a reason."""
    monkeypatch.setenv("CC", compiler)
    assert compiled.library(torch.float32) is None
    assert reason in compiled.description()
    x, _, norm = drawn(12, 5)
    expected = torch.relu(x * norm.scale + norm.shift)
    torch.testing.assert_close(passes.relu_norm(x, norm, torch.empty(12, 5)), expected)


def test_switched_off() -> None:
    program = "from densebench.kernels import compiled; print(compiled.description())"
    environment = {"DENSEBENCH_COMPILED": "0", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert "DENSEBENCH_COMPILED=0" in done.stdout
