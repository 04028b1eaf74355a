"""What a strategy provides that computes a stage itself: forward and backward over buffers, layer by layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from densebench.execution.plan import Gradients, LayerPlan, StagePlan
from densebench.registry import those_with


class Window:
    """A part of the flat list of parameters (or of what stands for each), indexed as in the whole list."""

    def __init__(self, values: Sequence[Any], start: int) -> None:
        self.values = list(values)
        self.start = start

    def __getitem__(self, index: int) -> Any:
        return self.values[index - self.start]

    def forget(self, start: int, stop: int) -> None:
        """Those from `start` to before `stop` are not asked for again: a weight in another dtype is a copy."""
        for index in range(start - self.start, stop - self.start):
            self.values[index] = None


class StageComputation(ABC):
    """One forward of one stage and, later, its backward.

    `enter` and `leave` may take over the stage's head and tail. Forward methods return the tensors that their
    backward will need; each gets them back, checked by autograd against changes in between. A computation is
    good for one forward and any number of backwards.

    Buffers are its attributes `features`, `gradient`, `statistics` and `scratch`, so that they can be let go of.

    Raises:
        NotImplementedError: inside torch.vmap.

    Attributes:
        plan: what each norm does in this run, and where parameters stand.
        compute: the dtype that convolutions compute in; their weights are given in it.
        block: the block that it is of.
    """

    def __init__(self, plan: StagePlan, compute: torch.dtype, block: nn.Module) -> None:
        _refuse_maps()
        self.plan = plan
        self.compute = compute
        self.block = block

    def release(self) -> None:
        """Let go of the buffers: nothing more of this backward will come."""
        for name in ("features", "gradient", "statistics", "scratch"):
            self.__dict__.pop(name, None)

    def signature(self) -> Hashable:
        """All of it that decides what it computes on tensors of given geometries; None: not to be recorded."""
        return None

    def settings(self) -> Hashable:
        """What is set elsewhere and decides that, too, forward and backward: of threads, precisions, libraries."""
        return None

    @abstractmethod
    def enter(self, x: Tensor, parameters: Window, keep: bool) -> list[Tensor]:
        """Set up the buffers and write the block's input into them; without `keep` nothing is needed later."""

    @abstractmethod
    def layer(self, layer: LayerPlan, parameters: Window, keep: bool) -> list[Tensor]:
        """Run one layer, from the channels before it to its own; without `keep` nothing is needed later."""

    @abstractmethod
    def leave(self, parameters: Window) -> tuple[Tensor, list[Tensor]]:
        """The stage's output, and what backward needs; the computation lets go of its buffers."""

    @abstractmethod
    def commit(self) -> None:
        """Move running statistics: the whole stage has succeeded."""

    @abstractmethod
    def leave_backward(
        self, grad_output: Tensor, parameters: Window, kept: list[Tensor], needs: Window
    ) -> Gradients:
        """Set up the gradient buffer from the gradient of the output, which must not be changed."""

    @abstractmethod
    def layer_backward(
        self, layer: LayerPlan, parameters: Window, kept: list[Tensor], needs: Window, needs_prefix: bool
    ) -> Gradients:
        """Backward through one layer; without `needs_prefix` nothing before it needs a gradient."""

    @abstractmethod
    def enter_backward(
        self, parameters: Window, kept: list[Tensor], needs: Window, needs_x: bool
    ) -> tuple[Tensor | None, Gradients]:
        """The gradient of x (None if not needed); the computation lets go of its buffers."""


def _refuse_maps() -> None:
    """What torch.vmap puts in a tensor's place has neither strides nor an address."""
    if torch._C._are_functorch_transforms_active():
        top = torch._C._functorch.peek_interpreter_stack()
        if top is not None and top.key() == torch._C._functorch.TransformType.Vmap:
            raise NotImplementedError(f"torch.vmap works with {those_with('autograd')} only")
