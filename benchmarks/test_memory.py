"""Memory alone: against depth, and predicted for sizes not run. The time shown is that of finding out."""

from __future__ import annotations

from typing import Any

from benchmarks.cases import Group
from benchmarks.suite import Suite, describe, end
from densebench.records import Case


def test_memory(benchmark: Any, suite: Suite, untimed: tuple[Group, Case]) -> None:
    describe(benchmark, "measuring memory", untimed[1])
    end(benchmark.pedantic(suite.record, args=untimed, rounds=1), benchmark)


def test_predicted(benchmark: Any, suite: Suite, predicted: Case) -> None:
    describe(benchmark, "predicting memory", predicted)
    end(benchmark.pedantic(suite.predict, args=(predicted,), rounds=1), benchmark)
