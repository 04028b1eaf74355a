"""What fits into cards of several sizes: the largest batch of DenseNet-121, the deepest DenseNet-BC.

Predicted for CUDA, so the same on every machine. The time shown is that of finding out.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.cases import Limit
from benchmarks.suite import PROFILE, Suite, describe
from densebench.measure.limits import deepest_networks, largest_batches
from densebench.records import Record
from densebench.registry import UnsupportedError


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    limits = metafunc.config.stash[PROFILE].limits
    metafunc.parametrize("limit", limits, ids=[f"{limit.case.kind} {limit.case.strategy}" for limit in limits])


def test_limit(benchmark: Any, suite: Suite, limit: Limit) -> None:
    describe(benchmark, "predicting what fits", limit.case)
    try:
        records = benchmark.pedantic(_records, args=(suite, limit), rounds=1)
    except UnsupportedError as objection:
        suite.runner.note(Record(limit.case, "unsupported", str(objection)))
        pytest.skip(f"unsupported: {objection}")
    sizes = [record.case.options.get("largest_batch", record.case.options.get("depth")) for record in records]
    assert sizes == sorted(sizes), "a larger card fits less"


def _records(suite: Suite, limit: Limit) -> list[Record]:
    """The records of one strategy, by increasing capacity; those of a run that is resumed are taken over."""
    done = [record for record in suite.runner.done.values() if limit.covers(record.case)]
    if len(done) < len(limit.capacities_gib):
        suite.progress(f"predicting what fits: {limit.case.label()}")
        if limit.case.kind == "fit":
            found = list(largest_batches(limit.case, limit.capacities_gib, limit.checked))
        else:
            found = list(deepest_networks(limit.case, limit.capacities_gib))
        done = [suite.runner.note(record) for record in found]
    for record in done:
        suite.records[record.case.key()] = record
    return sorted(done, key=lambda record: record.case.options["capacity_gib"])
