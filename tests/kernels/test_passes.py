"""The compiled form of the CPU path's passes: how rows are shared out, and how it comes to be there or not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from densebench import cache_folder
from densebench.kernels import compiled, passes
from densebench.kernels.bn_relu import bn_relu
from densebench.kernels.bn_relu_backward import bn_relu_backward, bn_relu_backward_into
from densebench.kernels.channel_statistics import channel_statistics
from densebench.kernels.deferred import settled_gradient
from densebench.kernels.norm import Folded, Norm, norm_gradients, store_statistics
from densebench.kernels.rows import accumulate_dtype
from densebench.prediction import cache

WIDE = 40


@pytest.fixture
def library() -> None:
    if compiled.library(torch.float32) is None:
        pytest.skip(f"nothing is compiled here: {compiled.description()}")


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache folder, and nothing loaded yet; what other tests load is left as it was."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiled, "_built", compiled._built.__wrapped__)
    return tmp_path / "densebench"


def drawn(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Folded]:
    """x and grad, prefixes of wider matrices, and a norm."""
    x, grad = (torch.randn(rows, WIDE, dtype=torch.float64).to(dtype)[:, :columns] for _ in range(2))
    vectors = torch.randn(4, columns, dtype=torch.float64).to(accumulate_dtype(x)).unbind()
    return x, grad, Norm(vectors[0], vectors[1].abs(), *vectors[2:], 1e-5).folded()


def every_pass(rows: int, columns: int, dtype: torch.dtype, folder: Path | None) -> list[Tensor]:
    """What all passes write, from the same operands."""
    torch.manual_seed(0)
    x, grad, norm = drawn(rows, columns, dtype)
    terms = torch.randn(2, columns, dtype=torch.float64).to(accumulate_dtype(x))
    with compiled.using(folder):
        out, buffer, settled, in_place = torch.empty_like(x), grad.clone(), torch.empty_like(x), grad.clone()
        statistics, sums = passes.Sums(x), passes.Sums(x)
        mean, var = torch.zeros(2, columns, dtype=accumulate_dtype(x))
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
        gradients = norm_gradients(sums, norm, max(rows, 1))
        store_statistics(statistics, norm.mean.contiguous(), max(rows, 1), mean, var)
    made = [out, copied, buffer, settled, in_place, without, fresh, mean, var, *gradients]
    return [*made, statistics.total(), sums.total()]


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("threads_in_use", [1, 2, 3, 7])
@pytest.mark.parametrize(("rows", "columns"), [(0, 3), (1, 1), (2, 17), (5, 16), (64, 33), (999, 40)])
def test_as_pytorch_does(
    rows: int, columns: int, threads_in_use: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with more threads than rows, none of them left out or counted twice."""
    monkeypatch.setattr(passes, "FEW_VALUES", 0)
    torch.set_num_threads(threads_in_use)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-2}[dtype]
    uncompiled = every_pass(rows, columns, dtype, None) if rows else None
    for at, result in enumerate(every_pass(rows, columns, dtype, compiled.FOLDER)):
        assert bool(result.isfinite().all())
        if uncompiled is not None:
            torch.testing.assert_close(result, uncompiled[at], rtol=tolerance, atol=tolerance * max(rows, 1))


@pytest.mark.usefixtures("library")
def test_as_many_threads_the_same_bits() -> None:
    torch.set_num_threads(3)
    first = every_pass(999, 40, torch.float32, compiled.FOLDER)
    for _ in range(20):
        for again, before in zip(every_pass(999, 40, torch.float32, compiled.FOLDER), first, strict=True):
            assert torch.equal(again, before)


@pytest.mark.usefixtures("library")
def test_bfloat16_is_rounded_as_by_pytorch() -> None:
    """All that there are, less numbers that make ties, round up and down, and overflow."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    grad = bits.view(torch.bfloat16)[:, None].repeat(1, 7)
    x, mean = torch.zeros_like(grad), torch.zeros(7)
    constant = torch.tensor([0.0, 2.0**-9, -3 * 2.0**-9, 0.1, 1e-41, 1e38, -1e38])
    out = torch.full_like(grad, 7.0)
    passes.settle(grad, x, mean, torch.stack((constant, mean)), out)
    torch.testing.assert_close(out, (grad.float() - constant).bfloat16(), rtol=0, atol=0, equal_nan=True)
    assert out.isnan().sum() == grad.isnan().sum() > 0


@pytest.mark.usefixtures("library")
def test_sums_are_float64() -> None:
    """A million values near 1,000: in float32 their sum would be off by hundreds, and their squares' by more."""
    x = torch.full((2**20, 1), 1000.1)
    sums = passes.Sums(x)
    passes.add_column_sums(x, torch.zeros(1), sums)
    exact = x.double()
    torch.testing.assert_close(sums.total()[0], exact.sum(0), rtol=1e-10, atol=0)
    torch.testing.assert_close(sums.total()[1], exact.square().sum(0), rtol=1e-10, atol=0)


