"""The C sources as other processors run them."""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from densebench.kernels import compiled

NARROWER = ("-mno-avx512f", "-mno-avx512f -mno-avx2 -mno-avx")


@contextlib.contextmanager
def compiled_with(flags: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, everything is compiled anew, by gcc with these flags; where there is none, the test is skipped."""
    for file in compiled.FOLDER.glob("*.[ch]"):
        shutil.copy(file, folder)
    monkeypatch.setenv("CC", f"gcc {flags}")
    monkeypatch.setattr(compiled, "_built", functools.cache(compiled._built.__wrapped__))
    with compiled.using(folder):
        for source in compiled.SOURCES:
            if compiled.library(torch.float32, source) is None:
                pytest.skip(f"no compiler that takes {flags}: {compiled.reason()}")
        yield
