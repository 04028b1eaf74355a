"""Every storage of a step, from birth to death, and its work, as PyTorch's dispatcher sees them.

On fake tensors this tells the memory of a step that is never run. Each new storage is one allocation; it dies
when its last tensor does, which is when the allocator would get it back. What an operator allocates inside
itself is not seen here; a function that knows may be given (see `densebench.prediction.hidden`).
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

Hidden = Callable[[Any, Any, Any, Any], int]  # (func, args, kwargs, result) -> bytes
Shortcut = Callable[[Any], Callable[[Any, Any, Any], Any] | None]
_QUERIES = {torch.ops.prim.device.default}  # calls that ask and compute nothing


@dataclass
class Allocation:
    """One storage: its bytes, the operation that made it, and the events at which it was born and died."""

    nbytes: int
    operation: str
    born: int
    died: int | None = None


@dataclass(frozen=True, slots=True)
class Operation:
    """What one event did.

    Attributes:
        name: of the operator.
        owner: the parameter (or buffer) it used, or that the latest operation before it which had one used.
        flops: 2 x multiply-adds of convolutions and matrix products.
        bytes_moved: what it reads of its arguments and writes to its results, each once.
        hidden: bytes that it allocates inside and frees before it returns.
        dtype: in which it computes, that of its first argument.
    """

    name: str
    owner: str | None
    flops: int
    bytes_moved: int
    hidden: int
    dtype: torch.dtype


class StepTracker(TorchDispatchMode):
    """Records what everything that runs inside it allocates and computes; event i is the i-th operation.

    Args:
        hidden: what an operator allocates inside itself; without it nothing.
        owners: names of storages (see `storage_key`), those of the parameters.
        shortcut: finds a quicker way to answer an operator's call; it may leave one (NotImplemented).

    Attributes:
        allocations: all so far, in order of birth.
        operations: all so far; `operations[i - 1]` is event i.
        event: operations so far.
        flops: 2 x multiply-adds of convolutions and matrix products so far, by the formulas that PyTorch's
            FlopCounterMode uses; an operator of our own counts by the formula registered with it. (That mode
            itself cannot be nested here: under it checkpointed tensors stay alive.)
    """

    def __init__(
        self,
        hidden: Hidden | None = None,
        owners: Mapping[int, str] | None = None,
        shortcut: Shortcut = lambda func: None,
    ) -> None:
        super().__init__()
        self.allocations: list[Allocation] = []
        self.operations: list[Operation] = []
        self.event = 0
        self.flops = 0
        self._hidden = hidden
        self._owners = owners or {}
        self._owner: str | None = None
        self._shortcut = shortcut
        self._known: dict[int, Allocation] = {}
        self._references: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        quick = self._shortcut(func)
        if func in _QUERIES:
            out = NotImplemented if quick is None else quick(func, args, kwargs)
            return func(*args, **kwargs) if out is NotImplemented else out
        inputs = _tensors(args) + _tensors(tuple(kwargs.values()))
        before = {storage_key(tensor): tensor for tensor in inputs}
        out = NotImplemented if quick is None else quick(func, args, kwargs)
        if out is NotImplemented:
            out = func(*args, **kwargs)
        results = _tensors((out,))
        self.event += 1
        self._note(func, args, kwargs, out, before)
        for tensor in results:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._known:
                known = self._known[key]
                known.nbytes = max(known.nbytes, storage.nbytes())  # an out= argument may have grown
            elif key not in before:  # else it is older than the tracker
                self._record(key, storage, str(func))
        return out

    def _note(self, func: Any, args: Any, kwargs: Any, out: Any, before: dict[int, Tensor]) -> None:
        for key in before:  # the last of them: in a fused norm and convolution, the convolution's
            self._owner = self._owners.get(key, self._owner)
        packet = func._overloadpacket
        flops = flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry else 0
        self.flops += flops
        moved = bytes_moved(func, args, kwargs, out, before)
        hidden = 0 if self._hidden is None else self._hidden(func, args, kwargs, out)
        dtype = next((tensor.dtype for tensor in before.values()), torch.float32)
        self.operations.append(Operation(str(func), self._owner, flops, moved, hidden, dtype))

    def _record(self, key: int, storage: torch.UntypedStorage, operation: str) -> None:
        allocation = Allocation(storage.nbytes(), operation, self.event)
        self.allocations.append(allocation)
        self._known[key] = allocation

        def released(_: Any) -> None:
            allocation.died = self.event
            self._known.pop(key, None)
            self._references.pop(key, None)

        self._references[key] = weakref.ref(storage, released)


def storage_key(tensor: Tensor) -> int:
    """What names a storage as long as it lives."""
    return tensor.untyped_storage()._cdata


def _tensors(values: Any) -> list[Tensor]:
    """The tensors among arguments or results, also those in lists."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found


# What these leave in their results is not written by them, and what these write they do not read first.
ALLOCATE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
_OVERWRITE = ("copy_", "zero_", "fill_", "bernoulli_", "normal_", "uniform_", "_foreach_copy_")


def bytes_moved(func: Any, args: Any, kwargs: Any, out: Any, before: Mapping[int, Any]) -> int:
    """Bytes an operator must read of its arguments and write to its results, each once.

    Args:
        before: the storages of its arguments; a result that lies in one of them and is not written is a view.
    """
    name, written = written_arguments(func)
    reads = writes = 0
    for place, value in (*enumerate(args), *kwargs.items()):
        size = sum(map(_bytes, _tensors((value,))))
        if place in written:
            writes += size
            reads += size if name.endswith("_") and name not in _OVERWRITE else 0
        else:
            reads += size
    if not written:
        writes = sum(_bytes(tensor) for tensor in _tensors((out,)) if storage_key(tensor) not in before)
        if writes == 0 or name in ALLOCATE:
            return 0
    return reads + writes


@functools.cache
def written_arguments(func: Any) -> tuple[str, frozenset[int | str]]:
    """The operator's name, and the places (or keywords) of what it writes into."""
    arguments = func._schema.arguments
    written = {p for p, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write}
    return func._schema.name.split("::")[-1], frozenset(written | {arguments[p].name for p in written})


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
