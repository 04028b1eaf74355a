"""Fixtures for the tests of the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import kernel_cache, kernel_runs
from benchmarks.kernel_runs import KernelRunner
from densebench.operators import load_all
from densebench.store import RunStore
from tests.kernels.benchmarked import CEILINGS, SHORT

load_all()  # an operator that nothing imports yet is tested, too


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """As many after a test as before it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KernelRunner:
    monkeypatch.setattr(kernel_runs, "measure_ceilings", lambda device, dtype: CEILINGS)
    monkeypatch.setattr(kernel_cache, "MOST_COPIES", 2)
    monkeypatch.setattr(kernel_cache, "CPU_CACHE_BYTES", 2**16)
    return KernelRunner(RunStore(tmp_path), SHORT, progress=lambda line: None)
