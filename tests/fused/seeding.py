"""Seeding a fault into the code that runs: one piece of one function's source replaced, for the time of a check.

The source is taken from the file as it is, and the piece must stand in it exactly once, so a fault that no longer
applies fails instead of passing.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import re
import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import torch

from densebench.cache_folder import cache_folder
from densebench.kernels import compiled

C = (".c", ".h")  # the ends of modules that are not Python


class Fault(NamedTuple):
    """What is broken: `old` becomes `new` in `module`'s function or kernel `place`; `check` has to notice.

    With `uncompiled` the CPU path runs as it does without a C compiler.
    """

    name: str
    module: str
    place: str
    old: str
    new: str
    check: str
    uncompiled: bool = False


@contextlib.contextmanager
def seeded(fault: Fault, folder: Path) -> Iterator[None]:
    """The fault is in the code inside the `with` block.

    A plain function gets other code, wherever it has been registered already; a Triton kernel is compiled anew
    from a file, which its interpreter reads, and so is C.
    """
    if fault.module.endswith(C):
        with compiled.using(_mutated_sources(fault, folder)):
            for source in compiled.SOURCES:
                assert compiled.library(torch.float64, source) is not None, compiled.reason()
            yield
        return
    with compiled.using(None) if fault.uncompiled else contextlib.nullcontext(), _seeded_python(fault, folder):
        yield


def _mutated_sources(fault: Fault, folder: Path) -> Path:
    """A folder with all C sources, one of them mutated, and what has been compiled of the others."""
    for file in compiled.FOLDER.glob("*.[ch]"):
        shutil.copy(file, folder)
    for built in cache_folder().glob("*.so"):  # found by what it was made of: a fault's own is made anew
        (folder / built.name).symlink_to(built)
    file = folder / Path(fault.module).name
    source = file.read_text()
    body = r"(?:[^\n]*}$|.*?^}$)"  # on one line, or up to the first brace that begins one
    found = re.search(rf"^\w[^\n]*\b{fault.place}\([^;]*?\) {{{body}", source, re.MULTILINE | re.DOTALL)
    assert found is not None, fault.place
    function = found.group()
    assert function.count(fault.old) == 1, (
        f"{fault.old!r} stands {function.count(fault.old)} times in {fault.place}"
    )
    file.write_text(source.replace(function, function.replace(fault.old, fault.new)))
    return folder


@contextlib.contextmanager
def _seeded_python(fault: Fault, folder: Path) -> Iterator[None]:
    module = importlib.import_module(f"densebench.{fault.module}")
    owner, function = _found(module, fault.place)
    kernel = function if not isinstance(function, FunctionType) else None
    plain = function if kernel is None else kernel.fn
    source = textwrap.dedent(inspect.getsource(plain))
    assert source.count(fault.old) == 1, f"{fault.old!r} stands {source.count(fault.old)} times in {fault.place}"
    file = folder / f"{fault.name.replace(' ', '_')}.py"
    file.write_text(source.replace(fault.old, fault.new))
    mutated = _defined(file, plain.__name__, module)
    if kernel is None:
        original = plain.__code__
        plain.__code__ = mutated.__code__
        try:
            yield
        finally:
            plain.__code__ = original
    else:
        setattr(owner, plain.__name__, mutated)
        try:
            yield
        finally:
            setattr(owner, plain.__name__, kernel)


def _found(module: Any, place: str) -> tuple[Any, Any]:
    owner = module
    *path, name = place.split(".")
    for part in path:
        owner = getattr(owner, part)
    found = inspect.getattr_static(owner, name)
    return owner, inspect.unwrap(found) if isinstance(found, FunctionType) else found


def _defined(file: Path, name: str, module: Any) -> Any:
    """The definition in `file`, with the module's globals; its decorators apply (a kernel stays a kernel)."""
    names = dict(vars(module))
    source = file.read_text()
    kept = source if "@triton.jit" in source else source[source.index("def ") :]
    exec(compile("from __future__ import annotations\n" + kept, str(file), "exec"), names)
    if "@triton.jit" in source:  # the interpreter reads the file
        file.write_text("from __future__ import annotations\n" + kept)
    return names[name]
