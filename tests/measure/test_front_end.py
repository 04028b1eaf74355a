"""The benchmarks as a user runs them: from the command line, in a process of their own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import conftest as front_end
from benchmarks import suite as suite_module
from benchmarks.profiles import profile
from benchmarks.suite import DEVICE, PROFILE, PROFILE_NAME, Suite, choose_device, run_folder
from densebench.measure.environment import environment
from densebench.records import Record
from densebench.registry import list_strategies
from densebench.store import RunStore, read_records
from tests.measure.cases import small_case, small_record

BENCH = [sys.executable, "-m", "pytest", "benchmarks/", "-p", "no:cacheprovider"]
TINY = ["--benchmark-only", "--densebench-profile", "tiny", "--densebench-device", "cpu"]
# Runs pytest several times in one process, which imports torch once; prints what each ended with.
SEVERAL = """
import json, resource, sys, pytest
for name, arguments in json.loads(sys.argv[1]).items():
    print(f"<<{name}", flush=True)
    if name == "disk full":  # files may no longer grow past a few bytes
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    code = pytest.main(["benchmarks/", "-p", "no:cacheprovider", *arguments])
    print(f"{name}:{int(code)}>>", flush=True)
"""

pytestmark = pytest.mark.timeout(400)


def plain_environment() -> dict[str, str]:
    """Without what pytest and its workers tell one another; one thread, as others are running."""
    kept = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "COLUMNS": "80"}


def bench(repository: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*BENCH, *TINY, *map(str, arguments)],
        cwd=repository,
        env=plain_environment(),
        capture_output=True,
        text=True,
        check=False,
    )


def stored(folder: Path) -> list[Record]:
    return read_records([folder / "cases.jsonl"])


def test_a_run_its_files_and_its_continuation(repository: Path, tmp_path: Path) -> None:
    """One run with everything on; then the same again with --densebench-resume, which measures nothing."""
    out, files = tmp_path / "run", f"--benchmark-storage=file://{tmp_path / 'saved'}"
    done = bench(
        repository, "--densebench-out", out, files, "--benchmark-save=one", f"--benchmark-json={tmp_path}/x"
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    _check_output(done.stdout, out)
    assert "timing naive, " in done.stderr  # progress, as it happens
    _check_records(out)
    written = json.loads((tmp_path / "x").read_text())["benchmarks"]
    assert {entry["name"] for entry in written} >= {*list_strategies(), "naive 2"}
    assert all(entry["extra_info"]["status"] in ("ok", "noisy") for entry in written)
    assert len(list((tmp_path / "saved").rglob("*one.json"))) == 1

    before = (out / "cases.jsonl").read_bytes()
    again = bench(repository, "--densebench-out", out, "--densebench-resume", files, "--benchmark-compare")
    assert again.returncode == 0, again.stdout[-3000:]
    assert (out / "cases.jsonl").read_bytes() == before
    assert "cases in it are kept" in again.stdout
    assert "(NOW)" in again.stdout  # pytest-benchmark's comparison with the saved run
    assert "timing" not in again.stderr


def _check_output(stdout: str, out: Path) -> None:
    lines = stdout.splitlines()
    assert sum(line.startswith("densebench: ") and "tiny profile" in line for line in lines) == 1
    assert f"records: {out / 'cases.jsonl'}" in lines
    assert f"page:    python -m densebench.report {out}" in lines
    start = next(i for i, line in enumerate(lines) if "x naive's time" in line)
    end = lines.index(f"records: {out / 'cases.jsonl'}")
    table = lines[start - 1 : end]
    assert max(map(len, table)) <= 80
    for name in list_strategies():
        assert any(line.startswith(name) for line in table), name
    assert end > max(i for i, line in enumerate(lines) if line.startswith("Name (time in"))  # ours comes last


def _check_records(out: Path) -> None:
    records = stored(out)
    assert {record.run for record in records} == {out.name}
    timed = [record for record in records if record.time_s is not None]
    assert {record.case.strategy for record in timed} == set(list_strategies())
    assert {record.case.kind for record in records} == {"step", "depth"}
    assert {record.case.source for record in records} == {"measured", "predicted"}


def test_each_in_a_process_of_its_own(repository: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = bench(
        repository,
        "--densebench-out",
        out,
        "--densebench-isolate",
        "-k",
        "test_step and naive",
    )
    assert done.returncode == 0, done.stdout[-3000:]
    measured = [record for record in stored(out) if record.case.source == "measured"]
    assert [record.case.strategy for record in measured] == ["naive"]
    assert measured[0].time_s is not None
    assert "in its own process" in str(measured[0].group)
    assert measured[0].environment["argv"] != sys.argv


def test_what_cannot_work_is_said_at_once(repository: Path, tmp_path: Path) -> None:
    """Exit status and message of each; nothing is measured and nothing is green and empty."""
    (tmp_path / "file").write_text("in the way")
    busy = RunStore(tmp_path / "busy")
    busy.claim()
    runs = {
        "file in the way": [*TINY, f"--densebench-out={tmp_path}/file"],
        "nowhere to write": [*TINY, "--densebench-out=/proc/densebench"],
        "another run": [*TINY, f"--densebench-out={tmp_path}/busy"],
        "no match": [*TINY, f"--densebench-out={tmp_path}/none", "-k", "no_such_case"],
        "all skipped": [*TINY[1:], f"--densebench-out={tmp_path}/skipped", "--benchmark-skip", "-k", "predicted"],
        "in parallel": [*TINY, "-n", "2"],
        "unknown profile": ["--densebench-profile", "huge"],
        "disk full": [*TINY, f"--densebench-out={tmp_path}/full", "-k", "predicted"],
    }
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL, json.dumps(runs)],
        cwd=repository,
        env={**plain_environment(), "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    busy.release()
    expected = {
        "file in the way": (4, "cannot write results to"),
        "nowhere to write": (4, "choose another with --densebench-out"),
        "another run": (4, "another run is writing to"),
        "no match": (5, " deselected"),
        "all skipped": (1, "nothing was measured"),
        "in parallel": (4, "leave out -n"),
        "unknown profile": (4, "quick"),
        "disk full": (1, "File too large"),
    }
    for name, (code, message) in expected.items():
        assert f"<<{name}" in done.stdout, done.stdout[-3000:]
        output = done.stdout.split(f"<<{name}", 1)[1].split(f"{name}:", 1)
        assert message in output[0], (name, output[0])
        assert output[1].startswith(f"{code}>>"), (name, output[1][:20], output[0][-1500:])
        assert "Traceback" not in output[0], name
    assert not (tmp_path / "none").exists()
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize("blow", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_keeps_what_is_finished(repository: Path, tmp_path: Path, blow: signal.Signals) -> None:
    out = tmp_path / "run"
    running = subprocess.Popen(
        [*BENCH, *TINY, "--densebench-out", str(out)],
        cwd=repository,
        env=plain_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    path = out / "cases.jsonl"
    while not (path.exists() and path.read_bytes().count(b"\n") >= 3):
        assert running.poll() is None, "it ended before it could be interrupted"
        time.sleep(0.02)
    running.send_signal(blow)
    output, _ = running.communicate(timeout=120)
    kept = stored(out)
    assert len(kept) >= 3
    if blow is signal.SIGINT:
        assert running.returncode == 2
        assert f"records: {path}" in output
        return
    assert running.returncode == -signal.SIGKILL
    again = bench(repository, "--densebench-out", out, "--densebench-resume")
    assert again.returncode == 0, again.stdout[-3000:]
    after = stored(out)
    assert after[: len(kept)] == kept
    depths = [record.case.key() for record in after if record.case.kind == "depth"]
    assert len(depths) == len(set(depths)) == 10  # nothing is measured twice
    steps = [record for record in after if (record.case.kind, record.case.source) == ("step", "measured")]
    memory = [record.case.key() for record in steps if record.time_s is None]
    assert len(memory) == len(set(memory)) == 5
    assert {record.case.key() for record in steps if record.time_s is not None} == set(memory)


def test_plain_pytest_runs_tests_only(repository: Path) -> None:
    found = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "--collect-only",
            "-q",
            "-p",
            "no:cacheprovider",
            "-k",
            "test_quartiles or test_step",
        ],
        cwd=repository,
        env=plain_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert "tests/measure/test_statistics.py::test_quartiles" in found.stdout
    assert "benchmarks/" not in found.stdout


def ending(folder: Path, *records: Record) -> tuple[bool, list[str]]:
    """Whether a run with these records has a figure, and the lines it ends with."""
    suite: Any = SimpleNamespace(store=RunStore(folder))
    for record in records:
        suite.store.append(record)
    return front_end._figures(suite), front_end._summary(suite)


def test_what_fits_is_a_figure(tmp_path: Path) -> None:
    """A peak that was predicted for a card, beside neither activation memory nor time."""
    figures, lines = ending(tmp_path / "run", small_record(peak_allocated_bytes=9, predicted_peak_bytes=9))
    assert figures
    assert f"records: {tmp_path / 'run' / 'cases.jsonl'}" in lines


def test_nothing_measured_is_told_with_the_reasons_there_are(tmp_path: Path) -> None:
    failed = small_record(status="oom", reason="out of memory")
    figures, lines = ending(tmp_path / "run", failed, small_record(case=small_case("fused")))
    assert not figures
    assert lines[1] == "densebench: nothing was measured"
    assert sorted(lines[2:]) == ["ok: no figures", "oom: out of memory"]


@pytest.mark.parametrize("resume", [True, False])
def test_a_resumed_run_says_that_no_record_applies(resume: bool, tmp_path: Path) -> None:
    store, chosen, stash = RunStore(tmp_path / "run"), profile("tiny", "cpu"), pytest.Stash()
    store.append(small_record(environment={**environment("cpu"), "source": "changed"}))
    suite = Suite(chosen, store, isolate=False, resume=resume, progress=print)
    stash[PROFILE], stash[DEVICE], stash[PROFILE_NAME] = chosen, "cpu", "tiny"
    stash[front_end._SUITE] = suite
    config: Any = SimpleNamespace(stash=stash)
    lines = front_end.pytest_report_collectionfinish(config, [])
    assert lines is not None
    assert len(lines) == 2 + resume
    if resume:
        assert "1 record found there, of which none applies: the code differs (source)" in lines[-1]


def test_two_runs_at_once_have_two_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(suite_module, "DATA", tmp_path)
    first = run_folder("quick", "cpu", resume=False)
    monkeypatch.setattr(os, "getpid", lambda: 1)
    assert run_folder("quick", "cpu", resume=False) != first


def test_resume_goes_on_with_the_newest_run_of_its_kind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(suite_module, "DATA", tmp_path)
    for name in ("20260101-000000-1-cpu-quick", "20260102-000000-1-cpu-quick", "20260103-000000-1-cpu-full"):
        (tmp_path / name).mkdir()
    assert run_folder("quick", "cpu", resume=True).name == "20260102-000000-1-cpu-quick"
    assert run_folder("default", "cpu", resume=True).name.endswith("-cpu-default")


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite_module.torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == "cpu"
    with pytest.raises(ValueError, match="sees no CUDA device"):
        choose_device("cuda")


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_results_are_not_committed_by_accident(repository: Path) -> None:
    ignored = subprocess.run(
        ["git", "check-ignore", "reports/data/run/cases.jsonl"], cwd=repository, capture_output=True, check=False
    )
    assert ignored.returncode in (0, 128)  # 128: not a checkout
