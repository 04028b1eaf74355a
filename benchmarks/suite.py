"""One run of the benchmarks: which cases were selected, and their records, measured group by group."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.cases import Group
from benchmarks.profiles import Profile
from densebench.measure.runner import Runner
from densebench.measure.validation import Checks
from densebench.measure.worker import run_isolated
from densebench.records import Case, Record
from densebench.store import RunStore

# What the options chose, for all files of benchmarks: the device, a profile and its name.
DEVICE, PROFILE_NAME = pytest.StashKey[str](), pytest.StashKey[str]()
PROFILE = pytest.StashKey[Profile]()
DATA = Path(__file__).resolve().parents[1] / "reports" / "data"


class Suite:
    """Measures the selected cases of a profile: what is timed a whole group at its first case, the rest singly.

    Args:
        profile: what could be measured.
        store: where records go.
        isolate: a fresh process for each case; then nothing is timed in turns, and no ratios are formed.
        resume: take over what the store holds of the same source and environment.
        progress: called with one line for each thing that is begun.
    """

    def __init__(
        self, profile: Profile, store: RunStore, isolate: bool, resume: bool, progress: Callable[[str], None]
    ) -> None:
        self.profile = profile
        self.store = store
        self.isolate = isolate
        self.progress = progress
        self.selected: dict[str, list[Case]] = {}
        self.records: dict[str, Record] = {}
        self.runner = Runner(store, profile.effort, resume, progress)
        self._checks: dict[str, Checks] = {}

    def select(self, group: Group, case: Case) -> None:
        """Note that this case of the group is to be measured."""
        self.selected.setdefault(group.name, []).append(case)

    def record(self, group: Group, case: Case) -> Record:
        """The record of a case; a group that is timed is measured when the first of its cases is asked for."""
        if case.key() not in self.records:
            gc.collect()
            gc.freeze()  # every case collects garbage; what is loaded by now is none, and looking at it takes time
            if self.isolate:
                measured = [self._isolated(group, case)]
            elif group.timed:
                measured = self.runner.measure(self.selected.get(group.name, [case]), group.name)
            else:
                checks = self._checks.setdefault(group.name, Checks(one_network=True))
                measured = self.runner.measure([case], None, checks)
            self.records |= {record.case.key(): record for record in measured}
        return self.records[case.key()]

    def predict(self, case: Case) -> Record:
        self.records[case.key()] = self.runner.predict(case)
        return self.records[case.key()]

    def close(self) -> None:
        """Let other runs into the folder, and collect what was frozen."""
        self.store.release()
        gc.unfreeze()

    def _isolated(self, group: Group, case: Case) -> Record:
        if case.key() in self.runner.done:
            return self.runner.done[case.key()]
        too_large = self.runner.too_large(case)
        if too_large is not None:
            return self.runner.note(Record(case, "skipped", too_large))
        self.progress(f"{case.label()} in its own process")
        alone = f"{group.name}, {case.key()} in its own process" if group.timed else None
        return self.runner.note(run_isolated(case, self.profile.effort, alone))


class ReplayedClock:
    """A timer for pytest-benchmark that shows samples taken earlier, in turns with the other contenders.

    pytest-benchmark would time one contender after the other, and drift would fall on the last. So a group is
    timed by ours, and each test replays its samples into pytest-benchmark's table and files.
    """

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def replay(self, benchmark: Any, record: Record) -> None:
        assert record.time_s is not None
        samples = iter(record.time_s.samples)

        def advance() -> None:
            self.now += next(samples)

        benchmark.pedantic(advance, rounds=record.time_s.n, iterations=1)


clock = ReplayedClock()


def choose_device(name: str) -> str:
    """The device to measure on, found without making a CUDA context: for "auto" the GPU if there is one.

    Raises:
        ValueError: if a GPU is asked for and there is none.
    """
    if name == "cpu":
        return name
    if torch.cuda.is_available():
        return "cuda"
    if name == "cuda":
        raise ValueError("torch sees no CUDA device; leave out --densebench-device cuda to measure on the CPU")
    return "cpu"


def run_folder(profile: str, device: str, resume: bool) -> Path:
    """A new folder under reports/data/, or with `resume` the newest that fits."""
    suffix = f"-{device}-{profile}"
    if resume:
        existing = sorted(path for path in DATA.glob(f"*{suffix}") if path.is_dir())
        if existing:
            return existing[-1]
    return DATA / f"{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}{suffix}"  # two at once are two runs


def short_name(case: Case) -> str:
    """A contender, and what sets a case apart from the others of its group."""
    contiguous = "contiguous" if case.memory_format == "contiguous" else ""
    graph = "graph" if case.cuda_graph else ""
    options = case.options
    depth = str(options.get("depth", sum(options.get("block_config", [])))) if case.kind == "depth" else ""
    return " ".join(part for part in (case.strategy, contiguous, graph, depth) if part)


def describe(benchmark: Any, group: str, case: Case) -> None:
    """Short names for pytest-benchmark's table, and parameters that its files can hold."""
    benchmark.group = group
    benchmark.name = short_name(case)
    benchmark.params = {"model": case.model, "contender": case.strategy, "mode": case.mode, "batch": case.batch}


def end(record: Record, benchmark: Any) -> None:
    """End a test as its record says; a case without a figure never passes in silence."""
    benchmark.extra_info["status"] = record.status
    benchmark.extra_info["peak_delta_bytes"] = record.peak_delta_bytes
    if record.status in ("unsupported", "skipped", "oom"):
        pytest.skip(f"{record.status}: {record.reason}")
    if record.status not in ("ok", "noisy") and record.time_s is None:
        pytest.fail(f"{record.status}: {record.reason}", pytrace=False)
