"""The search for tiles: what it compiles, what it times, what it keeps.

Tiles are compiled in processes of their own, for a GPU that is not here; what is timed are kernels in Triton's
interpreter, whose times mean nothing.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import kernel_calls, tile_candidates, tile_search
from benchmarks.kernel_cache import Rotation
from benchmarks.tile_candidates import SPILL, Candidate, Fit, fit, to_time
from benchmarks.tile_search import CHOSEN, Search, main, shapes, table
from benchmarks.tile_trial import Trial, _stray
from densebench.kernels import bn_relu, channel_statistics
from densebench.kernels.launch import H100
from densebench.kernels.library import IMPLEMENTATIONS
from densebench.kernels.tiling import Tile
from densebench.measure.device import DeviceLostError
from densebench.measure.timing import Effort
from densebench.records import Case
from tests.kernels.benchmarked import small

SHORT = Effort(rounds=7, seconds=0.1, least=7)
SMALL, LARGE = Candidate(4, values=8), Candidate(8, values=16)

_COMPILED = """
import dataclasses, json, multiprocessing, os
from benchmarks.tile_candidates import Candidate, compile_all
from densebench.kernels.launch import H100

class Crashes(Candidate):
    def __call__(self, chosen):
        return super().__call__(chosen) if multiprocessing.parent_process() is None else os.abort()

TRIED = [Candidate(4, values=8), Candidate(4, values=32, registers=24), Candidate(4, rows=48)]
LARGE = Candidate(16, 512, 64, stages=6)
if __name__ == "__main__":
    tasks = [("bn_relu", candidate) for candidate in (*TRIED, Crashes(2, values=8))]
    done = compile_all([*tasks, ("channel_statistics", LARGE)], "sm_90", H100, 2)
    print(json.dumps({fit.candidate.name: (kernel, dataclasses.asdict(fit)) for kernel, fit in done}))
"""
_LAUNCHED = """
from types import SimpleNamespace
import torch, triton
from triton.backends.nvidia.compiler import CUDABackend
from benchmarks.tile_candidates import Candidate, fit
from densebench.kernels import launch
from densebench.kernels.library import IMPLEMENTATIONS
from densebench.kernels.tiling import changing
from tests.kernels.test_starting import driver_of

tiles = {"bn_relu": Candidate(4, values=8), "bn_relu_conv1x1": Candidate(8, 32, 32, stages=2)}
for kernel, tile in tiles.items():
    assert fit(kernel, tile, "sm_90", launch.H100).why_not is None
made, make = [], CUDABackend.make_ttir
CUDABackend.make_ttir = staticmethod(lambda *given: made.append(str(given[0])) or make(*given))
triton.runtime.driver.set_active(driver_of(SimpleNamespace(device=0, stream=0, received=[])))
x, out = torch.empty(2, 3136, 128, dtype=torch.bfloat16)
vectors, weight = torch.ones(4, 128), torch.empty(128, 128, dtype=torch.bfloat16)
for warps in (4, 8):
    with changing("bn_relu", Candidate(warps, values=8)):
        IMPLEMENTATIONS["bn_relu"].cuda(x, *vectors, 1e-5, out)
    print(len(made))
for stages in (2, 3):
    made.clear()
    with changing("bn_relu_conv1x1", Candidate(8, 32, 32, stages=stages)):
        IMPLEMENTATIONS["bn_relu_conv1x1"].cuda(x, *vectors, 1e-5, weight, out, *vectors[:2].clone())
    print(len([module for module in made if "tt.dot" in module]))
"""


def run(code: str, folder: Path, repository: Path) -> str:
    """In a process whose kernels are compiled, with a cache of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "TRITON_CACHE_DIR": str(folder),
        "TRITON_DEFAULT_FP_FUSION": "1",
        "PYTHONPATH": str(repository),
    }
    script = folder / "script.py"  # a file: processes that it starts import it again
    script.write_text(code)
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_compiler_says_what_fits(tmp_path: Path, repository: Path) -> None:
    pytest.importorskip("triton.backends.nvidia", reason="Triton for NVIDIA is not installed")
    told = json.loads(run(_COMPILED, tmp_path, repository))
    assert told.pop("rows 512, columns 64, warps 16, stages 6")[0] == "channel_statistics"
    found = {name: fit for name, (_, fit) in told.items()}
    fits, spills = found[SMALL.name], found["values 32, warps 4, registers 24"]
    assert fits["why_not"] is None
    assert fits["beside"] >= 6
    assert 0 < fits["registers"] <= 64
    assert fits["why_not"] is None
    assert spills["why_not"] == f"spills {spills['spill_bytes']} bytes a thread"
    assert spills["spill_bytes"] > SPILL
    assert "does not compile" in found["rows 48, warps 4"]["why_not"]  # no power of two
    assert "ended its process" in found["values 8, warps 2"]["why_not"]  # and the others were compiled


