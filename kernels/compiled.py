"""The inner loops of the CPU path, compiled from C when first needed.

That takes three seconds or so, once a machine: the libraries are kept in the user's cache folder. Where they
cannot be had, for whatever reason, their callers make the same of PyTorch's own operators, slower; nothing here
raises.
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
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch

from densebench.cache_folder import cache_folder
from densebench.kernels.started import Started, watcher

FOLDER = Path(__file__).parent  # of the sources
SWITCH = "DENSEBENCH_COMPILED"  # "0" in the environment: do without
# What sources are compiled for, by the dtype of matrices.
_FORMS = {
    torch.float32: ("-DREAL=float",),
    torch.float64: ("-DREAL=double",),
    torch.bfloat16: ("-DREAL=float", "-DBFLOAT16"),
}
_OF_HALVES = ("passes",)  # sources that take matrices of bfloat16
_COMPILERS = ("cc", "gcc", "clang")  # tried where CC says nothing
# What loops need to become vector instructions. Nothing here changes what becomes of NaN or infinity. -fopenmp
# asks for the runtime that PyTorch's wheels for Linux have loaded already (libgomp.so.1): one pool of threads.
_VECTORIZE = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp")
_FLAGS = ("-std=c11", *_VECTORIZE, "-shared", "-fPIC")
# By source. Without contraction to multiply-adds every compiler's bits are the same; products consist of them.
_CONTRACTION = {
    "passes": "-ffp-contract=off",
    "pools": "-ffp-contract=off",
    "products": "-ffp-contract=fast",
    "convolutions": "-ffp-contract=fast",
}

_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_MATRIX = (_POINTER, _SIZE)  # address and stride of rows
_SHAPE = (_SIZE, _SIZE)
_IMAGES = 4 * (_SIZE,)  # how many, height, width, channels
_MAPS = 6 * (_SIZE,)  # planes of the filter, depth, height, width, dilation, channels
_FILTER = (_POINTER, *4 * (_SIZE,))  # address, strides of outputs, channels and taps, and how many outputs
_VECTOR = (_POINTER,)
_SUMS = (_POINTER, _SIZE)  # address and stride of threads
# By source, in the order of the C prototypes; where a loop is shared out, the number of threads comes last.
_SIGNATURES: dict[str, dict[str, tuple[Any, ...]]] = {
    "passes": {
        "fold": (*4 * _VECTOR, ctypes.c_double, _SIZE, *_VECTOR),
        "pivot": (*_MATRIX, *_SHAPE, _SIZE, *_VECTOR),
        "statistics": (*_SUMS, _SIZE, *_SHAPE, *3 * _VECTOR),
        "norm_gradients": (*_SUMS, _SIZE, *_SHAPE, *4 * _VECTOR),
        "relu_norm": (*_MATRIX, *_SHAPE, *_VECTOR, *_MATRIX, _INT),
        "column_sums": (*_MATRIX, *_SHAPE, *_VECTOR, *_SUMS, *_MATRIX, _INT),
        "relu_norm_backward": (*2 * _MATRIX, *_SHAPE, *_VECTOR, *_SUMS, *_MATRIX, _INT, _INT),
        "relu_norm_backward_in_place": (*2 * _MATRIX, *_SHAPE, *2 * _VECTOR, _INT),
        "settle": (*2 * _MATRIX, *_SHAPE, *2 * _VECTOR, *_MATRIX, _INT),
    },
    "pools": {
        "relu_norm_largest": (*_MATRIX, *_IMAGES, *_VECTOR, *_MATRIX, _INT),
        "relu_norm_mean": (*_MATRIX, *_IMAGES, *_VECTOR, *_MATRIX, _INT),
        "relu_norm_largest_backward": (
            *2 * _MATRIX, *_IMAGES, *2 * _VECTOR, *_SUMS, *_MATRIX, *_VECTOR, _INT
        ),
        "relu_norm_largest_backward_scratch": (_SIZE, _SIZE, _SIZE),
        "relu_norm_mean_backward": (*2 * _MATRIX, *_IMAGES, *_VECTOR, *_SUMS, *_MATRIX, *_VECTOR, _INT),
    },
    "products": {
        "relu_norm_product": (
            *_MATRIX, *_SHAPE, *_VECTOR, *_MATRIX, _SIZE, *_VECTOR, *_MATRIX, *_VECTOR, *_SUMS, *_VECTOR, _INT
        ),
        "relu_norm_product_scratch": (_SIZE, _SIZE, _SIZE),
        "relu_norm_product_backward": (
            *2 * _MATRIX, *_SHAPE, *_VECTOR, *_MATRIX, _SIZE, *_MATRIX, _INT, *_SUMS, *2 * _VECTOR, _INT
        ),
        "relu_norm_product_backward_scratch": (_SIZE, _SIZE, _INT, _SIZE),
    },
    "convolutions": {
        "relu_norm_convolution": (
            *_MATRIX, _SIZE, *_MAPS, *_VECTOR, *_FILTER, *_MATRIX, *_VECTOR, *_SUMS, *_VECTOR, _INT
        ),
        "relu_norm_convolution_scratch": (*_MAPS, _SIZE, _SIZE),
        "relu_norm_convolution_backward": (
            *2 * _MATRIX, _SIZE, *_MAPS, *_VECTOR, *_FILTER, *_MATRIX, *_SUMS, *2 * _VECTOR, _INT
        ),
        "relu_norm_convolution_backward_scratch": (*_MAPS, _SIZE, _INT, _SIZE),
    },
}  # fmt: skip


SOURCES = tuple(_SIGNATURES)


class Loop:
    """A compiled function; in the places of addresses it takes tensors, which it does not look at."""

    def __init__(self, name: str, function: Callable[..., None]) -> None:
        self.name, self.function = name, function

    def __call__(self, *arguments: Any) -> None:
        self.function(*[a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments])
        tell = watcher()
        if tell is not None:
            tell(Started(self.function, self.name, arguments, self))


class Build(NamedTuple):
    """The functions of a library by name, and the compiler that made it, or why there is none."""

    library: SimpleNamespace | None
    compiler: str = ""
    reason: str = ""


_folder = FOLDER
_enabled = os.environ.get(SWITCH, "1") != "0"


def library(dtype: torch.dtype, source: str = "passes") -> SimpleNamespace | None:
    """A source's functions on values of a dtype, compiled at the first call; None where there are none."""
    return _build(dtype, source).library


