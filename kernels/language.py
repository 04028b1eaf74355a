"""Triton, or, where a platform has none, a stand-in that lets the files of this folder be imported.

There the CPU path is all there is; who launches kernels asks `AVAILABLE` first.
"""

from __future__ import annotations

from typing import Any

try:
    import triton
    import triton.language as tl

    AVAILABLE = True
except ImportError:  # macOS, Windows

    class _Absent:
        """Takes the place of `triton` and `triton.language` in decorators."""

        def __getattr__(self, name: str) -> Any:
            return lambda function=None, **_: function

    triton = tl = _Absent()
    AVAILABLE = False

__all__ = ["AVAILABLE", "tl", "triton"]
