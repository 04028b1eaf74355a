"""pytest's side of the benchmarks: options, which cases become tests, the header and the final table."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.cases import Group
from benchmarks.profiles import Profile, profile
from benchmarks.suite import DATA, DEVICE, PROFILE, PROFILE_NAME, Suite, choose_device, run_folder, short_name
from densebench.contenders import get_contender
from densebench.counting import counted
from densebench.measure.device import DeviceLostError, tune
from densebench.measure.environment import device_name
from densebench.records import Case
from densebench.report.console import ended_in_words, summary_table
from densebench.store import RunStore, StoreError, latest

PROFILES = ("quick", "default", "full", "tiny")
_SUITE = pytest.StashKey[Suite]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("densebench")
    group.addoption(
        "--densebench-profile",
        choices=PROFILES,
        metavar="quick|default|full",
        help="how much to measure (quick on a CPU, default on a GPU)",
    )
    group.addoption("--densebench-device", choices=["auto", "cpu", "cuda"], default="auto")
    group.addoption("--densebench-out", type=Path, help="folder of this run (reports/data/<run>)")
    group.addoption("--densebench-isolate", action="store_true", help="a fresh process for every case")
    group.addoption("--densebench-resume", action="store_true", help="skip what is already measured")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("numprocesses", None) or hasattr(config, "workerinput"):
        raise pytest.UsageError("benchmarks measure one case at a time; leave out -n")
    try:
        device = choose_device(config.getoption("densebench_device"))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    tune(device)
    config.option.benchmark_columns = ["median", "iqr", "rounds"]
    name = config.getoption("densebench_profile") or ("quick" if device == "cpu" else "default")
    config.stash[DEVICE] = device
    config.stash[PROFILE] = profile(name, device)
    config.stash[PROFILE_NAME] = name


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    chosen = metafunc.config.stash[PROFILE]
    if "timed" in metafunc.fixturenames:
        pairs = _pairs(chosen, timed=True)
        metafunc.parametrize("timed", pairs, ids=[f"{group.name} {short_name(case)}" for group, case in pairs])
    if "untimed" in metafunc.fixturenames:
        pairs = _pairs(chosen, timed=False)
        metafunc.parametrize("untimed", pairs, ids=[f"{case.kind} {short_name(case)}" for _, case in pairs])
    if "predicted" in metafunc.fixturenames:
        ids = [f"{case.kind} {short_name(case)}" for case in chosen.predicted]
        metafunc.parametrize("predicted", chosen.predicted, ids=ids)


def _pairs(chosen: Profile, timed: bool) -> list[tuple[Group, Case]]:
    return [(group, case) for group in chosen.groups if group.timed is timed for case in group.cases]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Open the run's folder before the first case, and tell it which cases were selected."""
    config = session.config
    selected = _ours(session.items)
    if not selected or config.option.collectonly:
        return
    resume, name = config.getoption("densebench_resume"), config.stash[PROFILE_NAME]
    folder = config.getoption("densebench_out") or run_folder(name, config.stash[DEVICE], resume)
    try:
        store = RunStore(folder)
        store.claim()
    except StoreError as error:
        raise pytest.UsageError(str(error)) from None
    suite = Suite(
        config.stash[PROFILE], store, config.getoption("densebench_isolate"), resume, _progress_of(config)
    )
    for item in selected:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        pair = parameters.get("timed") or parameters.get("untimed")
        if pair:
            suite.select(*pair)
    config.stash[_SUITE] = suite


def _ours(items: list[pytest.Item]) -> list[pytest.Item]:
    """The tests that measure something; pytest leaves one named so where a profile has no case for it."""
    fixtures = {"suite", "kernels"}
    mine = [item for item in items if fixtures & set(getattr(item, "fixturenames", ()))]
    return [item for item in mine if "NOTSET" not in item.name]


