"""Every strategy as a fixture, and markers that never pass in silence."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # before any kernel is defined: Triton decides then
    os.environ.setdefault("TRITON_INTERPRET", "1")

from densebench.registry import get_strategy, list_strategies
from tests.interpreter import index_arrays
from tests.networks import temporary_strategy

PLAIN = "plain"  # a strategy of the tests alone

index_arrays()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-gpu",
        action="store_true",
        help="fail, rather than skip, what needs a CUDA device where there is none",
    )


def pytest_configure(config: pytest.Config) -> None:
    # The networks are tiny: on a busy machine a second thread only waits, for minutes where one takes seconds.
    torch.set_num_threads(1)
    # What a script runs behind it (`make test &`) ignores interrupts, and so do its children: tests that send one
    # would wait for nothing.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "nightly" in config.option.markexpr or any("::" in argument for argument in config.args):
        return
    for item in items:
        if item.get_closest_marker("nightly"):
            item.add_marker(pytest.mark.skip(reason="nightly: minutes long; run with -m nightly"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        lack(item.config, "needs a CUDA device, and torch sees none")


def lack(config: pytest.Config, reason: str) -> None:
    """End a test that this machine cannot run: a skip, or a failure where a GPU was promised."""
    (pytest.fail if config.getoption("--require-gpu") else pytest.skip)(reason)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`strategy`: all that are held against naive. `every_strategy`: with naive, where the truth is another.

    A file's own STRATEGIES are the only ones in it. With WITH_PLAIN there is a copy of naive, too, for what is
    said of strategies that call every module.
    """
    names = getattr(metafunc.module, "STRATEGIES", list_strategies())
    if getattr(metafunc.module, "WITH_PLAIN", False):
        names = [*names, PLAIN]
    if "strategy" in metafunc.fixturenames:
        metafunc.parametrize("strategy", [name for name in names if name != "naive"], indirect=True)
    if "every_strategy" in metafunc.fixturenames:
        metafunc.parametrize("every_strategy", names, indirect=True)
    if "device" in metafunc.fixturenames:
        gpu = torch.cuda.is_available() or metafunc.config.getoption("--require-gpu")
        devices = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)] if gpu else ["cpu"]
        metafunc.parametrize("device", devices, indirect=True)


def _runnable(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == PLAIN:
        with temporary_strategy(PLAIN, get_strategy("naive").function) as name:
            yield name
        return
    missing = get_strategy(request.param).missing()
    if missing:
        lack(request.config, f"{request.param}: {missing}")
    yield request.param


@pytest.fixture
def strategy(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a strategy other than naive that this machine can run."""
    yield from _runnable(request)


@pytest.fixture
def every_strategy(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a strategy that this machine can run."""
    yield from _runnable(request)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and the GPU where there is one or one was promised."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """No test sees the random numbers, the flags or the gradient mode of the one before it."""
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)
    assert torch.is_grad_enabled(), "a test left gradients switched off"
    assert torch.get_default_dtype() == torch.float32, "a test left another default dtype"


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parents[1]
