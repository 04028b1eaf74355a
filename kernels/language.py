"""Triton, or, where a platform has none, a stand-in that lets the files of this folder be imported.

There the CPU path is all there is; the stand-in is never launched, because no tensor can be on a CUDA device.
"""

from __future__ import annotations

from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows

    class _Absent:
        """Takes the place of `triton` and `triton.language` in decorators."""

        def __getattr__(self, name: str) -> Any:
            return lambda function=None, **_: function

    triton = tl = _Absent()

__all__ = ["tl", "triton"]