def settings() -> Hashable:
    """Whether, and from where: what `library` depends on besides its arguments."""
    return _enabled, _folder


def description() -> str:
    """What the inner loops are made of here: `compiled by` a compiler's version, or PyTorch's operators."""
    builds = [_build(torch.float32, source) for source in SOURCES]
    compilers = {build.compiler for build in builds if build.library is not None}
    if not compilers:
        return "PyTorch operators"
    return f"compiled by {compilers.pop()}" + (" in part" if reason() else "")


def reason() -> str:
    """Why something is not compiled here; empty if everything is."""
    reasons = [_build(torch.float32, source).reason for source in SOURCES]
    return next(filter(None, reasons), "")


@contextlib.contextmanager
def using(folder: Path | None) -> Iterator[None]:
    """Compile another folder's sources inside the `with` block, or, with None, do as without a compiler."""
    global _enabled, _folder
    before = _enabled, _folder
    _enabled, _folder = folder is not None, folder or FOLDER
    try:
        yield
    finally:
        _enabled, _folder = before


def _build(dtype: torch.dtype, source: str) -> Build:
    if dtype not in _FORMS or (dtype == torch.bfloat16 and source not in _OF_HALVES):
        return Build(None, reason=f"no compiled form for {dtype}")
    return _built(_folder, source, _FORMS[dtype]) if _enabled else Build(None, reason="switched off")


@functools.cache
def _built(folder: Path, source: str, form: tuple[str, ...]) -> Build:
    given = shlex.split(os.environ.get("CC") or "")
    candidates = [given] if given else [[name] for name in _COMPILERS]
    compiler = next((words for words in candidates if shutil.which(words[0])), None)
    if compiler is None:
        return Build(None, reason=f"no C compiler: looked for {', '.join(words[0] for words in candidates)}")
    try:
        version = _output(*compiler, "--version").splitlines()[0]
        command = (*compiler, *_FLAGS, _CONTRACTION[source], *form)
        loaded = ctypes.CDLL(str(_library_file(folder / f"{source}.c", command, version)))
        functions = {name: _typed(loaded, name, signature) for name, signature in _SIGNATURES[source].items()}
    except subprocess.CalledProcessError as error:
        return Build(None, reason=f"{compiler[0]} failed: {_first_error(error.stderr)}")
    except Exception as error:  # whatever it is, a network must not fail for want of a faster loop
        return Build(None, reason=f"{compiler[0]} failed: {type(error).__name__}")
    return Build(SimpleNamespace(**functions), version)


def _typed(loaded: ctypes.CDLL, name: str, signature: tuple[Any, ...]) -> Callable[..., Any]:
    """A loop, or a function that says how much scratch one needs."""
    function = getattr(loaded, name)
    function.argtypes = signature
    if name.endswith("_scratch"):
        function.restype = _SIZE
        return cast("Callable[..., Any]", function)
    function.restype = None
    return Loop(name, function)


def _library_file(source: Path, command: tuple[str, ...], version: str) -> Path:
    """From the cache, or compiled. The name ends in the content's hash: a damaged file is not loaded."""
    # What -march=native means here: a cache may be shared by machines.
    target = _output(*command, "-dM", "-E", "-x", "c", os.devnull)
    read = [source, *sorted(source.parent.glob("*.h"))]
    key = _hash(
        "\0".join((*command, version, target)).encode() + b"".join(b"\0" + file.read_bytes() for file in read)
    )
    folder = cache_folder() if source.parent == FOLDER else source.parent
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
