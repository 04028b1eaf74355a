"""A stage: what a strategy runs. A dense block with what stands around it.

Before the first block stands the stem's norm-ReLU-pool (the head), after each block its transition or the
final norm-ReLU (the tail). Both read the block's channels, so a strategy may take them over; one that does
not calls `run_head` and `run_tail`. A stage is a view: modules and parameters stay the network's.
"""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.fx
from torch import Tensor, nn
from torch.overrides import handle_torch_function

from densebench.models.dimensions import BatchNorm, MaxPool
from densebench.registry import Part, Strategy, UnsupportedError, get_strategy

if TYPE_CHECKING:  # layers import this file: a block called by itself is a stage without head and tail
    from densebench.models.layers import DenseBlock, DenseLayer, Transition

_under_way = threading.local()  # the blocks that strategies run in this thread


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
        alone: whether the block has been called by itself, so that a strategy does not run around it.
    """

    block: DenseBlock
    head: Head | None = None
    tail: Transition | FinalNorm | None = None
    children: tuple[tuple[str, nn.Module], ...] = ()
    alone: bool = False

    @property
    def layers(self) -> list[DenseLayer]:
        return self.block.layers

    @property
    def strategy(self) -> Strategy:
        """The block's."""
        return get_strategy(self.block.strategy)

    @property
    def name(self) -> str:
        return next((name for name, child in self.children if child is self.block), "block")

    def run_head(self, x: Tensor) -> Tensor:
        """The head as plain modules; x itself where there is none."""
        return x if self.head is None else self.head(x)

    def run_block(self, x: Tensor) -> Tensor:
        """The block as it is defined, whatever its strategy."""
        return self.block(x, by_definition=True)

    def run_tail(self, x: Tensor) -> Tensor:
        """The tail as plain modules; x itself where there is none."""
        return x if self.tail is None else self.tail(x)

    def run(self, x: Tensor) -> Tensor:
        """Check the stage and let its strategy run it: [N, C, H, W] in, the tail's output (or the block's) out.

        Raises:
            UnsupportedError: see `check`.
        """
        return self.run_last_of([x])

    def run_last_of(self, maps: list[Tensor]) -> Tensor:
        """As `run`, with the last of some maps, which is taken out of them.

        Popping hands the only reference to the callee: a map that a stage no longer needs can be freed inside
        it. A local variable, here or where this is called, would keep it alive until the stage returns.
        """
        strategy = self.strategy
        computes = strategy.bypasses != "nothing"
        if computes:
            _refuse_graphs(strategy, maps[-1])
            if overrides_functions(type(maps[-1])):
                # A kind of tensor of its own (MONAI's MetaTensor): a stage is to it what an operator is.
                return handle_torch_function(self._run_plain, maps[-1:], maps.pop())
        if computes and not maps[-1].numel():
            strategy, computes = get_strategy("naive"), False  # what modules make of an empty batch costs nothing
        if not torch.compiler.is_compiling():
            self.check(strategy)
        if computes and "torch._dynamo" in sys.modules:
            from densebench.models.uncompiled import run_uncompiled

            return run_uncompiled(self, strategy, maps)
        return self.run_computed(strategy, maps) if computes else self._checked(strategy, maps)

    def run_computed(self, strategy: Strategy, maps: list[Tensor]) -> Tensor:
        """Run a strategy that bypasses modules, and refuse that it has itself run once more by them.

        Raises:
            RuntimeError: if it calls the block, or returns other channels than the stage's.
        """
        under_way: set[DenseBlock] = _under_way.__dict__.setdefault("blocks", set())
        if self.block in under_way:
            raise RuntimeError(
                f"strategy {strategy.name!r} calls {type(self.block).__name__}, which is run by that strategy: "
                "stage.run_block(x) runs the block as it is defined, stage.block(x) without end"
            )
        under_way.add(self.block)
        try:
            return self._checked(strategy, maps)
        finally:
            under_way.discard(self.block)

    def _checked(self, strategy: Strategy, maps: list[Tensor]) -> Tensor:
        """What a strategy returns, if it has the stage's channels; what reads fewer would only say it has."""
        output: Tensor = strategy.function(self, maps.pop())
        if strategy.name == "naive" or _is_traced(output):  # naive defines it, whatever attributes say
            return output
        expected = self.out_channels
        if expected is not None and output.shape[1] != expected:
            raise RuntimeError(
                f"strategy {strategy.name!r} returned {output.shape[1]} channels from {self.name}, whose stage "
                f"has {expected}: a strategy runs the head, the block and the tail (stage.run_tail)"
            )
        return output

    @property
    def out_channels(self) -> int | None:
        """Of the stage's output; None where a part does not say."""
        if (conv := getattr(self.tail, "conv", None)) is not None:  # a transition's
            return getattr(conv, "out_channels", None)
        last = next(reversed(self.block._modules.values()), None)
        before, new = getattr(last, "in_channels", None), getattr(last, "growth_rate", None)
        return None if before is None or new is None else before + new

    def _run_plain(self, x: Tensor) -> Tensor:
        return self.run_last_of([x.as_subclass(Tensor)])

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
            if module is self.block and self.alone:
                continue
            reason = why_not_bypass(module)
            if reason:
                raise UnsupportedError(
                    f"strategy {strategy.name!r} does not call {self.name_of(module)}, which has {reason}; "
                    "remove it, or use strategy 'naive', which calls every module"
                )
        from densebench.models.structure import irregularity  # it reads layers, which import this file

        part = strategy.bypasses
        irregular = None if part == "nothing" else irregularity(self, part)
        objection = strategy.missing() or irregular or strategy.objection(self)
        if objection:
            raise UnsupportedError(f"strategy {strategy.name!r} cannot run {self.name}: {objection}")


def overrides_functions(kind: type[Tensor]) -> bool:
    """Whether tensors of a kind say themselves what functions do with them, as parameters and fake ones do not."""
    return kind is not Tensor and kind.__torch_function__ is not torch._C._disabled_torch_function_impl


def _is_traced(x: object) -> bool:
    """Whether a shape is a part of some graph, and not to be looked at."""
    return isinstance(x, torch.fx.Proxy) or torch.jit.is_tracing() or torch.compiler.is_compiling()


def _refuse_graphs(strategy: Strategy, x: object) -> None:
    """Tracers would record what a strategy does for this input, or fail somewhere inside."""
    if torch.jit.is_tracing() or torch.compiler.is_exporting() or isinstance(x, torch.fx.Proxy):
        raise UnsupportedError(
            f"strategy {strategy.name!r} cannot be traced or exported; densebench.set_strategy(model, 'naive') "
            "makes it a network that can, of the same parameters"
        )


_METHODS = ("forward", "_conv_forward", "dropout")  # of the parts, that a strategy does not call


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
    for method in _METHODS:
        if method in state and callable(state[method]):
            return f"a replaced {method}"
    if "parametrizations" in state["_modules"]:
        return "a parametrization"
    return None
