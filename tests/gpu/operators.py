"""Problems of tests/kernels moved to a device, and into buffers so large that 32-bit offsets wrap around."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.kernels.problems import Problem, Shape, Values

# Rows before a problem's own, in a buffer 64 columns wide: 2^31 elements.
ROWS_BEFORE = 2**25
COLUMNS = 64


def arguments_on(problem: Problem, device: torch.device) -> list[Any]:
    """The arguments on a device, each slice within a buffer as wide as its own."""
    return [_moved(a, device) if isinstance(a, Tensor) else a for a in problem.arguments]


def solve_on(problem: Problem, device: torch.device) -> Values:
    """Run the operator on a device, as a caller does; what it produced, on the CPU."""
    arguments = arguments_on(problem, device)
    outcome = getattr(torch.ops.densebench, problem.operator)(*arguments)
    return _read(problem, arguments, outcome)


def far_shape(dtype: torch.dtype = torch.float16) -> Shape:
    """One image of 8x8 pixels; columns and those beside them make 64, and there are more outputs.

    Its norm is by running statistics: by those of the batch the rows before would count.
    """
    return Shape(1, 8, 8, columns=40, outputs=72, extra=COLUMNS - 40, dtype=dtype, by_batch=False)


def solve_far(problem: Problem, device: torch.device, rows_before: int) -> Values:
    """The same at the end of buffers with so many rows of zeros before, whose results nobody looks at."""
    rows = far_shape().rows
    far = [_embedded(a, device, rows, rows_before) if isinstance(a, Tensor) else a for a in problem.arguments]
    outcome = getattr(torch.ops.densebench, problem.operator)(*far)
    ends = [_end(a, b) if isinstance(a, Tensor) else a for a, b in zip(far, problem.arguments, strict=True)]
    return _read(problem, ends, outcome)


def _read(problem: Problem, arguments: list[Any], outcome: Any) -> Values:
    """What the problem makes of arguments and outcome, both brought back to the CPU."""
    back = [a.cpu() if isinstance(a, Tensor) else a for a in arguments]
    results = None if outcome is None else tuple(t.cpu() for t in outcome)
    return problem.produced(back, results)


def _moved(argument: Tensor, device: torch.device) -> Tensor:
    whole = torch.empty(0, dtype=argument.dtype).set_(argument.untyped_storage()).to(device, copy=True)
    return whole.as_strided(argument.shape, argument.stride(), argument.storage_offset())


def _embedded(argument: Tensor, device: torch.device, rows: int, rows_before: int) -> Tensor:
    """A map or a matrix over pixels at the end of a larger one; anything else as it is."""
    if argument.dim() == 2 and argument.shape[0] == rows:
        size, width = (rows_before + rows,), _width(argument)
    elif argument.dim() == 4:  # one image of `rows` pixels, or of fewer where it is pooled
        size, width = (rows_before // rows + 1, *argument.shape[1:3]), _width(argument[0, :, 0])
    else:
        return _moved(argument, device)
    whole = torch.zeros(*size, width, dtype=argument.dtype, device=device)
    part = whole[..., : argument.shape[-1]]
    _end(part, argument).copy_(argument)
    return part


def _width(matrix: Tensor) -> int:
    """Columns of the buffer that a slice lies in; a dense matrix is all of its own."""
    return COLUMNS if matrix.shape[-1] < COLUMNS and matrix.stride(0) % COLUMNS == 0 else matrix.shape[-1]


def _end(large: Tensor, small: Tensor) -> Tensor:
    return large if large.shape == small.shape else large[-small.shape[0] :]
