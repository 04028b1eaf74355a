"""The registry of strategies: names, what each one promises and refuses, and how a new one is found.

This is the ground floor. It knows nothing of models: a strategy is a function of a stage (see
`densebench.models.stage.Stage`) and a tensor, registered under a name by the decorator `strategy`.
The files in `densebench/strategies/` are imported when a name is first looked up, so adding a strategy
is adding a file there.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

StageFunction = Callable[..., Any]  # (Stage, Tensor) -> Tensor
Part = Literal["nothing", "block", "stage"]
Derivatives = Literal["first", "autograd", "all"]  # each includes those before it
_F = TypeVar("_F", bound=StageFunction)


class UnsupportedError(RuntimeError):
    """A strategy cannot run this model, input or machine; the message names what it supports."""


def _no_objection(*_: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Strategy:
    """One way to run a stage of a densely connected network.

    Attributes:
        name: what users type.
        summary: one line for tables.
        function: `(stage, x) -> output`, the same values as the stage's own modules.
        bypasses: the modules whose `forward` it does not call; hooks on them, and other parts in the place of the
            standard ones, are refused.
        derivatives: "first" by backward alone; "autograd": second ones, forward-mode ones, gradients in batches
            and torch.vmap, too; "all": also those of torch.func (grad, vjp, jacrev, hessian).
        missing: returns what this machine lacks to run it (one sentence), or None.
        objection: `(stage) -> str | None`, a sentence on what else keeps this stage from being run, or None.
    """

    name: str
    summary: str
    function: StageFunction
    bypasses: Part = "nothing"
    derivatives: Derivatives = "all"
    missing: Callable[[], str | None] = _no_objection
    objection: Callable[[Any], str | None] = _no_objection


_strategies: dict[str, Strategy] = {}
_discovered = False


def strategy(
    name: str,
    *,
    summary: str,
    bypasses: Part = "nothing",
    derivatives: Derivatives = "all",
    missing: Callable[[], str | None] = _no_objection,
    objection: Callable[[Any], str | None] = _no_objection,
) -> Callable[[_F], _F]:
    """Register the decorated function as the strategy `name` (see `Strategy` for the arguments).

    Raises:
        ValueError: if the name is taken or no identifier, the summary empty, another argument not a known word.
        TypeError: if what is decorated is not a function with a name of its own (`functools.partial` has none).
    """
    if not name.isidentifier():
        raise ValueError(f"strategy name {name!r} is not an identifier; use letters, digits and underscores")
    if not summary.strip():
        raise ValueError(f"strategy {name!r} needs a summary: one line for the tables")
    if bypasses not in ("nothing", "block", "stage"):
        raise ValueError(f"strategy {name!r}: bypasses={bypasses!r} is not 'nothing', 'block' or 'stage'")
    if derivatives not in get_args(Derivatives):
        raise ValueError(f"strategy {name!r}: derivatives={derivatives!r} is not 'first', 'autograd' or 'all'")

    def register(function: _F) -> _F:
        if not hasattr(function, "__qualname__"):  # messages and records say where a strategy comes from
            raise TypeError(
                f"strategy {name!r} is to be a function with a name of its own, got {type(function).__name__}; "
                f"write def {name}(stage, x), which calls the other with its options"
            )
        if name in _strategies:
            other = _strategies[name].function
            raise ValueError(f"strategy {name!r} is already registered by {other.__module__}")
        _strategies[name] = Strategy(name, summary, function, bypasses, derivatives, missing, objection)
        return function

    return register


def _discover() -> None:
    global _discovered
    if not _discovered:
        package = importlib.import_module("densebench.strategies")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")
        _discovered = True  # only now: an import error must show again at the next call


def list_strategies() -> list[str]:
    """The names of all registered strategies: `naive`, the baseline, first; the rest alphabetically."""
    _discover()
    return sorted(_strategies, key=lambda name: (name != "naive", name))


def get_strategy(name: str) -> Strategy:
    """The strategy registered as `name`.

    Raises:
        ValueError: if there is none; the message lists the known names.
    """
    if isinstance(name, str):
        if name not in _strategies:
            _discover()
        if name in _strategies:
            return _strategies[name]
    raise ValueError(f"unknown strategy {name!r}; known: {', '.join(list_strategies())}")


def those_with(derivatives: Derivatives) -> str:
    """The strategies that have certain derivatives, for messages: "strategies 'naive' and 'checkpointed'"."""
    order = get_args(Derivatives)
    able = [n for n in list_strategies() if order.index(_strategies[n].derivatives) >= order.index(derivatives)]
    *others, last = map(repr, able)
    return f"strategies {', '.join(others)} and {last}" if others else f"strategy {last}"