def _progress_of(config: pytest.Config) -> Callable[[str], None]:
    """Writes lines to stderr at once, past pytest's capture."""
    capture = config.pluginmanager.getplugin("capturemanager")
    terminal = config.pluginmanager.getplugin("terminalreporter")

    def say(line: str) -> None:
        with capture.global_and_fixture_disabled() if capture else contextlib.nullcontext():
            if terminal:
                terminal.flush()
            print(f"\n  {line} ", end="", file=sys.stderr, flush=True)  # pytest's dot ends the line

    return say


@pytest.fixture(scope="session")
def suite(pytestconfig: pytest.Config) -> Suite:
    return pytestconfig.stash[_SUITE]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """A disk that takes no more records, or a device that answers no more, ends the run."""
    try:
        return (yield)
    except DeviceLostError as error:
        pytest.exit(
            f"densebench: {error.case.label()}: {error}; nothing more can run on it in this process. "
            "--densebench-resume goes on with the other cases",
            returncode=pytest.ExitCode.TESTS_FAILED,
        )
    except StoreError as error:
        pytest.exit(f"densebench: {error}", returncode=pytest.ExitCode.TESTS_FAILED)


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> list[str] | None:
    suite = config.stash.get(_SUITE, None)
    if suite is None:
        return None
    done = len(suite.runner.done)
    held = f" ({counted(done, 'case')} in it {'is' if done == 1 else 'are'} kept)" if done else ""
    lines = [_header(config, items), f"densebench: records go to {suite.store.path}{held}"]
    return lines + ([f"densebench: {suite.runner.none_applies}"] if suite.runner.none_applies else [])


def _header(config: pytest.Config, items: list[pytest.Item]) -> str:
    """Where, what and how long in one line, and what is not run and why."""
    chosen, device = config.stash[PROFILE], config.stash[DEVICE]
    where = "one GPU" if device == "cuda" else device_name(torch.device("cpu"))
    minutes = f"about {chosen.minutes:.0f} min" if chosen.minutes >= 1 else "less than a minute"
    cases = counted(len(_ours(items)), "case")
    line = f"densebench: {where}, {config.stash[PROFILE_NAME]} profile, {cases}, {minutes} for all"
    names = {case.strategy for group in chosen.groups for case in group.cases}
    absent = sorted(reason for name in names if (reason := get_contender(name).missing()))
    notes = [f"not run: {'; '.join(absent)}"] if absent else []
    if device == "cpu":
        notes.append("no GPU: full size is predicted, Triton kernels are checked in the interpreter, not timed")
    return "; ".join([line, *notes])


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A run without a single figure is no success."""
    suite = session.config.stash.get(_SUITE, None)
    if exitstatus != pytest.ExitCode.OK or session.config.option.collectonly:
        return
    if suite is None and not session.items:  # a file may have skipped itself, which pytest takes for a test
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED
    if suite is not None and not _figures(suite):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_unconfigure(config: pytest.Config) -> None:
    suite = config.stash.get(_SUITE, None)
    if suite is not None:
        suite.close()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> Generator[None, Any, Any]:
    """Our table comes last, also after an interruption or a regression that pytest-benchmark found."""
    try:
        return (yield)
    finally:
        suite = config.stash.get(_SUITE, None)
        if suite is not None:
            for line in _summary(suite):
                terminalreporter.write_line(line)


def _summary(suite: Suite) -> list[str]:
    records = latest(suite.store.read())
    if not _figures(suite):
        return ["", "densebench: nothing was measured", *{ended_in_words(r) for r in records}]
    standard = suite.store.folder.resolve().parent == DATA
    command = "python -m densebench.report" + ("" if standard else f" {suite.store.folder}")
    return [*summary_table(records), "", f"records: {suite.store.path}", f"page:    {command}"]


def _figures(suite: Suite) -> bool:
    """Whether there is any; what fits into a card is a predicted peak alone."""
    known = ((r.peak_delta_bytes, r.predicted_peak_bytes, r.time_s) for r in suite.store.read())
    return any(figure is not None for figures in known for figure in figures)
