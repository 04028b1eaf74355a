"""Every operator in `densebench/kernels/`, imported whether a strategy calls it yet or not."""

from __future__ import annotations

import importlib
import pkgutil

from densebench import kernels
from densebench.kernels.library import IMPLEMENTATIONS


def load_all() -> tuple[str, ...]:
    """Import every file of the kernels; the names of all operators, as in `torch.ops.densebench`."""
    for module in pkgutil.iter_modules(kernels.__path__):
        importlib.import_module(f"{kernels.__name__}.{module.name}")
    return tuple(sorted(IMPLEMENTATIONS))
