"""Registration: one call makes an operator known to everything in PyTorch that needs to know it.

Operators are registered through `torch.library.Library`, whose calls cost about 2 us; the decorator
`torch.library.custom_op` costs 18 us for an operator that writes into its arguments, which over the hundreds
of calls of a training step is as much as the step itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

LIBRARY = torch.library.Library("densebench", "DEF")

# Bytes that an operator allocates inside and frees before it returns, by device type: a function of its
# arguments. Memory trackers add them while the operator runs; a test holds them against the allocator.
WORKSPACE: dict[torch._ops.OpOverloadPacket, Callable[..., int]] = {}


def operator(
    schema: str,
    *,
    cpu: Callable[..., Any],
    cuda: Callable[..., Any],
    fake: Callable[..., Any],
    workspace: Callable[..., int],
    flops: Callable[..., int] | None = None,
) -> Any:
    """Define `densebench::<schema>` and return it as a callable.

    Args:
        schema: name, arguments and results; `Tensor(a!)` marks what is written.
        cpu, cuda: implementations.
        fake: shapes and dtypes of the results.
        workspace: `(*arguments) -> bytes` that the CPU implementation allocates inside.
        flops: `(*arguments) -> int` on tensors, 2 x multiply-adds; None for what does not multiply matrices.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, cpu, "CPU")
    LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"densebench::{name}", fake, lib=LIBRARY)
    packet = getattr(torch.ops.densebench, name)
    WORKSPACE[packet] = workspace
    if flops is not None:
        register_flop_formula(packet, get_raw=True)(flops)
    return packet.default
