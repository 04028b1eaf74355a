"""What the tests of the kernel benchmark share: operators on few pixels."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks.cases import Group
from benchmarks.kernel_cases import kernel_groups
from benchmarks.kernel_facts import CONVOLUTIONS, POOLS
from densebench.kernels.convolutions import not_compiled
from densebench.measure import ceilings
from densebench.measure.timing import Effort
from densebench.records import Case

OPERATORS = sorted({group.cases[0].model for group in kernel_groups("default", "cpu")})
SHORT = Effort(rounds=3, seconds=0.1, least=2)
CEILINGS = ceilings.Ceilings(10.0, 0.1)


def small(operator: str, dtype: str = "float32", strategy: str = "ours") -> Case:
    """An operator on two images of block 4's 7x7 pixels, or of 6x6 where they are pooled."""
    group = next(g for g in reversed(kernel_groups("default", "cpu")) if g.cases[0].model == operator)
    case = group.cases[0]
    side = 6 if operator in POOLS else 7
    options = {**case.options, "rows": 2 * side * side}
    shape = (case.input_shape[0], side, side)
    return dataclasses.replace(case, batch=2, input_shape=shape, dtype=dtype, options=options, strategy=strategy)


def group_of(*cases: Case) -> Group:
    return Group("a group", cases)


def skip_what_is_not_compiled(operator: str, dtype: str = "float32") -> None:
    reason = not_compiled(getattr(torch, dtype)) if operator in CONVOLUTIONS else None
    if reason is not None:
        pytest.skip(reason)