def test_what_was_compiled_ahead_is_what_a_launch_finds(tmp_path: Path, repository: Path) -> None:
    """And another tile is not."""
    pytest.importorskip("triton.backends.nvidia", reason="Triton for NVIDIA is not installed")
    assert run(_LAUNCHED, tmp_path, repository).split() == ["0", "1", "0", "1"]


def test_what_takes_too_much_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    built = SimpleNamespace(metadata=SimpleNamespace(shared=200_000), asm={"cubin": b""})
    monkeypatch.setattr(
        tile_candidates, "recorded_launches", lambda *_: [SimpleNamespace(file="bn_relu", constants=())]
    )
    monkeypatch.setattr(tile_candidates, "compiled_kernel", lambda *_: built)
    monkeypatch.setattr(tile_candidates, "resources", lambda _: (122, 0))
    assert [fit("bn_relu", Candidate(warps), "sm_90", H100).beside for warps in (4, 16, 32)] == [1, 1, 0]
    built.metadata.shared = 50_000
    assert [fit("bn_relu", Candidate(warps), "sm_90", H100).beside for warps in (4, 8, 16)] == [4, 2, 1]
    assert fit("bn_relu", Candidate(4), "sm_86", H100).beside == 2
    built.metadata.shared = 240_000
    assert "does not fit: 122 registers a thread, 240,000" in fit("bn_relu", Candidate(4), "sm_90", H100).why_not


def test_a_limit_that_changes_nothing_is_not_timed_again() -> None:
    free = Candidate(8, 64, 32, stages=4)
    limited = [dataclasses.replace(free, registers=registers) for registers in (128, 80)]
    fits = [Fit(limited[0], 120, 0, 9, 2, None), Fit(free, 120, 0, 9, 2, None), Fit(limited[1], 80, 8, 9, 3, None)]
    assert {tile.registers for tile in to_time("bn_relu_conv1x1", fits)} == {None, 80}


def test_as_many_programs_as_fit_share_out_the_rows() -> None:
    candidate = Candidate(8, 64, 32, stages=4, registers=128)
    fits = [
        Fit(candidate, 124, 0, 50_688, 2, None),
        Fit(dataclasses.replace(candidate, rows=128), 128, 8, 1, 2, "spills"),
    ]
    assert [tile.programs for tile in to_time("bn_relu_conv1x1", fits)] == [2]
    assert [tile.programs for tile in to_time("bn_relu_backward", [Fit(SMALL, 60, 0, 0, 6, None)])] == [2, 4, 8]
    assert [tile.programs for tile in to_time("bn_relu", [Fit(SMALL, 60, 0, 0, 6, None)])] == [None]


def test_products_are_searched_for_in_every_block() -> None:
    blocks = [case.options["block"] for case in shapes("bn_relu_conv1x1_backward")]
    assert blocks == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    assert {case.model for case in shapes("deferred")} == {"settled_gradient"}


class Spoils(Candidate):
    """A tile with which the kernel computes something else."""

    def __call__(self, chosen: Tile) -> Tile:
        return super().__call__(chosen)._replace(stages=99)


class Lazy(Candidate):
    """A tile with which the kernel does nothing."""

    def __call__(self, chosen: Tile) -> Tile:
        return super().__call__(chosen)._replace(stages=98)


class Raises(Candidate):
    def __call__(self, chosen: Tile) -> Tile:
        raise RuntimeError("out of resource: shared memory")


@pytest.fixture
def case() -> Case:
    return small("bn_relu")


