"""Training step and inference of whole networks: every strategy, and what people use instead."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.cases import Group
from benchmarks.suite import Suite, clock, describe, end
from densebench.records import Case


@pytest.mark.benchmark(timer=clock)
def test_step(benchmark: Any, suite: Suite, timed: tuple[Group, Case]) -> None:
    group, case = timed
    record = suite.record(group, case)
    describe(benchmark, group.name, case)
    if record.time_s is not None:
        clock.replay(benchmark, record)
    end(record, benchmark)
