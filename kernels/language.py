"""Triton, or, where a platform has none, a stand-in that lets the files of this folder be imported.

There the CPU path is all there is; who launches kernels asks `AVAILABLE` first.
"""

from __future__ import annotations

from typing import Any

try:
    import triton
    import triton.language as tl

    AVAILABLE = True
    VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
except ImportError:  # macOS, Windows

    class _Absent:
        """Takes the place of `triton` and `triton.language` in decorators."""

        def __getattr__(self, name: str) -> Any:
            return lambda function=None, **_: function

    triton = tl = _Absent()
    AVAILABLE = False
    VERSION = (0, 0)

__all__ = ["AVAILABLE", "VERSION", "tl", "triton"]
