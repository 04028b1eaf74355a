"""Every storage of a step, from birth to death, and its FLOPs, as PyTorch's dispatcher sees them.

On fake tensors this tells the memory of a step that is never run. Each new storage is one allocation; it dies
when its last tensor does, which is when the allocator would get it back. What an operator allocates inside
itself is not seen; operators of our own take their workspace as arguments.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry


@dataclass
class Allocation:
    """One storage: its bytes, the operation that made it, and the events at which it was born and died."""

    nbytes: int
    operation: str
    born: int
    died: int | None = None

    def alive_at(self, event: int) -> bool:
        return self.born <= event and (self.died is None or self.died > event)


class StepTracker(TorchDispatchMode):
    """Records what everything that runs inside it allocates and computes; event i is the i-th operation.

    Attributes:
        allocations: all so far, in order of birth.
        event: operations so far.
        flops: 2 x multiply-adds of convolutions and matrix products so far, by the formulas that PyTorch's
            FlopCounterMode uses; an operator of our own counts by the formula registered with it. (That mode
            itself cannot be nested here: under it checkpointed tensors stay alive.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.allocations: list[Allocation] = []
        self.event = 0
        self.flops = 0
        self._known: dict[int, Allocation] = {}
        self._references: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = _storages((args, kwargs))
        out = func(*args, **(kwargs or {}))
        self.event += 1
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        for key, storage in _storages(out).items():
            if key in self._known:
                known = self._known[key]
                known.nbytes = max(known.nbytes, storage.nbytes())  # an out= argument may have grown
            elif key not in before:  # else it is older than the tracker
                self._record(key, storage, str(func))
        return out

    def allocation_of(self, tensor: Tensor) -> Allocation | None:
        """The allocation behind a tensor; None if it was made outside the tracker."""
        return self._known.get(tensor.untyped_storage()._cdata)

    def _record(self, key: int, storage: torch.UntypedStorage, operation: str) -> None:
        allocation = Allocation(storage.nbytes(), operation, self.event)
        self.allocations.append(allocation)
        self._known[key] = allocation

        def released(_: Any) -> None:
            allocation.died = self.event
            self._known.pop(key, None)
            self._references.pop(key, None)

        self._references[key] = weakref.ref(storage, released)


def _storages(values: Any) -> dict[int, torch.UntypedStorage]:
    tensors = (value for value in tree_iter(values) if isinstance(value, Tensor))
    return {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in tensors)}
