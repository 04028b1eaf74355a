"""A DenseNet up to its head: which of its modules make a stage, and by which strategy each stage is run."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor, nn

from densebench.models.dimensions import BatchNorm, MaxPool
from densebench.models.layers import DenseBlock, Transition
from densebench.models.stage import FinalNorm, Head, Stage
from densebench.registry import get_strategy

_M = TypeVar("_M", bound=nn.Module)


class Features(nn.Sequential):
    """The network up to the last norm and ReLU; each stage is run by the strategy of its block.

    [N, in_channels, H, W] -> [N, C, H / stride, W / stride].
    """

    @property
    def strategy(self) -> str:
        """The name of the blocks' strategy; where they have several, all of them in order."""
        names = [stage.block.strategy for stage in self.stages()]
        return ", ".join(names if len({*names}) > 1 else names[:1])

    def stages(self) -> list[Stage]:
        return [step for step in steps_of(self) if isinstance(step, Stage)]

    def forward(self, input: Tensor) -> Tensor:
        maps = [input]
        del input
        for step in steps_of(self):
            maps.append(step.run_last_of(maps) if isinstance(step, Stage) else step(maps.pop()))
        return maps.pop()


def set_strategy(model: _M, name: str) -> _M:
    """Run every densebench DenseNet in `model` by the strategy `name`; parameters stay as they are.

    Args:
        model: a `DenseNet`, any module that contains some, or a part of one, as a dense block.
        name: see `densebench.list_strategies()`.

    Returns:
        The same model.

    Raises:
        ValueError: if the strategy is unknown, or the model contains no dense block of densebench.
        UnsupportedError: if the strategy cannot run it here; nothing is changed then. Of a block by itself what
            stands around it is not looked at before the network runs.
    """
    strategy = get_strategy(name)
    stages = stages_in(model)
    if not stages:
        raise ValueError(f"{type(model).__name__} contains no dense block of densebench to run by a strategy")
    for stage in stages:
        stage.check(strategy)
    for stage in stages:
        stage.block.strategy = name
    return model


def stages_in(model: nn.Module) -> list[Stage]:
    """Every stage of a model; a block that stands in no `Features` is one by itself."""
    named = {module: name for name, module in model.named_modules()}
    stages = [stage for module in named if isinstance(module, Features) for stage in module.stages()]
    within = {stage.block for stage in stages}
    for module, name in named.items():
        if isinstance(module, DenseBlock) and module not in within:
            stages.append(Stage(module, children=((name or "block", module),), alone=True))
    return stages


_HEADS = ((BatchNorm, nn.ReLU, MaxPool), (BatchNorm, nn.ReLU), ())
_TAILS = ((Transition,), (BatchNorm, nn.ReLU), ())


def steps_of(network: nn.Sequential) -> list[Stage | nn.Module]:
    """The children of a feature network in order, each dense block with its head and tail made one stage.

    What belongs to no stage (the stem convolution, a user's own module) stays a plain module.
    """
    children = [(name, child) for name, child in network._modules.items() if child is not None]
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
