"""Predictions kept on disk: a trace of a deep network takes seconds, and its answer never changes.

A key holds everything an answer depends on, the sources of this package among it, so that nothing stale is ever
found. A folder that cannot be written costs time, not the answer.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from densebench.cache_folder import cache_folder
from densebench.kernels import compiled
from densebench.kernels.products import multiplies_halves
from densebench.source_code import hash_of, package_files


def cached(question: dict[str, Any], answer: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The answer to a question (both JSON), from the disk where it was asked before."""
    scratch = {
        "cpu_kernels": compiled.description(),
        "threads": torch.get_num_threads(),  # each has its own
        "halves": multiplies_halves(),  # whose tiles are half as large
    }
    text = json.dumps(question | versions() | scratch, sort_keys=True)
    path = folder() / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    except (OSError, ValueError):
        pass
    found = answer()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(found), encoding="utf-8")
        partial.replace(path)  # whoever reads meanwhile finds all of it or nothing
    except OSError:
        pass
    return found


def folder() -> Path:
    """Where answers lie."""
    return cache_folder() / "predictions"


@functools.cache
def versions() -> dict[str, Any]:
    """What an answer depends on besides the question."""
    return {
        "python": list(sys.version_info[:2]),
        "torch": torch.__version__,
        "sources": hash_of(package_files()),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }
