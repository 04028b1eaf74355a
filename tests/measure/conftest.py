"""Contenders and strategies that exist for one test only."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from densebench import contenders, registry
from densebench.measure.runner import Runner
from densebench.measure.timing import Effort
from densebench.store import RunStore


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Registers the contenders that go wrong, for this test."""
    monkeypatch.setattr(contenders, "_peers", dict(contenders._peers))
    sys.modules.pop("tests.measure.faults", None)
    return importlib.import_module("tests.measure.faults")


@pytest.fixture
def own_strategies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strategies that the test registers are gone after it."""
    registry.list_strategies()
    monkeypatch.setattr(registry, "_strategies", dict(registry._strategies))


@pytest.fixture
def runner(tmp_path: Path) -> Callable[..., Runner]:
    """Makes runners that write to the test's folder and spend little time."""

    def make(resume: bool = False, effort: Effort | None = None) -> Runner:
        return Runner(RunStore(tmp_path / "run"), effort or Effort(rounds=3, seconds=0.1, least=2), resume)

    return make
