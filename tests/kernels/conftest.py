"""Fixtures for the tests of the kernels."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import kernel_cache, kernel_runs
from benchmarks.kernel_runs import KernelRunner
from densebench.store import RunStore
from tests.kernels.benchmarked import CEILINGS, SHORT


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KernelRunner:
    monkeypatch.setattr(kernel_runs, "measure_ceilings", lambda device, dtype: CEILINGS)
    monkeypatch.setattr(kernel_cache, "MOST_COPIES", 2)
    monkeypatch.setattr(kernel_cache, "CPU_CACHE_BYTES", 2**16)
    return KernelRunner(RunStore(tmp_path), SHORT, progress=lambda line: None)