def test_columns_far_apart_take_the_other_form() -> None:
    """A matrix whose rows are not dense cannot be read by the compiled form; nobody has to know."""
    x, _, norm = drawn(12, 5)
    across = x.t().contiguous().t()
    first, second = torch.empty(2, 12, 5)
    passes.relu_norm(across, norm, first)
    passes.relu_norm(x, norm, second)
    torch.testing.assert_close(first, second)


def test_shapes_and_dtypes_that_would_be_read_beyond() -> None:
    """The compiled form is given addresses: it must refuse what PyTorch's operators would have refused."""
    x, grad, norm = drawn(12, 5)
    for wrong in (torch.empty(12, 4), torch.empty(11, 5)):
        with pytest.raises(ValueError, match="one shape"):
            passes.relu_norm(x, norm, wrong)
        with pytest.raises(ValueError, match="one shape"):
            passes.settle(grad, wrong, norm.mean, torch.zeros(2, 5), torch.empty(12, 5))
    if compiled.library(torch.float32) is not None:
        for table in (norm.table[:, :4], norm.table.double()):
            with pytest.raises(ValueError, match="as many channels"):
                passes.relu_norm_backward_in_place(grad, x, norm, table[:2])
        with pytest.raises(ValueError, match="as many channels"):
            passes.relu_norm(x, Folded(norm.table[:, :4]), torch.empty(12, 5))


@pytest.mark.parametrize("folder", [compiled.FOLDER, None], ids=["compiled", "uncompiled"])
def test_matrices_that_do_not_belong_together(folder: Path | None) -> None:
    """Slices of them would be cut to fit, and rows left as they were."""
    x, grad, _ = drawn(12, 5)
    short, vectors, pending = grad[:7].clone(), torch.ones(4, 5), torch.zeros(2, 5)
    with compiled.using(folder):
        with pytest.raises(ValueError, match="one shape"):
            bn_relu_backward(short, x, *vectors, 0.0, True)
        with pytest.raises(ValueError, match="one shape"):
            bn_relu_backward_into(short, x, *vectors, 0.0, True, torch.empty(12, 5), False, pending)
        with pytest.raises(ValueError, match="one shape"):
            settled_gradient(short, x, vectors[0], pending, torch.empty(12, 5))
        with pytest.raises(ValueError, match="at least one row"):
            channel_statistics(torch.empty(0, 5), vectors[0], vectors[1])


@pytest.mark.usefixtures("library")
def test_sums_of_another_width_are_refused() -> None:
    x, _, norm = drawn(12, 5)
    sums, pivot = passes.Sums(x[:, :4]), torch.zeros(5)
    with pytest.raises(ValueError, match="4 columns"):
        norm_gradients(sums, norm, 12)
    with pytest.raises(ValueError, match="4 columns"):
        store_statistics(sums, pivot, 12, torch.empty(5), torch.empty(5))


def test_vectors_may_lie_apart() -> None:
    x, grad, norm = drawn(12, 5)
    pairs, pending = torch.stack((norm.mean, norm.scale), 1), torch.randn(5, 2).t()
    expected, produced = torch.empty(2, 12, 5)
    passes.settle(grad, x, norm.mean, pending.contiguous(), expected)
    passes.settle(grad, x, pairs[:, 0], pending, produced)
    assert torch.equal(produced, expected)


@pytest.mark.parametrize("folder", [compiled.FOLDER, None], ids=["compiled", "uncompiled"])
def test_what_is_only_read_stays(folder: Path | None) -> None:
    """Also where the gradient has the dtype that is computed in and the result has not."""
    x, grad, norm = drawn(12, 5)
    before, out = grad.clone(), torch.empty(12, 5, dtype=torch.bfloat16)
    with compiled.using(folder):
        passes.settle(grad, x.bfloat16(), norm.mean, torch.ones(2, 5), out)
    assert torch.equal(grad, before)


