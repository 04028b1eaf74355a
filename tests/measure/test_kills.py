"""A writer that is killed at any moment loses at most the record it is writing."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from densebench.store import RunStore

# Appends records for ever; prints the number of each once it is stored. Long ones, so that kills hit writes.
WRITER = """
import itertools, sys
from pathlib import Path
from densebench.records import Case, Record
from densebench.store import RunStore
store = RunStore(Path(sys.argv[1]))
for number in itertools.count(int(sys.argv[2])):
    case = Case("step", "m", "naive", "train", 1, (3, 8, 8), options={"filler": "x" * 200_000})
    store.append(Record(case, "ok", seed=number))
    print(number, flush=True)
"""


def kill_a_writer(folder: Path, first: int, after: float) -> int:
    """Start a writer, kill it `after` seconds behind its first record; the last number that it confirmed."""
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), str(first)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    confirmed = [int(writer.stdout.readline())]
    time.sleep(after)
    os.kill(writer.pid, signal.SIGKILL)
    confirmed += [int(line) for line in writer.stdout if line.endswith("\n")]
    assert writer.wait() == -signal.SIGKILL
    writer.stdout.close()
    return confirmed[-1]


def kill_often(folder: Path, times: int) -> None:
    moments, expected = random.Random(0), 0
    for _ in range(times):
        confirmed = kill_a_writer(folder, expected, moments.uniform(0, 0.03))
        stored = [record.seed for record in RunStore(folder).read()]
        assert stored == list(range(len(stored))), "a record is lost or doubled"
        assert confirmed < len(stored) <= confirmed + 2  # the running one may be there already, not confirmed
        expected = len(stored)
        (folder / "cases.jsonl").unlink() if expected > 200 else None
        expected = 0 if expected > 200 else expected


def test_20_kills_lose_nothing_that_was_confirmed(tmp_path: Path) -> None:
    kill_often(tmp_path, 20)


@pytest.mark.nightly
def test_200_kills_lose_nothing_that_was_confirmed(tmp_path: Path) -> None:
    kill_often(tmp_path, 200)
