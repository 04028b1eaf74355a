"""Where a number was measured, and what the driver tells or does not."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from densebench import kernels, source_code
from densebench.measure import environment as environment_module
from densebench.measure.environment import environment
from densebench.measure.nvml import DRIVER_FIELDS, Nvml, Reading, facts_while_repeating
from densebench.records import identity
from densebench.source_code import benchmark_files, hash_of, package_files


class FakeNvml:
    """A driver library that answers as told; an exception is raised."""

    class NVMLError(Exception):
        pass

    def __init__(self, **answers: Any) -> None:
        for name, bit in {"GpuIdle": 1, "SwPowerCap": 4, "HwSlowdown": 8, "None": 0, "All": 13}.items():
            setattr(self, f"nvmlClocksEventReason{name}", bit)
        for name, answer in answers.items():
            setattr(self, name, self._answering(answer))

    @staticmethod
    def _answering(answer: Any) -> Any:
        def call(*_: Any) -> Any:
            if isinstance(answer, Exception):
                raise answer
            return answer() if callable(answer) else answer

        return call


def nvml(**answers: Any) -> Nvml:
    found = Nvml(torch.device("cpu"))
    found.unavailable, found._nvml, found._handle = None, FakeNvml(**answers), object()
    return found


def process(pid: int, size: int | None = 100) -> SimpleNamespace:
    return SimpleNamespace(pid=pid, usedGpuMemory=size)


def test_without_a_gpu_there_is_a_reason() -> None:
    absent = Nvml(torch.device("cpu"))
    assert absent.unavailable == "no CUDA device"
    assert absent.read() == Reading(None, None, None, None, None)
    assert absent.read().throttled is None
    assert absent.describe() == {}
    assert facts_while_repeating(lambda: None, absent) == {
        "unavailable": dict.fromkeys(DRIVER_FIELDS, "no CUDA device")
    }


def test_a_driver_that_does_not_load_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    pynvml = pytest.importorskip("pynvml")

    def broken() -> None:
        raise pynvml.NVMLError_LibraryNotFound

    monkeypatch.setattr(pynvml, "nvmlInit", broken)
    assert str(Nvml(torch.device("cuda")).unavailable).startswith("NVML: ")


def test_what_is_not_permitted_hides_nothing_else() -> None:
    denied = FakeNvml.NVMLError("Insufficient Permissions")
    reading = nvml(
        nvmlDeviceGetComputeRunningProcesses=denied,
        nvmlDeviceGetCurrentClocksEventReasons=denied,
        nvmlDeviceGetTotalEnergyConsumption=denied,
        nvmlDeviceGetClockInfo=1980,
    ).read()
    assert reading == Reading(None, 1980.0, None, None, None)


def test_reasons_have_names() -> None:
    idle = nvml(nvmlDeviceGetCurrentClocksEventReasons=1).read()
    slowed = nvml(nvmlDeviceGetCurrentClocksEventReasons=1 | 4 | 8).read()
    assert (idle.event_reasons, idle.throttled) == (("GpuIdle",), False)
    assert (slowed.event_reasons, slowed.throttled) == (("GpuIdle", "HwSlowdown", "SwPowerCap"), True)


@pytest.mark.parametrize(
    ("processes", "others", "own_bytes"),
    [
        ([process(os.getpid())], 0, 100),
        ([process(os.getpid(), None)], 0, None),
        ([process(os.getpid()), process(1)], 1, 100),
        ([process(1)], None, None),  # a container: the numbers are the host's
        ([], 0, None),
    ],
)
def test_other_processes(processes: list[Any], others: int | None, own_bytes: int | None) -> None:
    reading = nvml(nvmlDeviceGetComputeRunningProcesses=processes).read()
    assert (reading.other_processes, reading.process_bytes) == (others, own_bytes)


def test_facts_of_a_busy_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    energy, clocks = iter(range(0, 10**9, 500)), iter([100] + [1500, 1700] * 50)
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1

    device = nvml(
        nvmlDeviceGetTotalEnergyConsumption=lambda: next(energy),
        nvmlDeviceGetClockInfo=lambda: next(clocks),
        nvmlDeviceGetCurrentClocksEventReasons=4,
        nvmlDeviceGetComputeRunningProcesses=[process(os.getpid()), process(7)],
    )
    facts = facts_while_repeating(step, device, seconds=0.05)
    readings = next(energy) // 500
    assert facts["energy_j"] == pytest.approx(0.5 * (readings - 1) / steps)
    assert 1500 <= facts["sm_clock_mhz"] <= 1700  # the idle clock before the first step is none of its
    assert facts["clock_event_reasons"] == ("SwPowerCap",)
    assert (facts["throttled"], facts["shared_gpu"], facts["process_device_bytes"]) == (True, True, 100)
    assert facts["unavailable"] == {}


def test_a_silent_driver_leaves_nulls_and_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    facts = facts_while_repeating(lambda: None, nvml(), seconds=0.01)
    assert all(facts[name] is None for name in DRIVER_FIELDS)
    assert set(facts["unavailable"]) == set(DRIVER_FIELDS)


def test_describe_survives_a_driver_that_refuses() -> None:
    denied = FakeNvml.NVMLError("no")
    facts = nvml(nvmlSystemGetDriverVersion=denied, nvmlDeviceGetMemoryInfo=denied).describe()
    assert facts == {"driver": None, "memory_bytes": None, "other_processes": None}


def test_the_environment_is_complete_and_json() -> None:
    facts = environment("cpu")
    assert json.loads(json.dumps(facts)) == facts
    assert {"device", "python", "os", "cpu", "threads", "memory_bytes", "torch_git", "source", "argv"} <= set(
        facts
    )
    assert facts["packages"]["torch"] == torch.__version__


def test_every_language_of_the_kernels_counts_as_source() -> None:
    """A record made with another header is another's."""
    folder = Path(kernels.__file__).resolve().parent
    code = {path for path in folder.iterdir() if path.is_file() and path.suffix != ".md"}
    assert code <= package_files()
    assert {path.suffix for path in code} == {".py", ".c", ".h"}