@pytest.fixture
def search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Search]:
    """Of Triton's kernels on the CPU, where an operator would take its own path."""

    def by_triton(operator: str) -> Callable[..., Any]:
        def called(*arguments: Any) -> None:
            IMPLEMENTATIONS[operator].cuda(*arguments)
            if bn_relu._tile(64).stages == 99:
                arguments[-1].add_(1)

        return called

    monkeypatch.setattr(kernel_calls, "_function", by_triton)
    monkeypatch.setattr(tile_search, "FIRST", SHORT)
    monkeypatch.setattr("benchmarks.kernel_cache.MOST_COPIES", 2)
    monkeypatch.setattr("benchmarks.kernel_cache.CPU_CACHE_BYTES", 1024)
    return lambda: Search(tmp_path / "found", SHORT)


def test_what_is_right_is_timed_beside_the_chosen(search: Callable[[], Search], case: Case) -> None:
    begun = search()
    begun.measure("bn_relu", case, [SMALL, LARGE, Spoils(2, values=8), Raises(1, values=8)])
    records = {record.case.options["tile"]: record for record in begun.store.read()}
    assert {name: record.status in ("ok", "noisy") for name, record in records.items()} == {
        CHOSEN: True, SMALL.name: True, LARGE.name: True, "values 8, warps 2": False, "values 8, warps 1": False,
    }  # fmt: skip
    assert records["values 8, warps 2"].status == "incorrect"
    assert "out of resource" in records["values 8, warps 1"].reason
    timed = [record for record in records.values() if record.time_s is not None]
    assert len({record.turns for record in timed}) == 1
    assert all(record.time_s.n == 7 and record.bytes_moved > 98 * 128 * 4 * 2 for record in timed)
    (first,) = [json.loads(line) for line in begun.rounds.read_text().splitlines()]
    assert set(first["seconds"]) == {CHOSEN, SMALL.name, LARGE.name}
    said = table(begun.store.read())
    assert said.startswith(f"bn_relu block {case.options['block']} layer {case.options['layer']}: ")
    assert SMALL.name in said
    assert "out is off by" in said


