"""A machine with a GPU may have little else: these tests need PyTorch and pytest alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

COLLECT = """
import sys
for package in ("hypothesis", "pytest_benchmark", "pytest_timeout", "xdist"):
    sys.modules[package] = None  # importing it fails
import pytest
raise SystemExit(pytest.main(["tests/gpu", "--collect-only", "-q", "-pno:cacheprovider"]))
"""


def test_these_tests_need_no_other_packages(repository: Path) -> None:
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", COLLECT],
        cwd=repository,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-1000:]
    assert "tests/gpu/test_operators.py::test_values" in done.stdout
