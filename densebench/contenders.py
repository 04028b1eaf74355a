"""What can be measured: every strategy, and what people would use instead. One registration each.

A contender builds a module that takes the same images. Those that run the same DenseNet as the strategies
(`reference` says so) can be checked against `naive` from the same weights.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from densebench.models import build_model
from densebench.registry import get_strategy, list_strategies

Family = Literal["strategy", "peer", "yardstick"]
Build = Callable[..., nn.Module]


@dataclass(frozen=True)
class Contender:
    """One way to run a network of a given name.

    Attributes:
        name, summary: for tables.
        family: "strategy", "peer" (the same DenseNet by other means) or "yardstick" (another network).
        build: `(model_name, **options) -> nn.Module`.
        needs: a Python package that must be installed, or None.
        models: name prefix of the models it has.
        compiles: whether its first step compiles, so that it needs an unbounded first step.
    """

    name: str
    summary: str
    family: Family
    build: Build
    needs: str | None = None
    models: str = "densenet"
    compiles: bool = False

    def missing(self) -> str | None:
        """What keeps it from running here, with the remedy; None if nothing does."""
        if self.family == "strategy":
            return get_strategy(self.name).missing()
        if self.needs is not None and not _importable(self.needs):
            return f"{self.needs} is not installed; pip install 'densebench[peers]'"
        return None


_peers: dict[str, Contender] = {}


def contender(name: str, *, summary: str, **facts: Any) -> Callable[[Build], Build]:
    """Register the decorated build function as a peer or yardstick; `facts` as in `Contender`."""

    def register(build: Build) -> Build:
        if name in _peers:
            raise ValueError(f"contender {name!r} is already registered")
        _peers[name] = Contender(name, summary, facts.pop("family", "peer"), build, **facts)
        return build

    return register


def list_contenders() -> list[str]:
    """Strategies first, then peers and yardsticks in the order of their registration."""
    return [*list_strategies(), *_peers]


def get_contender(name: str) -> Contender:
    """The contender of that name.

    Raises:
        ValueError: if there is none; the message lists the known names.
    """
    if name in _peers:
        return _peers[name]
    if name in list_strategies():
        build = functools.partial(build_model, strategy=name)
        return Contender(name, get_strategy(name).summary, "strategy", build)
    raise ValueError(f"unknown contender {name!r}; known: {', '.join(list_contenders())}")


@contender("eager", summary="the network as it is", family="yardstick", models="resnet")
def _eager(model: str, **options: Any) -> nn.Module:
    return build_model(model, **options)


@contender("torchvision", summary="torchvision's implementation", needs="torchvision")
def _torchvision(model: str, **options: Any) -> nn.Module:
    return getattr(_import_torchvision().models, model)(**options)


@contender("torchvision_checkpointed", summary="torchvision with memory_efficient=True", needs="torchvision")
def _torchvision_checkpointed(model: str, **options: Any) -> nn.Module:
    return getattr(_import_torchvision().models, model)(memory_efficient=True, **options)


@contender("timm", summary="timm's implementation", needs="timm")
def _timm(model: str, **options: Any) -> nn.Module:
    _import_torchvision()
    return importlib.import_module("timm").create_model(model, **options)


@contender("compiled", summary="torch.compile of naive", compiles=True)
def _compiled(model: str, **options: Any) -> nn.Module:
    network = build_model(model, strategy="naive", **options)
    network.compile()
    return network


@contender("offloaded", summary="naive, what backward needs kept in host memory")
def _offloaded(model: str, **options: Any) -> nn.Module:
    return _Offloaded(build_model(model, strategy="naive", **options))


class _Offloaded(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, input: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu(pin_memory=input.is_cuda):
            return self.network(input)


def _importable(package: str) -> bool:
    try:
        _import_torchvision() if package == "torchvision" else importlib.import_module(package)
    except Exception:  # a package that is there but broken is as good as missing
        return False
    return True


@functools.cache
def _import_torchvision() -> Any:
    """torchvision, also beside a CPU-only torch.

    Its Python code registers shape rules for two operators of its compiled library; where that library does
    not load, importing needs at least their schemas.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept_libraries.append(library)
        return importlib.import_module("torchvision")


_kept_libraries: list[torch.library.Library] = []  # a collected library takes its schemas with it