def test_operands_have_left_the_cache_whoever_is_next(
    search: Callable[[], Search], case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No two calls in a row find the same: the second would find them where the first has brought them."""
    touched: list[int] = []
    by_triton = kernel_calls._function

    def noted(operator: str) -> Callable[..., Any]:
        called = by_triton(operator)
        return lambda *arguments: (touched.append(arguments[0].data_ptr()), called(*arguments))

    monkeypatch.setattr(kernel_calls, "_function", noted)
    monkeypatch.setattr("benchmarks.kernel_cache.MOST_COPIES", 3)
    monkeypatch.setattr("benchmarks.kernel_cache.CPU_CACHE_BYTES", 2**20)
    begun, timing = search(), tile_search.time_in_turns

    def timed(*arguments: Any) -> Any:
        touched.clear()
        turns = timing(*arguments)
        assert len(set(touched)) == 3
        assert all(touched[at : at + 3] == touched[:3] for at in range(0, len(touched) - 2, 3))
        return turns

    monkeypatch.setattr(tile_search, "time_in_turns", timed)
    begun.measure("bn_relu", case, [SMALL, LARGE])


def test_what_is_not_written_is_noticed(search: Callable[[], Search], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the memory holds what should be written, as it does after the tile before."""
    begun, by_triton = search(), kernel_calls._function

    def lazy(operator: str) -> Callable[..., Any]:
        called = by_triton(operator)

        def call(*arguments: Any) -> None:
            if channel_statistics._tile(32).stages != 98:
                called(*arguments)

        return call

    monkeypatch.setattr(kernel_calls, "_function", lazy)
    begun.measure("channel_statistics", small("channel_statistics"), [SMALL, Lazy(2, values=8)])
    statuses = {record.case.options["tile"]: record.status for record in begun.store.read()}
    assert statuses["values 8, warps 2"] == "incorrect"
    assert statuses[SMALL.name] in ("ok", "noisy")


def test_one_row_is_noticed() -> None:
    """Of many: the norm over all of a map is within what bfloat16 may be off by."""
    chosen = {"out": torch.randn(20_000, 64)}
    other = chosen["out"].clone()
    assert _stray({"out": other}, chosen) is None
    other += 1e-3 * torch.randn(20_000, 64)
    assert _stray({"out": other}, chosen) is None
    other[777] = 0
    assert "a row of out" in _stray({"out": other}, chosen)
    other[777] = float("nan")
    assert "a row of out" in _stray({"out": other}, chosen)


def test_a_tile_that_hangs_ends_the_process_with_a_record(
    search: Callable[[], Search], case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, ended = search(), threading.Event()
    monkeypatch.setattr(tile_search, "HANGS_AFTER", 0.2)
    monkeypatch.setattr(tile_search.os, "_exit", lambda code: ended.set())

    def hangs(self: Trial, tile: Candidate | None) -> None:
        if tile is not None:
            ended.wait(60)

    monkeypatch.setattr(Trial, "fault", hangs)
    begun.measure("bn_relu", case, [SMALL])
    statuses = [record.status for record in begun.store.read() if record.case.options["tile"] == SMALL.name]
    assert statuses[0] == "timeout"


def test_a_shape_is_searched_once(search: Callable[[], Search], case: Case) -> None:
    begun = search()
    assert not begun.has("bn_relu", case)
    begun.measure("bn_relu", case, [SMALL])
    begun.store.release()
    again = search()
    assert again.has("bn_relu", case)
    assert not again.has("deferred", case)
    assert not again.has("bn_relu", dataclasses.replace(case, batch=3))


def test_the_best_are_timed_again(
    search: Callable[[], Search], case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the chosen one, however slow."""
    monkeypatch.setattr(tile_search, "FINALISTS", 1)
    seconds = {CHOSEN: 3.0, SMALL.name: 2.0, LARGE.name: 1.0}

    def clock(step: Rotation) -> float:
        step()
        return seconds[step.candidate.name if isinstance(step, tile_search.WithTile) else CHOSEN]

    monkeypatch.setattr(tile_search, "cold_clock", lambda device: clock)
    begun = search()
    begun.measure("bn_relu", case, [SMALL, LARGE])
    assert [record.case.options["tile"] for record in begun.store.read()] == [LARGE.name, CHOSEN]
    assert "0.33 of the time (0.33 to 0.33) values 16, warps 8" in table(begun.store.read())


def test_a_tile_that_takes_the_device_with_it_is_left_alone(
    search: Callable[[], Search], case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, tiles = search(), [Raises(1, values=8), SMALL]
    other = dataclasses.replace(case, batch=1, options={**case.options, "rows": 49})
    monkeypatch.setattr(tile_search, "cold_clock", lambda device: lambda step: 1.0)
    with monkeypatch.context() as lost:
        lost.setattr(tile_search, "release_memory", lambda device: "an illegal memory access")
        with pytest.raises(DeviceLostError, match="illegal memory access"):
            begun.measure("bn_relu", case, tiles)
    begun.store.release()
    again = search()
    assert not again.has("bn_relu", case)
    again.measure("bn_relu", case, tiles)
    statuses = {record.case.options["tile"]: record.status for record in again.store.read()}
    assert statuses == {"values 8, warps 1": "crash", CHOSEN: "ok", SMALL.name: "ok"}
    again.measure("bn_relu", other, tiles)  # nor is it tried there
    assert [record.status for record in again.store.read()].count("error") == 0


def test_a_tile_that_fails_when_it_is_timed_leaves_the_others(
    search: Callable[[], Search], case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    def clock(step: Rotation) -> float:
        if isinstance(step, tile_search.WithTile) and step.candidate is LARGE:
            raise RuntimeError("misaligned address")
        return 1.0

    monkeypatch.setattr(tile_search, "cold_clock", lambda device: clock)
    begun = search()
    begun.measure("bn_relu", case, [SMALL, LARGE])
    statuses = {record.case.options["tile"]: record.status for record in begun.store.read()}
    assert statuses == {CHOSEN: "ok", SMALL.name: "ok", LARGE.name: "error"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "on an NVIDIA GPU that the kernels are compiled for: sm_80" in capsys.readouterr().err
    assert main([str(tmp_path), "--show"]) == 0
    with pytest.raises(SystemExit):
        main([str(tmp_path / "absent"), "--show"])
    assert "there is no folder" in capsys.readouterr().err
    assert not (tmp_path / "absent").exists()


def test_an_unknown_kernel_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--kernels", "bn_relu,conv"])
    assert "unknown kernel 'conv'; known: bn_relu_conv1x1, " in capsys.readouterr().err
