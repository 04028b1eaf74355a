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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import kernel_calls, kernel_cases, tile_search
from benchmarks.kernel_cache import Rotation
from benchmarks.tile_candidates import Candidate, Fit, to_time
from benchmarks.tile_search import CHOSEN, Search, main, shapes, table
from densebench.kernels.library import IMPLEMENTATIONS
from densebench.kernels.tiling import Tile
from densebench.measure.device import DeviceLostError
from densebench.measure.timing import Effort
from densebench.results import Case

SHORT = Effort(rounds=7, seconds=0.1, least=7)
SMALL, LARGE = Candidate(4, values=8), Candidate(8, values=16)

_COMPILED = """
import dataclasses, json
from benchmarks.tile_candidates import Candidate, compile_all, fit
from densebench.kernels.launch import H100

TRIED = {
    "bn_relu": [Candidate(4, values=8), Candidate(4, values=32, registers=24), Candidate(4, rows=48)],
    "channel_statistics": [Candidate(16, 512, 64, stages=6)],
}
if __name__ == "__main__":
    found = [*compile_all("bn_relu", TRIED["bn_relu"], "sm_90", H100, workers=2)]
    found += [fit("channel_statistics", tried, "sm_90", H100) for tried in TRIED["channel_statistics"]]
    print(json.dumps({fit.candidate.name: dataclasses.asdict(fit) for fit in found}))
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
    found = json.loads(run(_COMPILED, tmp_path, repository))
    fits, spills = found[SMALL.name], found["values 32, warps 4, registers 24"]
    assert fits["why_not"] is None
    assert fits["beside"] >= 6
    assert 0 < fits["registers"] <= 64
    assert "spills" in spills["why_not"]
    assert spills["spill_bytes"] > 0
    assert "does not fit" in found["rows 512, columns 64, warps 16, stages 6"]["why_not"]
    assert "does not compile" in found["rows 48, warps 4"]["why_not"]  # no power of two


def test_what_was_compiled_ahead_is_what_a_launch_finds(tmp_path: Path, repository: Path) -> None:
    """And another tile is not."""
    pytest.importorskip("triton.backends.nvidia", reason="Triton for NVIDIA is not installed")
    assert run(_LAUNCHED, tmp_path, repository).split() == ["0", "1", "0", "1"]


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


class Raises(Candidate):
    def __call__(self, chosen: Tile) -> Tile:
        raise RuntimeError("out of resource: shared memory")


@pytest.fixture
def case() -> Case:
    groups = kernel_cases.kernel_groups("default", "cpu")
    found = next(group.cases[0] for group in groups if group.cases[0].model == "bn_relu")
    shape, options = (found.input_shape[0], 7, 7), {**found.options, "rows": 98}
    return dataclasses.replace(found, batch=2, input_shape=shape, options=options)


@pytest.fixture
def search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Search]:
    """Of Triton's kernels on the CPU, where an operator would take its own path."""
    from densebench.kernels import bn_relu

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
    assert [record.case.options["tile"] for record in begun.store.read()] == [CHOSEN, LARGE.name]
    assert "0.33 of the time (0.33 to 0.33) values 16, warps 8" in table(begun.store.read())


def test_a_tile_that_takes_the_device_with_it_is_left_alone(
    search: Callable[[], Search], case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, tiles = search(), [Raises(1, values=8), SMALL]
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


def test_an_unknown_kernel_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--kernels", "bn_relu,conv"])
    assert "unknown kernel 'conv'; known: bn_relu_conv1x1, " in capsys.readouterr().err
