"""A stage: what a strategy runs. A dense block with what stands around it.

Before the first block stands the stem's norm-ReLU-pool (the head), after each block its transition or the
final norm-ReLU (the tail). Both read the block's channels, so a strategy may take them over; one that does
not calls `run_head` and `run_tail`. A stage is a view: modules and parameters stay the network's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from densebench.models.dimensions import BatchNorm, MaxPool
from densebench.models.layers import DenseBlock, DenseLayer, Transition
from densebench.registry import Part, Strategy, UnsupportedError


@dataclass(frozen=True, eq=False)
class Head:
    """The stem's norm, ReLU and max-pool (None where the stem has no pool)."""

    norm: BatchNorm
    relu: nn.Module
    pool: MaxPool | None

    def __call__(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(x))
        return x if self.pool is None else self.pool(x)


@dataclass(frozen=True, eq=False)
class FinalNorm:
    """The norm and ReLU after the last block."""

    norm: BatchNorm
    relu: nn.Module

    def __call__(self, x: Tensor) -> Tensor:
        return self.relu(self.norm(x))


@dataclass(frozen=True, eq=False)
class Stage:
    """A dense block, and its head and tail where it has them.

    Attributes:
        block: the dense block; `stage.layers` are its layers.
        head: the stem's norm-ReLU-pool before the first block, or None.
        tail: the transition or final norm after the block, or None.
        children: (name in the network, module) of all that the stage is made of, for messages.
    """

    block: DenseBlock
    head: Head | None = None
    tail: Transition | FinalNorm | None = None
    children: tuple[tuple[str, nn.Module], ...] = ()

    @property
    def layers(self) -> list[DenseLayer]:
        return self.block.layers

    @property
    def name(self) -> str:
        return next((name for name, child in self.children if child is self.block), "block")

    def run_head(self, x: Tensor) -> Tensor:
        """The head as plain modules; x itself where there is none."""
        return x if self.head is None else self.head(x)

    def run_tail(self, x: Tensor) -> Tensor:
        """The tail as plain modules; x itself where there is none."""
        return x if self.tail is None else self.tail(x)

    def run(self, strategy: Strategy, x: Tensor) -> Tensor:
        """Check the stage and let a strategy run it: [N, C, H, W] in, the tail's output (or the block's) out.

        Raises:
            UnsupportedError: see `check`.
        """
        self.check(strategy)
        return strategy.function(self, x)

    def modules(self, part: Part) -> list[nn.Module]:
        """All modules of a part of the stage ("nothing", "block", "stage"), in order.

        They are looked at before every forward, hundreds of them: without names, which cost more than the look.
        """
        found: dict[nn.Module, None] = {}
        ahead = [child for _, child in reversed(self._children_of(part))]
        while ahead:
            module = ahead.pop()
            if module not in found:
                found[module] = None
                ahead += [child for child in reversed(module._modules.values()) if child is not None]
        return list(found)

    def name_of(self, module: nn.Module) -> str:
        """A module's name in the network."""
        named = (pair for name, child in self._children_of("stage") for pair in child.named_modules(prefix=name))
        return next(name for name, child in named if child is module)

    def _children_of(self, part: Part) -> list[tuple[str, nn.Module]]:
        children = self.children or ((self.name, self.block),)
        return [] if part == "nothing" else [c for c in children if part == "stage" or c[1] is self.block]

    def check(self, strategy: Strategy) -> None:
        """Refuse what the strategy would silently run around, or cannot run.

        Raises:
            UnsupportedError: one sentence that names the module or the lack, and the remedy.
        """
        for module in self.modules(strategy.bypasses):
            reason = why_not_bypass(module)
            if reason:
                raise UnsupportedError(
                    f"strategy {strategy.name!r} does not call {self.name_of(module)}, which has {reason}; "
                    "remove it, or use strategy 'naive', which calls every module"
                )
        objection = strategy.missing() or strategy.objection(self)
        if objection:
            raise UnsupportedError(f"strategy {strategy.name!r} cannot run {self.name}: {objection}")


def why_not_bypass(module: nn.Module) -> str | None:
    """What makes running around this module's `forward` wrong, or None where nothing does."""
    state = module.__dict__
    if (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    ):
        return "a hook (pruning and weight norm are hooks too)"
    if "forward" in state:
        return "a replaced forward"
    if "parametrizations" in state["_modules"]:
        return "a parametrization"
    return None


_HEADS = ((BatchNorm, nn.ReLU, MaxPool), (BatchNorm, nn.ReLU), ())
_TAILS = ((Transition,), (BatchNorm, nn.ReLU), ())


def stages_of(network: nn.Sequential) -> list[Stage | nn.Module]:
    """The children of a feature network in order, each dense block with its head and tail made one stage.

    What belongs to no stage (the stem convolution, a user's own module) stays a plain module.
    """
    children = list(network.named_children())
    steps: list[Stage | nn.Module] = []
    while children:
        head = _leading(children, _HEADS, then=DenseBlock)
        if head is None:
            steps.append(children.pop(0)[1])
            continue
        tail = _leading(children[head + 1 :], _TAILS) or 0
        steps.append(_stage(children[: head + 1 + tail], head))
        children = children[head + 1 + tail :]
    return steps


def _leading(
    children: list[tuple[str, nn.Module]], patterns: Any, then: type[nn.Module] | None = None
) -> int | None:
    """The length of the first pattern of module types that the children begin with; None if of none."""
    for pattern in patterns:
        kinds = pattern if then is None else (*pattern, then)
        modules = [module for _, module in children[: len(kinds)]]
        if len(modules) == len(kinds) and all(isinstance(m, k) for m, k in zip(modules, kinds, strict=True)):
            return len(pattern)
    return None


def _stage(children: list[tuple[str, nn.Module]], head_length: int) -> Stage:
    modules: list[Any] = [module for _, module in children]
    head, block, tail = modules[:head_length], modules[head_length], modules[head_length + 1 :]
    return Stage(
        block=block,
        head=Head(head[0], head[1], head[2] if len(head) == 3 else None) if head else None,
        tail=(FinalNorm(*tail) if len(tail) == 2 else tail[0]) if tail else None,
        children=tuple(children),
    )
