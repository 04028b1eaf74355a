"""The operators of the fused path against PyTorch, on the shapes of DenseNet-121.

The Triton kernels are timed on a GPU; without one their values are checked in the interpreter (by the tests), and
what is timed here is the operators' CPU path.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.cases import Group
from benchmarks.kernel_cases import kernel_effort, kernel_groups
from benchmarks.kernel_runs import KernelRunner
from benchmarks.suite import DEVICE, PROFILE_NAME, Suite, clock, end
from densebench.records import Case


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    groups = kernel_groups(config.stash[PROFILE_NAME], config.stash[DEVICE])
    if not groups:
        pytest.skip(f"the {config.stash[PROFILE_NAME]} profile times no kernels", allow_module_level=True)
    pairs = [(group, case) for group in groups for case in (*group.cases, *group.left_out)]
    metafunc.parametrize("kernel", pairs, ids=[f"{group.name} {case.strategy}" for group, case in pairs])


@pytest.fixture(scope="module")
def kernels(suite: Suite, pytestconfig: pytest.Config) -> KernelRunner:
    """Measures kernels into the records of this run."""
    effort = kernel_effort(pytestconfig.stash[PROFILE_NAME], pytestconfig.stash[DEVICE])
    return KernelRunner(suite.store, effort, pytestconfig.getoption("densebench_resume"), suite.progress)


@pytest.mark.benchmark(timer=clock)
def test_kernel(benchmark: Any, kernels: KernelRunner, kernel: tuple[Group, Case]) -> None:
    group, case = kernel
    records = {record.case.key(): record for record in kernels.measure(group)}
    record = records[case.key()]
    benchmark.group, benchmark.name = group.name, case.strategy
    benchmark.params = {"operator": case.model, "contender": case.strategy, "mode": case.mode, **case.options}
    if record.time_s is not None:
        clock.replay(benchmark, record)
    end(record, benchmark)
