"""Registration: one call makes an operator known to everything in PyTorch that needs to know it.

Operators are registered through `torch.library.Library`, whose calls cost about 2 us; the decorator
`torch.library.custom_op` costs 18 us for an operator that writes into its arguments, which over the hundreds
of calls of a training step is as much as the step itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import register_flop_formula

LIBRARY = torch.library.Library("densebench", "DEF")
NORM = "Tensor mean, Tensor var, Tensor? gamma, Tensor? beta, float eps"  # a norm in a schema, see `norm.Norm`

# Bytes that an operator allocates inside and frees before it returns, by device type: a function of its
# arguments. Memory trackers add them while the operator runs; a test holds them against the allocator.
WORKSPACE: dict[torch._ops.OpOverloadPacket, Callable[..., int]] = {}


class Implementations(NamedTuple):
    """The functions behind an operator; `cuda` launches Triton kernels, None: there are none."""

    cpu: Callable[..., Any]
    cuda: Callable[..., Any] | None


IMPLEMENTATIONS: dict[str, Implementations] = {}


def operator(
    schema: str,
    doc: str,
    *,
    cpu: Callable[..., Any],
    cuda: Callable[..., Any] | None,
    fake: Callable[..., Any],
    workspace: Callable[..., int],
    flops: Callable[..., int] | None = None,
) -> Any:
    """Define `densebench::<schema>` and return it as a callable.

    Args:
        schema: name, arguments and results; `Tensor(a!)` marks what is written.
        doc: the operator's docstring.
        cpu, cuda: implementations; without one for CUDA, PyTorch refuses its tensors (NotImplementedError).
        fake: the results without values, and what has to be true of shapes.
        workspace: bytes that the CPU implementation allocates inside.
        flops: 2 x multiply-adds; None for what does not multiply matrices.

    The last three name the arguments that they need, as the schema does, and are given no others.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    packet = getattr(torch.ops.densebench, name)
    written = [at for at, argument in enumerate(packet.default._schema.arguments) if argument.is_write]
    LIBRARY.impl(name, _told_to_autograd(name, written, cpu), "CPU")
    if cuda is not None:
        LIBRARY.impl(name, _told_to_autograd(name, written, _on_its_device(name, cuda)), "CUDA")
    torch.library.register_fake(f"densebench::{name}", _by_name(packet, fake), lib=LIBRARY)
    IMPLEMENTATIONS[name] = Implementations(cpu, cuda)
    packet.__doc__ = packet.default.__doc__ = doc
    WORKSPACE[packet] = _by_name(packet, workspace)
    if flops is not None:
        register_flop_formula(packet, get_raw=True)(_by_name(packet, flops))
    return packet.default


def implementation(function: Any, x: torch.Tensor) -> Callable[..., Any]:
    """What is behind a registered operator for tensors such as x: past the dispatcher its steps can be watched."""
    cpu, cuda = IMPLEMENTATIONS[function._opname]
    if not x.is_cuda:
        return cpu
    assert cuda is not None
    return _on_its_device(function._opname, cuda)


def _by_name(packet: torch._ops.OpOverloadPacket, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of some of an operator's arguments as one of all of them."""
    arguments = packet.default._schema.arguments
    wanted = inspect.signature(function).parameters
    defaults = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}
    names = [argument.name for argument in arguments]
    if unknown := [name for name in wanted if name not in names]:
        raise TypeError(f"{packet} has no argument {', '.join(unknown)}")

    def called(*given: Any, **named: Any) -> Any:
        values = {**defaults, **dict(zip(names, given, strict=False)), **named}
        return function(**{name: values[name] for name in wanted})

    return called


def _told_to_autograd(name: str, written: Sequence[int], function: Callable[..., Any]) -> Callable[..., Any]:
    """C and Triton write through addresses: autograd is told, and notices saved tensors that they overwrite.

    Nor is a gradient that nobody computes missing in silence.
    """

    def told(*arguments: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in arguments):
            raise RuntimeError(
                f"densebench::{name} has no derivative; call it under torch.no_grad() or detach its arguments"
            )
        result = function(*arguments)
        changed = [arguments[at] for at in written if at < len(arguments) and arguments[at] is not None]
        torch.autograd.graph.increment_version(changed)
        return result

    return told


def require_dense_rows(name: str, arguments: Iterable[Any]) -> None:
    """Refuse a matrix, map or vector whose channels do not lie side by side; kernels are told row strides only.

    Raises:
        ValueError: with the operator's name and the strides.
    """
    for argument in arguments:
        # Most are contiguous, and that is known at once: this is asked of thousands of tensors a step.
        if not isinstance(argument, torch.Tensor) or argument.is_contiguous() or argument.stride(-1) == 1:
            continue
        if argument.shape[-1] > 1 and argument.numel() > 0:
            raise ValueError(
                f"densebench::{name} takes channels that lie side by side, got shape {list(argument.shape)} with "
                f"strides {argument.stride()}; make the tensor contiguous (a map: channels-last)"
            )


def _on_its_device(name: str, cuda: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, which need not be the one that the arguments are on."""

    def launched(first: torch.Tensor, *arguments: Any) -> Any:
        require_dense_rows(name, (first, *arguments))
        if first.get_device() == torch.cuda.current_device():
            return cuda(first, *arguments)
        with torch.cuda.device(first.device):
            return cuda(first, *arguments)

    return launched
