"""What can be measured: every strategy, and what people would use instead. One registration each.

A contender builds a module that takes the same images. Those that run the same DenseNet as the strategies
(`reference` says so) can be checked against `naive` from the same weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from densebench.models import build_model
from densebench.models.dimensions import BatchNorm
from densebench.models.layers import DenseBlock
from densebench.peers import import_peer, why_not_importable
from densebench.registry import get_strategy, list_strategies

Family = Literal["strategy", "peer", "yardstick"]
Build = Callable[..., nn.Module]
MODES, DEVICES = ("train", "forward", "infer"), ("cpu", "cuda")


@dataclass(frozen=True)
class Contender:
    """One way to run a network of a given name.

    Attributes:
        name, summary: for tables.
        family: "strategy", "peer" (the same DenseNet by other means) or "yardstick" (another network).
        build: `(model_name, **options) -> nn.Module`.
        needs: a Python package that must be installed, or None.
        models: name prefix of the models it has; `only` these of them, if not None.
        reference: the strategy that computes the same from the same weights, against which it is checked before it
            is timed; None for another network, which nothing here can be a reference of.
        network: the one network of a yardstick, whatever it is shown beside; None for all others.
        compiles: whether its first step compiles.
        volumes: whether it takes `spatial_dims=3`.
        modes, devices: those in which it differs from naive, and so is worth measuring.
    """

    name: str
    summary: str
    family: Family
    build: Build
    needs: str | None = None
    models: str = "densenet"
    only: tuple[str, ...] | None = None
    reference: str | None = "naive"
    network: str | None = None
    compiles: bool = False
    volumes: bool = True
    modes: tuple[str, ...] = MODES
    devices: tuple[str, ...] = DEVICES

    @property
    def module(self) -> str:
        """The module that registers it."""
        where = get_strategy(self.name).function if self.family == "strategy" else self.build
        return where.__module__

    def missing(self) -> str | None:
        """What keeps it from running here, with the remedy; None if nothing does."""
        if self.family == "strategy":
            return get_strategy(self.name).missing()
        return None if self.needs is None else why_not_importable(self.needs)

    def has(self, model: str) -> bool:
        """Whether it has a network of that name."""
        return model.startswith(self.models) and (self.only is None or model in self.only)


_peers: dict[str, Contender] = {}


def contender(name: str, *, summary: str, family: Family = "peer", **facts: Any) -> Callable[[Build], Build]:
    """Register the decorated build function as a peer or yardstick; `facts` as in `Contender`.

    Raises:
        ValueError: if the name is taken or is not an identifier, the summary is empty, or a fact is impossible.
        TypeError: if a fact is unknown.
    """
    if not name.isidentifier():
        raise ValueError(f"contender name {name!r} is not an identifier; use letters, digits and underscores")
    if not summary.strip():
        raise ValueError(f"contender {name!r} needs a summary: one line for the tables")

    def register(build: Build) -> Build:
        if name in _peers:
            raise ValueError(f"contender {name!r} is already registered")
        made = Contender(name, summary, family, build, **facts)
        _require_possible(made)
        _peers[name] = made
        return build

    return register


def _require_possible(made: Contender) -> None:
    """Refuse facts that would be misread later: a family of none, a yardstick that would be checked."""
    families = [family for family in get_args(Family) if family != "strategy"]  # `registry.strategy` makes those
    if made.family not in families:
        raise ValueError(f"contender {made.name!r}: family={made.family!r} is not one of {families}")
    for fact, known in (("modes", MODES), ("devices", DEVICES)):
        given = getattr(made, fact)
        if not given or not set(given) <= set(known):
            raise ValueError(f"contender {made.name!r}: {fact}={given!r} are not some of {known}")
    if made.family == "yardstick" and (made.reference is not None or made.network is None):
        raise ValueError(f"contender {made.name!r}: a yardstick needs its network, and reference=None")
    if made.family == "peer" and made.network is not None:
        raise ValueError(f"contender {made.name!r}: network={made.network!r} is for yardsticks only")


def list_contenders() -> list[str]:
    """Strategies first, then peers and yardsticks in the order of their registration."""
    return [*list_strategies(), *_peers]


def get_contender(name: str) -> Contender:
    """The contender of that name.

    Raises:
        ValueError: if there is none, or two; the message lists the known names.
    """
    if name in _peers and name in list_strategies():  # one of them would hide the other
        raise ValueError(f"{name!r} is a strategy and a contender of {_peers[name].module}; rename one")
    if name in _peers:
        return _peers[name]
    if name in list_strategies():
        build = functools.partial(build_model, strategy=name)
        return Contender(name, get_strategy(name).summary, "strategy", build)
    raise ValueError(f"unknown contender {name!r}; known: {', '.join(list_contenders())}")


@contender(
    "eager",
    summary="the network as it is",
    family="yardstick",
    models="resnet",
    network="resnet50",
    reference=None,
    volumes=False,
)
def _eager(model: str, **options: Any) -> nn.Module:
    return build_model(model, **options)


_TORCHVISION: dict[str, Any] = {
    "needs": "torchvision",
    "only": ("densenet121", "densenet161", "densenet169", "densenet201"),
    "volumes": False,
}


@contender("torchvision", summary="torchvision's implementation", **_TORCHVISION)
def _torchvision(model: str, **options: Any) -> nn.Module:
    return getattr(import_peer("torchvision").models, model)(**options)


@contender("torchvision_checkpointed", summary="torchvision with memory_efficient=True", **_TORCHVISION)
def _torchvision_checkpointed(model: str, **options: Any) -> nn.Module:
    return getattr(import_peer("torchvision").models, model)(memory_efficient=True, **options)


@contender("timm", summary="timm's implementation", needs="timm", only=_TORCHVISION["only"], volumes=False)
def _timm(model: str, **options: Any) -> nn.Module:
    return import_peer("timm").create_model(model, **options)


@contender(
    "monai",
    summary="MONAI's implementation",
    needs="monai",
    only=("densenet121", "densenet169", "densenet201", "densenet264"),
)
def _monai(
    model: str, spatial_dims: int = 2, in_channels: int = 3, num_classes: int = 1000, **options: Any
) -> nn.Module:
    build = getattr(import_peer("monai").networks.nets.densenet, model)
    return build(spatial_dims=spatial_dims, in_channels=in_channels, out_channels=num_classes, **options)


_WITH_GRAPH = ("train", "forward")  # nothing is kept for backward in the other mode


@contender("checkpointed_blocks", summary="naive, each dense block recomputed as a whole", modes=_WITH_GRAPH)
def _checkpointed_blocks(model: str, **options: Any) -> nn.Module:
    network = build_model(model, strategy="naive", **options)
    for block in [module for module in network.modules() if isinstance(module, DenseBlock)]:
        block.__class__ = _RecomputedBlock
    return network


@contender("compiled", summary="torch.compile of naive", compiles=True)
def _compiled(model: str, **options: Any) -> nn.Module:
    network = build_model(model, strategy="naive", **options)
    _raise_rather_than_fall_back()
    network.compile(dynamic=False)
    return network


@contender("compiled_budget", summary="torch.compile of naive, half its activation memory", compiles=True)
def _compiled_budget(model: str, **options: Any) -> nn.Module:
    network = build_model(model, strategy="naive", **options)
    _raise_rather_than_fall_back()
    network.compile(backend=_inductor_with_half_the_memory, dynamic=False)
    return network


@contender(
    "offloaded",
    summary="naive, what backward needs kept in host memory",
    modes=_WITH_GRAPH,
    devices=("cuda",),  # on a CPU it is in host memory already
)
def _offloaded(model: str, **options: Any) -> nn.Module:
    return _Offloaded(build_model(model, strategy="naive", **options))


def _raise_rather_than_fall_back() -> None:
    """From the limit of recompilations on dynamo runs the plain network without a word: let it raise instead."""
    config = torch._dynamo.config
    if hasattr(config, "fail_on_recompile_limit_hit"):
        config.fail_on_recompile_limit_hit = True


def _inductor_with_half_the_memory(module: Any, inputs: Any) -> Any:
    """The default backend, keeping at most half of what it would; the switch is set while it compiles only."""
    from torch._functorch import config
    from torch._inductor.compile_fx import compile_fx

    with config.patch(activation_memory_budget=0.5):
        return compile_fx(module, inputs)


class _RecomputedBlock(DenseBlock):
    """A block that keeps its input alone, and does not count the recomputation as a batch of its own."""

    def forward(self, input: Tensor, by_definition: bool = False) -> Tensor:
        norms = [module for module in self.modules() if isinstance(module, BatchNorm)]
        contexts = functools.partial(_first_and_again, norms)
        defined: Tensor = checkpoint(super().forward, input, True, use_reentrant=False, context_fn=contexts)
        return defined


def _first_and_again(
    norms: list[BatchNorm],
) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """The contexts of a block's forward and of its recomputation."""
    return nullcontext(), _buffers_kept(norms)


@contextmanager
def _buffers_kept(norms: list[BatchNorm]) -> Iterator[None]:
    """Batch norms inside use the statistics of their batch, as before, and leave their own alone."""
    buffers = [buffer for norm in norms for buffer in norm.buffers()]
    saved = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, saved, strict=True):
                buffer.copy_(value)


class _Offloaded(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, input: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu(pin_memory=input.is_cuda):
            return self.network(input)
