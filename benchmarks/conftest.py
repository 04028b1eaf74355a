"""pytest's side of the benchmarks: options, which cases become tests, the header and the final table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.cases import Profile, profile
from benchmarks.suite import Suite, choose_device, run_folder
from densebench.contenders import get_contender
from densebench.measure.environment import device_name
from densebench.report.console import summary_table
from densebench.results import Case, Record, RunStore


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("densebench")
    group.addoption(
        "--densebench-profile",
        choices=["quick", "default", "full"],
        help="how much to measure (quick on a CPU, default on a GPU)",
    )
    group.addoption("--densebench-device", choices=["auto", "cpu", "cuda"], default="auto")
    group.addoption("--densebench-out", type=Path, help="folder of this run (reports/data/<run>)")
    group.addoption("--densebench-isolate", action="store_true", help="a fresh process for every case")
    group.addoption("--densebench-resume", action="store_true", help="skip what is already measured")


def pytest_configure(config: pytest.Config) -> None:
    device = choose_device(config.getoption("densebench_device"))
    name = config.getoption("densebench_profile") or ("quick" if device == "cpu" else "default")
    config.stash[_DEVICE] = device
    config.stash[_PROFILE] = profile(name, device)
    config.stash[_NAME] = name


_DEVICE, _NAME = pytest.StashKey[str](), pytest.StashKey[str]()
_PROFILE, _SUITE = pytest.StashKey[Profile](), pytest.StashKey[Suite]()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    chosen = metafunc.config.stash[_PROFILE]
    if "timed" in metafunc.fixturenames:
        pairs = [(group, case) for group in chosen.groups if group.timed for case in group.cases]
        ids = [f"{group.name} {_contender_id(case)}" for group, case in pairs]
        metafunc.parametrize("timed", pairs, ids=ids)
    if "untimed" in metafunc.fixturenames:
        pairs = [(group, case) for group in chosen.groups if not group.timed for case in group.cases]
        metafunc.parametrize("untimed", pairs, ids=[_depth_id(case) for _, case in pairs])
    if "predicted" in metafunc.fixturenames:
        ids = [f"{case.kind} {_depth_id(case)}" for case in chosen.predicted]
        metafunc.parametrize("predicted", chosen.predicted, ids=ids)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Open the run's folder before the first case, and tell it which cases were selected."""
    config = session.config
    selected = [item for item in session.items if hasattr(item, "callspec")]
    if not selected or config.option.collectonly:
        return
    folder = config.getoption("densebench_out") or run_folder(
        config.stash[_NAME], config.stash[_DEVICE], config.getoption("densebench_resume")
    )
    try:
        store = RunStore(folder)
    except OSError as error:
        raise pytest.UsageError(str(error)) from None
    suite = Suite(
        config.stash[_PROFILE],
        store,
        config.getoption("densebench_isolate"),
        config.getoption("densebench_resume"),
    )
    for item in selected:
        pair = item.callspec.params.get("timed") or item.callspec.params.get("untimed")
        if pair:
            suite.select(*pair)
    config.stash[_SUITE] = suite


@pytest.fixture(scope="session")
def suite(pytestconfig: pytest.Config) -> Suite:
    return pytestconfig.stash[_SUITE]


def pytest_report_header(config: pytest.Config) -> str:
    chosen, device = config.stash[_PROFILE], config.stash[_DEVICE]
    cases = sum(len(group.cases) for group in chosen.groups) + len(chosen.predicted)
    where = "one GPU" if device == "cuda" else device_name_of_cpu()
    line = f"densebench: {where}, {config.stash[_NAME]} profile, {cases} cases, about {chosen.minutes:.0f} min"
    absent = sorted({c.strategy for g in chosen.groups for c in g.cases if get_contender(c.strategy).missing()})
    notes = [f"not installed: {', '.join(absent)}"] if absent else []
    if device == "cpu":
        notes.append("no GPU: full size is predicted, Triton kernels are checked in the interpreter, not timed")
    return "; ".join([line, *notes])


def device_name_of_cpu() -> str:
    import torch

    return device_name(torch.device("cpu"))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    suite = config.stash.get(_SUITE, None)
    if suite is None or not suite.records:
        return
    terminalreporter.write_line("")
    for line in summary_table(list(suite.records.values())):
        terminalreporter.write_line(line)
    terminalreporter.write_line(f"records: {suite.store.path}")
    terminalreporter.write_line("page:    python -m densebench.report")


def _contender_id(case: Case) -> str:
    return case.strategy + (" contiguous" if case.memory_format == "contiguous" else "")


def _depth_id(case: Case) -> str:
    depth = case.options.get("block_config", [""])[0]
    return f"{case.model} {_contender_id(case)} {depth}".strip()


def end(record: Record, benchmark: Any) -> None:
    """End a test as its record says; a case without a figure never passes in silence."""
    benchmark.extra_info["status"] = record.status
    benchmark.extra_info["peak_delta_bytes"] = record.peak_delta_bytes
    if record.status in ("unsupported", "skipped", "oom"):
        pytest.skip(f"{record.status}: {record.reason}")
    if record.status not in ("ok", "noisy") and record.time_s is None:
        pytest.fail(f"{record.status}: {record.reason}", pytrace=False)