def test_rows_that_are_one_memory_are_not_written() -> None:
    x, _, norm = drawn(12, 5)
    with pytest.raises(RuntimeError, match="single memory location"):
        passes.relu_norm_backward_in_place(torch.ones(5).expand(12, 5), x, norm, None)


def test_autograd_notices_what_operators_overwrite() -> None:
    weight, out = torch.ones(12, 5, requires_grad=True), torch.ones(12, 5)
    loss = (weight * out).sum()
    x, _, _ = drawn(12, 5)
    bn_relu(x, torch.zeros(5), torch.ones(5), None, None, 0.0, out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with pytest.raises(RuntimeError, match="no derivative"):
        bn_relu(weight, torch.zeros(5), torch.ones(5), None, None, 0.0, out)


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
@pytest.mark.parametrize("kept", [0, 9000])
def test_a_damaged_file_is_not_loaded(kept: int, anew: Path) -> None:
    """Cut short, as by a full disk; loading it could end the process."""
    assert compiled.library(torch.float32) is not None
    (file,) = anew.iterdir()
    content = file.read_bytes()
    file.unlink()  # what is loaded stays
    file.write_bytes(content[:kept])
    assert compiled.library(torch.float32) is not None
    assert file.read_bytes() == content


@pytest.mark.usefixtures("library", "anew")
@pytest.mark.parametrize("home", ["not a folder", "none"])
def test_without_a_home(home: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in a container whose user has no entry: a folder of one's own among the temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(cache_folder, "_writable", cache_folder._writable.__wrapped__)
    (tmp_path / "temporary").mkdir()
    if home == "none":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", _no_home)
    else:
        (tmp_path / "a file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    assert compiled.library(torch.float32) is not None
    (folder,) = (tmp_path / "temporary").iterdir()
    assert folder.stat().st_mode & 0o077 == 0
    assert len(list(folder.iterdir())) == 1


def _no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.usefixtures("library", "anew")
def test_a_compiler_with_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "gcc -g0" if shutil.which("gcc") else "cc -g0")
    assert compiled.library(torch.float32) is not None
    assert compiled.description().startswith("compiled by")
    assert compiled.reason() == ""


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("no-such-compiler", "looked for no-such-compiler"), ("false", "failed"), ("true", "failed")],
)
def test_without_a_compiler(compiler: str, reason: str, anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None, one that fails, one that writes nothing: PyTorch's operators, a reason, and nothing left over."""
    monkeypatch.setenv("CC", compiler)
    assert compiled.library(torch.float32) is None
    assert compiled.description() == "PyTorch operators"
    assert reason in compiled.reason()
    assert not anew.exists() or not list(anew.iterdir())
    x, _, norm = drawn(12, 5)
    out = torch.empty(12, 5)
    passes.relu_norm(x, norm, out)
    torch.testing.assert_close(out, torch.relu(x * norm.scale + norm.shift))


@pytest.mark.usefixtures("library", "anew")
def test_the_reason_is_the_compilers_without_places(tmp_path: Path) -> None:
    """The same in every process and checkout."""
    reasons = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "passes.c").write_text("#include <no-such-header.h>\n")
        with compiled.using(tmp_path / name):
            assert compiled.library(torch.float32) is None
            reasons.append(compiled.reason())
    assert reasons[0] == reasons[1]
    assert "no-such-header.h" in reasons[0]


def test_switched_off() -> None:
    program = "from densebench.kernels import compiled as c; print(c.description(), c.reason())"
    environment = {**os.environ, compiled.SWITCH: "0"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "PyTorch operators switched off\n"


@pytest.mark.usefixtures("library", "anew")
def test_a_kept_prediction_is_of_what_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes, threads and what the processor multiplies: their scratch differs."""
    answers, here = [], (compiled.FOLDER, 1, False)
    for folder, threads_in_use, halves in (
        here,
        (None, 1, False),
        (compiled.FOLDER, 2, False),
        (*here[:2], True),
        here,
    ):
        torch.set_num_threads(threads_in_use)
        monkeypatch.setattr(cache, "multiplies_halves", lambda halves=halves: halves)
        with compiled.using(folder):
            answers.append(cache.cached({"of": "passes"}, lambda: {"bytes": len(answers)}))
    assert [answer["bytes"] for answer in answers] == [0, 1, 2, 3, 0]
