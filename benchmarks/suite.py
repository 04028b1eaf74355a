"""One run of the benchmarks: which cases were selected, and their records, measured group by group."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Group, Profile
from densebench.measure.runner import Runner
from densebench.measure.worker import run_isolated
from densebench.results import Case, Record, RunStore

ROOT = Path(__file__).resolve().parents[1]


class Suite:
    """Measures the selected cases of a profile, a whole group at its first case.

    Args:
        profile: what could be measured.
        store: where records go.
        isolate: a fresh process for each case; then nothing is timed in turns.
        resume: take over what the store holds of the same commit and environment.
    """

    def __init__(self, profile: Profile, store: RunStore, isolate: bool, resume: bool) -> None:
        self.profile = profile
        self.store = store
        self.isolate = isolate
        self.selected: dict[str, list[Case]] = {}
        self.records: dict[str, Record] = {}
        self.runner = Runner(store, profile.effort, resume, _progress)

    def select(self, group: Group, case: Case) -> None:
        """Note that this case of the group is to be measured."""
        self.selected.setdefault(group.name, []).append(case)

    def record(self, group: Group, case: Case) -> Record:
        """The record of a case; its whole group is measured when the first of them is asked for."""
        if case.key() not in self.records:
            cases = self.selected.get(group.name, [case])
            measured = self._isolated(group, cases) if self.isolate else self._in_turns(group, cases)
            self.records |= {record.case.key(): record for record in measured}
        return self.records[case.key()]

    def predict(self, case: Case) -> Record:
        self.records[case.key()] = self.runner.predict(case)
        return self.records[case.key()]

    def _in_turns(self, group: Group, cases: Sequence[Case]) -> list[Record]:
        return self.runner.measure(cases, group.name if group.timed else None)

    def _isolated(self, group: Group, cases: Sequence[Case]) -> list[Record]:
        records = []
        for case in cases:
            if case.key() not in self.runner.done:
                _progress(f"{case.label()} in its own process")
                record = run_isolated(case, self.profile.effort, group.name if group.timed else None)
                self.runner.done[case.key()] = self.store.append(record)
            records.append(self.runner.done[case.key()])
        return records


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
    """ "cuda" if there is one and "auto" is asked for, without making a CUDA context."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def run_folder(profile: str, device: str, resume: bool) -> Path:
    """A new folder under reports/data/, or with `resume` the newest that fits."""
    data = ROOT / "reports" / "data"
    suffix = f"-{device}-{profile}"
    if resume:
        existing = sorted(path for path in data.glob(f"*{suffix}") if path.is_dir())
        if existing:
            return existing[-1]
    return data / f"{datetime.now():%Y%m%d-%H%M%S}{suffix}"


def _progress(line: str) -> None:
    print(f"  {line}", file=sys.stderr, flush=True)
