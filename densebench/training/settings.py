"""What a training command was asked for, and whether it can be done."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from densebench.models import list_models
from densebench.registry import list_strategies
from densebench.training.errors import TrainingError

LEARNING_RATES = {"sgd": 0.1, "adam": 1e-3, "adamw": 1e-3}
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
# densenet_x has no blocks of its own.
MODELS = [name for name in list_models() if name.startswith("densenet") and name != "densenet_x"]
_NOT_OF_THE_CURVE = ("strategy", "epochs", "workers", "out", "resume")


@dataclass(frozen=True)
class Settings:
    """The options of `python -m densebench.train`, which explains them (see `densebench.train.parser`)."""

    data: str
    model: str
    strategy: str
    weights: str | None
    epochs: int
    batch: int
    size: int | None
    optimizer: str
    lr: float | None
    momentum: float
    weight_decay: float | None
    autocast: str | None
    device: str | None
    seed: int
    limit: int | None
    workers: int
    out: str | None
    resume: bool

    def completed(self, size: int) -> Settings:
        """The same with what was left open filled in; `size` is the side of the image in pixels."""
        lr = LEARNING_RATES[self.optimizer] if self.lr is None else self.lr
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        return dataclasses.replace(self, size=self.size or size, lr=lr, device=device)

    def strategies(self) -> list[str]:
        """The names of the strategies to train by, in the order given."""
        names = [name.strip() for name in self.strategy.split(",")]
        return list_strategies() if names == ["all"] else list(dict.fromkeys(names))

    def of_the_curve(self) -> dict[str, Any]:
        """What decides on the values of a learning curve: the options that a resumed run must share."""
        options = dataclasses.asdict(self)
        return {name: value for name, value in options.items() if name not in _NOT_OF_THE_CURVE}


def check(settings: Settings) -> None:
    """Refuse what makes no sense, before anything is read.

    Raises:
        TrainingError: naming the option and the remedy.
    """
    _known("model", settings.model, MODELS)
    for name in settings.strategies():
        _known("strategy", name, ["all", *list_strategies()])
        if name == "all":
            raise TrainingError("--strategy all stands alone; name the strategies, or give all")
    _known("optimizer", settings.optimizer, list(LEARNING_RATES))
    if settings.autocast is not None:
        _known("dtype for --autocast", settings.autocast, list(AUTOCAST))
    for name in ("epochs", "batch", "size", "limit"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise TrainingError(f"--{name} {value} leaves nothing to train on; give 1 or more")
    _check_numbers(settings)
    if settings.resume and settings.out is None:
        raise TrainingError("--resume needs the --out folder of the run to go on with")
    _known("device", settings.device or "cpu", ["cpu", "cuda"])
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise TrainingError("--device cuda: PyTorch sees no CUDA device here; give --device cpu")
    if settings.weights is not None and not Path(settings.weights).is_file():
        raise TrainingError(f"--weights {settings.weights}: there is no such file")


def _check_numbers(settings: Settings) -> None:
    lr, decay = settings.lr, settings.weight_decay
    if lr is not None and not 0 < lr < math.inf:
        raise TrainingError(f"--lr {lr:g} is no learning rate; give a positive number, e.g. 0.1")
    if not 0 <= settings.momentum < 1:
        raise TrainingError(f"--momentum {settings.momentum:g} is not in [0, 1); 0.9 is usual")
    if settings.momentum and settings.optimizer != "sgd":
        raise TrainingError(f"--momentum belongs to --optimizer sgd; {settings.optimizer} has its own")
    if decay is not None and not 0 <= decay < math.inf:
        raise TrainingError(f"--weight-decay {decay:g} is not 0 or more; 1e-4 is usual")
    if settings.workers < 0:
        raise TrainingError(f"--workers {settings.workers}: give 0 (the process itself reads images) or more")
    if not 0 <= settings.seed < 2**32:
        raise TrainingError(f"--seed {settings.seed} is not in [0, 2**32)")


def _known(what: str, name: str, names: list[str]) -> None:
    if name not in names:
        raise TrainingError(f"unknown {what} {name!r}; known: {', '.join(names)}")
