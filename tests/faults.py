"""Strategies with one fault each, as strategies have had them: those of norms; others in faults_of_execution.py.

`FAULTS` maps the name of a fault to its strategy, the situation (of `test_mutations.SITUATIONS`) in which it
shows, and a pattern for the message: the quantity that must be named.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from densebench.models import DenseLayer, Stage
from tests.rewritten import Rewritten, column

Strategy = type[Rewritten]


class Fault(NamedTuple):
    strategy: Strategy
    situation: str
    finds: str


FAULTS: dict[str, Fault] = {}


def fault(situation: str, finds: str) -> Any:
    """Register the decorated class under its name in lower case with underscores."""

    def register(strategy: Strategy) -> Strategy:
        name = "".join("_" + c.lower() if c.isupper() else c for c in strategy.__name__).lstrip("_")
        FAULTS[name] = Fault(strategy, situation, finds)
        return strategy

    return register


def values_of(values: Sequence[Tensor], gradients: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Some tensors with the gradients of others."""
    mean, var = (g + (v - g).detach() for v, g in zip(values, gradients, strict=True))
    return mean, var


# Statistics


@fault("training", "gradient")
class StatisticsDetached(Rewritten):
    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = super().statistics(x)
        return mean.detach(), var.detach()


@fault("training", "gradient")
class VarianceDetached(Rewritten):
    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = super().statistics(x)
        return mean, var.detach()


@fault("training", "output|loss|gradient")
class UnbiasedNormalization(Rewritten):
    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=True)


@fault("far from zero", "")
class VarianceByDifferenceOfSquares(Rewritten):
    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = x.mean((0, 2, 3))
        return mean, x.square().mean((0, 2, 3)) - mean.square()


@fault("training", "gradient")
class OnlyTheLastReaderMovesTheStatistics(Rewritten):
    """The gradient through a feature's statistics of one reader, when there are several."""

    def layer(self, layer: DenseLayer, features: list[Tensor]) -> Tensor:
        self.earlier = len(features) < 3
        return super().layer(layer, features)

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = super().statistics(x)
        return (mean.detach(), var.detach()) if self.earlier else (mean, var)


@fault("two steps", "step 2")
class StatisticsCachedByShape(Rewritten):
    def __init__(self) -> None:
        self.seen: dict[torch.Size, list[Tensor]] = {}

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        fresh = super().statistics(x)
        return values_of(self.seen.setdefault(x.shape, [s.detach() for s in fresh]), fresh)


# Running statistics


@fault("training", "running_mean")
class MomentumSwapped(Rewritten):
    def momentum(self, norm: nn.BatchNorm2d) -> float:
        return 1 - super().momentum(norm)


@fault("training", "running_var")
class BiasedRunningVariance(Rewritten):
    def move(self, norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
        super().move(norm, mean, var * ((count - 1) / count), count)


@fault("training", "running_")
class StatisticsMovedTwice(Rewritten):
    def move(self, norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
        super().move(norm, mean, var, count)
        super().move(norm, mean, var, count)


@fault("training", "num_batches_tracked")
class BatchesCountedTwice(Rewritten):
    def count(self, norm: nn.BatchNorm2d) -> None:
        norm.num_batches_tracked += 2


@fault("training", "num_batches_tracked")
class BatchesNotCounted(Rewritten):
    def count(self, norm: nn.BatchNorm2d) -> None:
        pass


@fault("training", "running_")
class RunningStatisticsLeftBehind(Rewritten):
    def move(self, norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
        super().move(norm, norm.running_mean.clone(), norm.running_var.clone() * ((count - 1) / count), count)


@fault("evaluation", "buffer")
class EvaluationMovesStatistics(Rewritten):
    def normalize_wide(self, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
        out = super().normalize_wide(norm, x)
        if not norm.training:
            mean, var = self.statistics(x.detach())
            self.move(norm, mean, var, x.numel() // x.shape[1])
        return out


@fault("cumulative", "running_")
class CumulativeAverageIgnored(Rewritten):
    def momentum(self, norm: nn.BatchNorm2d) -> float:
        return 0.1


# Which statistics, and what is done with them


@fault("mixed modes", "")
class ModeOfTheBlockForAllNorms(Rewritten):
    def __call__(self, stage: Stage, x: Tensor) -> Tensor:
        self.training = stage.block.training
        return super().__call__(stage, x)

    def by_batch(self, norm: nn.BatchNorm2d) -> bool:
        return self.training


@fault("evaluation", "")
class EvaluationByBatch(Rewritten):
    def by_batch(self, norm: nn.BatchNorm2d) -> bool:
        return True


@fault("evaluation", "gradient")
class EvaluationWithTrainingBackward(Rewritten):
    def normalize_wide(self, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
        if not self.by_batch(norm):
            mean, var = values_of((norm.running_mean, norm.running_var), self.statistics(x))
            return self.affine(norm, x - column(mean), self.inverse_deviation(norm, var))
        return super().normalize_wide(norm, x)


@fault("training", "")
class EpsOutsideTheRoot(Rewritten):
    def inverse_deviation(self, norm: nn.BatchNorm2d, var: Tensor) -> Tensor:
        return 1 / (var.sqrt() + norm.eps)


@fault("odd eps", "")
class EpsOfTheDefault(Rewritten):
    def inverse_deviation(self, norm: nn.BatchNorm2d, var: Tensor) -> Tensor:
        return (var + 1e-5).rsqrt()


@fault("training", "")
class WeightWithoutItsSign(Rewritten):
    def affine(self, norm: nn.BatchNorm2d, centered: Tensor, inverse: Tensor) -> Tensor:
        return centered * column(inverse * norm.weight.abs()) + column(norm.bias)


@fault("training", "")
class BiasForgotten(Rewritten):
    def affine(self, norm: nn.BatchNorm2d, centered: Tensor, inverse: Tensor) -> Tensor:
        return super().affine(norm, centered, inverse) - column(norm.bias.detach())


@fault("bfloat16", "running_|output|gradient")
class StatisticsInHalfPrecision(Rewritten):
    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = super().statistics(x)
        return mean.bfloat16().to(x.dtype), var.bfloat16().to(x.dtype)
