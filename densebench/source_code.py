"""The code that a measurement or prediction comes from, and its hash: a change of it makes them another code's."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_LANGUAGES = (".py", ".c", ".h")
_ROOMS = ("report", "training")  # nothing that is measured or predicted comes through them


def package_files() -> set[Path]:
    """The files of this package that measure, predict, or are measured."""
    folders = [_PACKAGE, (_PACKAGE / "kernels").resolve()]  # a link, which rglob does not follow
    sources = {path for folder in folders for path in folder.rglob("*") if path.suffix in _LANGUAGES}
    rooms = {path for room in _ROOMS for path in (_PACKAGE / room).rglob("*")}
    return sources - rooms - {_PACKAGE / "train.py"}


def benchmark_files() -> set[Path]:
    """The files of the benchmarks that time kernels, or measure around what does; none in an installed package."""
    folder = _PACKAGE.parent / "benchmarks"
    if not (folder / "kernel_runs.py").is_file():  # somebody else's folder of that name
        return set()
    return {*folder.glob("kernel_*.py"), folder / "suite.py"}


def hash_of(files: Iterable[Path]) -> str:
    """16 hexadecimal digits, the same wherever the package lies."""
    digest = hashlib.sha256()
    for path in sorted(files, key=lambda path: (path.parent.name, path.name)):
        digest.update(f"{path.parent.name}/{path.name}".encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