def test_what_is_never_measured_is_no_source() -> None:
    """A figure drawn otherwise, or another training command, leaves records what they are."""
    sources = package_files()
    rooms = {path.parent.name for path in sources}
    assert {"models", "execution", "strategies", "kernels", "measure", "replay"} <= rooms
    assert rooms.isdisjoint({"report", "training"})
    assert "train.py" not in {path.name for path in sources}


def test_what_times_kernels_counts_as_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A run that goes on after an edit of it would mix times; which cases there are is in their keys."""
    found = benchmark_files()
    assert {"kernel_runs.py", "kernel_calls.py", "kernel_cache.py", "suite.py"} <= {path.name for path in found}
    assert {path.name for path in found}.isdisjoint({"profiles.py", "cases.py", "test_kernels.py"})
    assert environment("cpu")["source"] == hash_of(package_files() | found) != hash_of(package_files())
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "suite.py").touch()  # of somebody else: the package is installed beside it
    monkeypatch.setattr(source_code, "_PACKAGE", tmp_path / "densebench")
    assert benchmark_files() == set()


def test_the_hash_of_sources_knows_names_and_contents_but_not_where_they_lie(tmp_path: Path) -> None:
    def hashed(place: str, **files: str) -> str:
        folder = tmp_path / place / "package"
        folder.mkdir(parents=True)
        for name, text in files.items():
            (folder / name).write_text(text)
        return hash_of(folder.iterdir())

    assert hashed("one", a="x", b="y") == hashed("two", a="x", b="y")
    assert len({hashed("three", a="y", b="x"), hashed("four", a="x", c="y"), hashed("five", a="x", b="y")}) == 3


def test_a_gpu_that_is_not_there_is_said() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert environment("cuda")["device"] == "no CUDA device"


def test_identity_survives_json_and_tells_machines_and_code_apart() -> None:
    facts = environment("cpu")
    assert identity(json.loads(json.dumps(facts))) == identity(facts)
    others = {"source": "x", "threads": 99, "python": "2.7", "device": "x", "assembler": "ptxas 1.0"}
    for name, value in {**others, "compilers": {"TRITON_PTXAS_PATH": "x"}}.items():
        assert identity({**facts, name: value}) != identity(facts), name
    assert identity({**facts, "gpu": {"driver": "1"}}) != identity({**facts, "gpu": {"driver": "2"}})
    boards = [{**facts, "gpu": {"driver": "1", "uuid": uuid}} for uuid in "ab"]  # each call may be lent another
    assert identity(boards[0]) == identity(boards[1])
    assert identity({**facts, "argv": ["other"], "dirty": True, "commit": "x"}) == identity(facts)
    assert identity({}) == identity({})


def test_what_changes_the_machine_code_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("TRITON_", "TORCHINDUCTOR_")):
            monkeypatch.delenv(name)
    assert environment.__wrapped__("cpu")["compilers"] is None
    monkeypatch.setenv("TRITON_CACHE_DIR", "/tmp")
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/opt/ptxas")
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    kept = {"TRITON_DEFAULT_FP_FUSION": "0", "TRITON_PTXAS_PATH": "/opt/ptxas"}
    assert environment.__wrapped__("cpu")["compilers"] == kept


def test_the_assembler_is_known_without_a_gpu() -> None:
    pytest.importorskip("triton.backends.nvidia")
    assert re.fullmatch(r"ptxas \d+\.\d+", environment_module._assembler() or "")


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert environment_module._git("rev-parse", "HEAD") is None
    assert environment_module._dirty() is None  # not "clean"


@pytest.mark.parametrize(("changes", "dirty"), [("", False), (" M file", True), (None, None)])
def test_dirty_is_what_git_says(changes: str | None, dirty: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment_module, "_git", lambda *_: changes)
    assert environment_module._dirty() is dirty


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        (
            "cpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\n\ncpu family\t: 25\nmodel name\t: another\n",
            "AMD EPYC, family 26 model 2 (1 thread)",
        ),
        ("processor\t: 0\nmodel name\t: an Arm\n", "an Arm (1 thread)"),
        ("processor\t: 0\n", "unknown CPU (1 thread)"),
    ],
)
def test_processors_of_one_name_are_told_apart(
    cpuinfo: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(environment_module, "_PROCESSORS", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert environment_module.device_name(torch.device("cpu")) == name
