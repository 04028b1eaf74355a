"""Hypothesis; where it is not installed, tests that draw from it are skipped, and those beside them are not."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest

try:
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st
except ImportError:
    HealthCheck = st = mock.MagicMock()

    def given(*_: Any, **__: Any) -> Any:
        return pytest.mark.skip(reason="hypothesis is not installed")

    def settings(*_: Any, **__: Any) -> Any:
        return lambda test: test


__all__ = ["HealthCheck", "given", "settings", "st"]
