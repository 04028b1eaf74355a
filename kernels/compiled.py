"""The inner loops of the CPU path in C (`passes.c`), compiled for this machine when they are first needed.

That takes a third of a second, once: the library is kept in the user's cache folder. Where it cannot be had, for
whatever reason, `passes` and `norm` make the same of PyTorch's own operators, slower; nothing here raises.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from densebench.cache_folder import cache_folder

SOURCE = Path(__file__).with_name("passes.c")
SWITCH = "DENSEBENCH_COMPILED"  # "0" in the environment: do without
REALS = {torch.float32: "float", torch.float64: "double"}
_COMPILERS = ("cc", "gcc", "clang")  # tried where CC says nothing
# What loops need to become vector instructions. Nothing here changes what becomes of NaN or infinity; without
# contraction to multiply-adds every compiler's bits are the same. -fopenmp asks for the runtime that PyTorch's
# wheels for Linux have loaded already (libgomp.so.1): one pool of threads.
_VECTORIZE = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp")
_FLAGS = ("-std=c11", *_VECTORIZE, "-shared", "-fPIC")

_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_MATRIX = (_POINTER, _SIZE)  # address and stride of rows
_SHAPE = (_SIZE, _SIZE)
_VECTOR = (_POINTER,)
_SUMS = (_POINTER, _SIZE)  # address and stride of threads
# In the order of the C prototypes; where a loop is shared out, the number of threads comes last.
_SIGNATURES = {
    "fold": (*4 * _VECTOR, ctypes.c_double, _SIZE, *_VECTOR),
    "pivot": (*_MATRIX, *_SHAPE, _SIZE, *_VECTOR),
    "statistics": (*_SUMS, _SIZE, *_SHAPE, *3 * _VECTOR),
    "norm_gradients": (*_SUMS, _SIZE, *_SHAPE, *4 * _VECTOR),
    "relu_norm": (*_MATRIX, *_SHAPE, *_VECTOR, *_MATRIX, _INT),
    "column_sums": (*_MATRIX, *_SHAPE, *_VECTOR, *_SUMS, *_MATRIX, _INT),
    "relu_norm_backward": (*2 * _MATRIX, *_SHAPE, *_VECTOR, *_SUMS, *_MATRIX, _INT, _INT),
    "relu_norm_backward_in_place": (*2 * _MATRIX, *_SHAPE, *2 * _VECTOR, _INT),
    "settle": (*2 * _MATRIX, *_SHAPE, *2 * _VECTOR, *_MATRIX, _INT),
}


class Build(NamedTuple):
    """The library and the compiler that made it, or why there is none."""

    library: ctypes.CDLL | None
    compiler: str = ""
    reason: str = ""


_source = SOURCE
_enabled = os.environ.get(SWITCH, "1") != "0"


def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The functions of `passes.c` on values of a dtype, compiled at the first call; None where there are none."""
    return _build(dtype).library


def description() -> str:
    """What the passes are made of here: `compiled by` a compiler's version, or PyTorch's operators."""
    build = _build(torch.float32)
    return "PyTorch operators" if build.library is None else f"compiled by {build.compiler}"


def reason() -> str:
    """Why nothing is compiled here; empty if something is."""
    return _build(torch.float32).reason


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


def _build(dtype: torch.dtype) -> Build:
    if dtype not in REALS:
        return Build(None, reason=f"no compiled form for {dtype}")
    return _built(_source, REALS[dtype]) if _enabled else Build(None, reason="switched off")


@functools.cache
def _built(source: Path, real: str) -> Build:
    given = shlex.split(os.environ.get("CC") or "")
    candidates = [given] if given else [[name] for name in _COMPILERS]
    compiler = next((words for words in candidates if shutil.which(words[0])), None)
    if compiler is None:
        return Build(None, reason=f"no C compiler: looked for {', '.join(words[0] for words in candidates)}")
    try:
        version = _output(*compiler, "--version").splitlines()[0]
        command = (*compiler, *_FLAGS, f"-DREAL={real}")
        loaded = ctypes.CDLL(str(_library_file(source, command, version)))
        for name, signature in _SIGNATURES.items():
            function = getattr(loaded, name)
            function.argtypes, function.restype = signature, None
    except subprocess.CalledProcessError as error:
        return Build(None, reason=f"{compiler[0]} failed: {_first_error(error.stderr)}")
    except Exception as error:  # whatever it is, a network must not fail for want of a faster loop
        return Build(None, reason=f"{compiler[0]} failed: {type(error).__name__}")
    return Build(loaded, version)


def _library_file(source: Path, command: tuple[str, ...], version: str) -> Path:
    """From the cache, or compiled. The name ends in the content's hash: a damaged file is not loaded."""
    # What -march=native means here: a cache may be shared by machines.
    target = _output(*command, "-dM", "-E", "-x", "c", os.devnull)
    key = _hash("\0".join((*command, version, target)).encode() + source.read_bytes())
    folder = cache_folder() if source == SOURCE else source.parent
    for found in folder.glob(f"{source.stem}-{key}-*.so"):
        if found.stem.endswith(_hash(found.read_bytes())):
            return found
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        new = Path(scratch) / "new.so"
        _output(*command, str(source), "-o", str(new))
        kept = folder / f"{source.stem}-{key}-{_hash(new.read_bytes())}.so"
        new.replace(kept)  # at once: another process may be looking
    return kept


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _first_error(messages: str) -> str:
    """A compiler's first error without its place, which differs between checkouts."""
    lines = [line for line in messages.splitlines() if "error" in line] or messages.splitlines() or ["no message"]
    return lines[0].rsplit("error: ", 1)[-1].strip()


def _output(*command: str) -> str:
    english = {**os.environ, "LC_ALL": "C"}
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=60, check=True, env=english
    ).stdout
