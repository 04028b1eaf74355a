"""A case in a process of its own always ends in one record, and the next case runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import pytest

from densebench.measure import worker
from densebench.measure.timing import Effort
from densebench.measure.worker import run_isolated
from densebench.records import Record
from tests.measure.cases import fault_case, small_case

EFFORT = Effort(rounds=3, seconds=0.1, least=2)
OUTCOMES = {  # status, and what the reason says
    "fine": ("ok", ""),
    "garbles": ("ok", ""),
    "exits": ("error", "the process ended with 3"),
    "exits_in_silence": ("error", "the process ended with 0"),
    "leaves": ("error", "left without a word"),
    "segfaults": ("crash", "killed by SIGSEGV, at File"),
    "kills_itself": ("crash", "killed by SIGKILL"),
    "hangs": ("timeout", "took more than 25 s, at File"),
    "runs_out_of_memory": ("oom", "Tried to allocate 20.00 GiB."),
    "fails": ("error", "ValueError: first line"),
}


@pytest.mark.timeout(300)
def test_every_end_of_a_child_is_one_record(faults: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert set(OUTCOMES) == set(faults.ACTS)

    def run(name: str) -> Record:
        return run_isolated(fault_case(name), EFFORT, "a group", timeout=25 if name == "hangs" else 200)

    with ThreadPoolExecutor(3) as pool:
        records = dict(zip(OUTCOMES, pool.map(run, OUTCOMES), strict=True))
    for name, (status, words) in OUTCOMES.items():
        record = records[name]
        assert record.status == status or (status == "ok" and record.status == "noisy"), (name, record.reason)
        assert words in (record.reason or ""), (name, record.reason)
        assert (record.time_s is not None) == (status == "ok"), name
        assert record.case == fault_case(name)
        assert record.environment["device"]


def test_a_strategy_is_measured_as_in_this_process() -> None:
    record = run_isolated(small_case("checkpointed"), EFFORT, None)
    assert record.status == "ok"
    assert record.peak_delta_bytes
    assert record.max_error_vs_reference is not None
    assert record.time_s is None  # no group: memory only
    assert record.environment["argv"][0].endswith("worker.py")


def test_what_was_found_before_a_crash_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that dies while it is timed leaves its memory behind."""
    code = """
import os, sys, json
from pathlib import Path
from densebench.records import Case, Record
from densebench.store import RunStore
job = json.load(sys.stdin)
case = Case(**{**job["case"], "input_shape": tuple(job["case"]["input_shape"])})
RunStore(Path(sys.argv[1])).append(Record(case, "ok", peak_delta_bytes=77))
os.kill(os.getpid(), 9)
"""
    popen = subprocess.Popen
    monkeypatch.setattr(
        worker.subprocess, "Popen", lambda command, **how: popen([sys.executable, "-c", code, command[-1]], **how)
    )
    record = run_isolated(small_case(), EFFORT, "a group")
    assert (record.status, record.reason, record.peak_delta_bytes) == ("crash", "killed by SIGKILL", 77)


def test_an_interrupted_parent_leaves_no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    children: list[subprocess.Popen[str]] = []
    popen = subprocess.Popen

    def sleeper(command: list[str], **how: object) -> subprocess.Popen[str]:
        children.append(popen([sys.executable, "-c", "import time; time.sleep(600)"], **how))  # type: ignore[call-overload]
        return children[0]

    monkeypatch.setattr(worker.subprocess, "Popen", sleeper)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_isolated(small_case(), EFFORT, None)
    assert time.monotonic() - start < 30
    assert children[0].poll() == -signal.SIGKILL
