"""The inner loops of the CPU path in C (`passes.c`), compiled for this machine when they are first needed.

That takes a third of a second, once: the library is kept in the user's cache folder. Where there is no C compiler
`passes` makes the same of PyTorch's own operators, slower.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("passes.c")
SWITCH = "DENSEBENCH_COMPILED"  # "0" in the environment: do without
REALS = {torch.float32: "float", torch.float64: "double"}
# What loops need to become vector instructions. Nothing here changes what happens to NaN or infinity, and -fopenmp
# finds the runtime that PyTorch has loaded already, so both use one pool of threads.
_FLAGS = (
    "-std=c11",
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
    "-shared",
    "-fPIC",
)

_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_MATRIX = (_POINTER, _SIZE)  # address and stride of rows
_SHAPE = (_SIZE, _SIZE)
_VECTOR = (_POINTER,)
_SIGNATURES = {
    "relu_norm": (*_MATRIX, *_SHAPE, *2 * _VECTOR, *_MATRIX, _INT),
    "column_sums": (*_MATRIX, *_SHAPE, *2 * _VECTOR, *_MATRIX, _INT),
    "relu_norm_backward": (*2 * _MATRIX, *_SHAPE, *4 * _VECTOR, *_MATRIX, _INT, _INT),
    "relu_norm_backward_in_place": (*2 * _MATRIX, *_SHAPE, *5 * _VECTOR, _INT),
    "settle": (*2 * _MATRIX, *_SHAPE, *3 * _VECTOR, *_MATRIX, _INT),
}

_source = SOURCE
_enabled = os.environ.get(SWITCH, "1") != "0"


def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The functions of `passes.c` on values of a dtype; None where they cannot be had, or not on such values."""
    if not _enabled or dtype not in REALS:
        return None
    return _loaded(_source, REALS[dtype])[0]


def description() -> str:
    """By what the CPU path runs: the compiler's version, or why there is none."""
    if not _enabled:
        return f"PyTorch operators ({SWITCH}=0)"
    loaded, message = _loaded(_source, "float")
    return f"compiled by {message}" if loaded is not None else f"PyTorch operators ({message})"


@contextlib.contextmanager
def using(source: Path | None) -> Iterator[None]:
    """Compile another source inside the `with` block, or, with None, do as on a machine without a compiler."""
    global _enabled, _source
    before = _enabled, _source
    _enabled, _source = source is not None, source or SOURCE
    try:
        yield
    finally:
        _enabled, _source = before


@functools.cache
def _loaded(source: Path, real: str) -> tuple[ctypes.CDLL | None, str]:
    """The library and its compiler's version, or None and a reason."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return None, "no C compiler found"
    try:
        version = _output(compiler, "--version").splitlines()[0]
        command = (compiler, *_FLAGS, f"-DREAL={real}")
        loaded = ctypes.CDLL(str(_built(source, command, version)))
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        return None, f"{compiler} failed: {error}"
    for name, signature in _SIGNATURES.items():
        getattr(loaded, name).argtypes = signature
    return loaded, version


def _built(source: Path, command: tuple[str, ...], version: str) -> Path:
    """The library's file: from the cache, or compiled."""
    text = source.read_bytes()
    key = hashlib.sha256("\0".join((*command, version, _processor())).encode() + text).hexdigest()[:16]
    name = f"{source.stem}-{key}.so"
    kept = (_cache_folder() if source == SOURCE else source.parent) / name
    if kept.exists():
        return kept
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=kept.parent))
    except OSError:  # a home that cannot be written
        folder = Path(tempfile.mkdtemp())
        kept = folder / name
    _output(*command, str(source), "-o", str(folder / "new.so"))
    os.replace(folder / "new.so", kept)  # at once: another process may be looking
    with contextlib.suppress(OSError):
        folder.rmdir()
    return kept


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "densebench"


def _processor() -> str:
    """What -march=native depends on: a home may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout
