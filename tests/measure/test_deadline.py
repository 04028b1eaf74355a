"""A case that takes too long is stopped, whatever it does about it."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable
from types import ModuleType

import pytest

from densebench.measure import runner as runner_module
from densebench.measure.deadline import CaseTimeout, deadline
from densebench.measure.runner import Runner
from tests.measure.cases import fault_case


def test_a_case_that_takes_too_long_is_a_record(
    faults: ModuleType, monkeypatch: pytest.MonkeyPatch, runner: Callable[..., Runner]
) -> None:
    monkeypatch.setitem(faults.ACTS, "hangs", lambda: [time.sleep(0.01) for _ in range(10_000)])
    runner().measure([fault_case("fine", batch=3)], None)  # an import that is interrupted leaves half a module
    monkeypatch.setattr(runner_module, "TIMEOUT_SECONDS", 0.5)
    slow, fine = runner().measure([fault_case("hangs"), fault_case("fine")], None)
    assert (slow.status, slow.reason) == ("timeout", "took more than 0.5 s")
    assert fine.status == "ok"


def test_a_deadline_that_is_ignored_rings_again() -> None:
    """As it is when Python happens to run a destructor."""

    def ignores() -> None:
        with contextlib.suppress(CaseTimeout):
            time.sleep(5)
        time.sleep(5)

    with pytest.raises(CaseTimeout), deadline(0.1):
        ignores()


def test_a_deadline_leaves_no_alarm() -> None:
    with pytest.raises(CaseTimeout), deadline(0.05):
        time.sleep(5)
    with deadline(0.05):
        pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
    time.sleep(0.1)
