"""What an optimizer keeps, and what its step needs beside that, in copies of the trained parameters.

Read off torch/optim: state tensors of a parameter's shape, and the lists that the `foreach` implementation (the
default on CUDA) holds at once at the highest point of its step. tests/prediction/test_optimizers.py holds both
against the real optimizers.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OptimizerCost:
    """Copies of the trained parameters: kept between steps, and needed during one."""

    name: str
    state: int
    temporaries: int


_COSTS = {
    cost.name: cost
    for cost in (
        OptimizerCost("sgd", 0, 0),
        OptimizerCost("sgd_momentum", 1, 0),
        OptimizerCost("adam", 2, 1),  # the square root of the second moment
        OptimizerCost("adamw", 2, 1),
        OptimizerCost("rmsprop", 1, 1),  # the square root of the mean square
        OptimizerCost("adagrad", 1, 2),  # its square root, and the scaled gradients
    )
}


def list_optimizers() -> list[str]:
    """The names that `optimizer_cost` knows."""
    return list(_COSTS)


def optimizer_cost(name: str | None) -> OptimizerCost:
    """What an optimizer costs; None stands for no optimizer.

    Raises:
        ValueError: if the name is unknown; the message lists the known ones.
    """
    if name is None or name == "none":
        return OptimizerCost("none", 0, 0)
    if name not in _COSTS:
        raise ValueError(f"unknown optimizer {name!r}; known: {', '.join(_COSTS)}, none")
    return _COSTS[name]
