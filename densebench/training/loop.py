"""The epochs of one strategy: a plain PyTorch loop with the project's measurements around it."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from densebench.measure.environment import environment
from densebench.measure.memory import measure_peak
from densebench.models import set_strategy
from densebench.training.data import Images, count
from densebench.training.errors import DivergedError
from densebench.training.records import EpochRecord
from densebench.training.settings import AUTOCAST, Settings
from densebench.workload import Workload

SECONDS_BETWEEN_LINES = 30.0
Say = Callable[[str], None]


class Training:
    """One network on its way through the epochs, run by one strategy.

    Args:
        network: where it starts from; it stays as it is.
        strategy: by name.
        images: to train and to test on.
        settings: completed ones.

    Raises:
        UnsupportedError: if the strategy cannot run the network here.
    """

    def __init__(self, network: nn.Module, strategy: str, images: Images, settings: Settings) -> None:
        self.strategy, self.images, self.settings = strategy, images, settings
        self.device = torch.device(str(settings.device))
        # Channels last: the layout that every strategy, naive among them, is fastest in.
        network = copy.deepcopy(network).to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.network = set_strategy(network, strategy)
        self.optimizer = _optimizer(self.network, settings)
        # Half precision has too few exponents for small gradients; elsewhere the scaler does nothing.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.autocast == "fp16")
        self.epochs_done = 0

    def activation_bytes(self) -> int:
        """Measure the activation memory of a step, on a copy of the network."""
        shape = (self.settings.batch, self.images.channels, self.images.size, self.images.size)
        dtype = AUTOCAST[self.settings.autocast] if self.settings.autocast else None

        def build() -> Workload:
            input = torch.zeros(shape, device=self.device).contiguous(memory_format=torch.channels_last)
            return Workload(copy.deepcopy(self.network), input, "train", dtype)

        return measure_peak(build, self.device, repeats=1).peak_delta_bytes

    def run_epoch(self, peak_delta_bytes: int, say: Say) -> EpochRecord:
        """Train for one epoch, and test.

        Args:
            peak_delta_bytes: for the record.
            say: takes a line now and then.

        Raises:
            DivergedError: if a loss is no number.
        """
        number = self.epochs_done + 1
        start = time.perf_counter()
        losses, right = self._train(number, say)
        seconds = time.perf_counter() - start
        images = len(losses) * self.settings.batch
        test_loss, test_accuracy = self._test()
        self.epochs_done = number
        return EpochRecord(
            strategy=self.strategy,
            epoch=number,
            step_losses=tuple(losses),
            train_loss=sum(losses) / len(losses),
            train_accuracy=right / images,
            test_loss=test_loss if math.isfinite(test_loss) else None,
            test_accuracy=test_accuracy,
            seconds=seconds,
            images_per_s=images / seconds,
            peak_delta_bytes=peak_delta_bytes,
            options=self.settings.of_the_curve(),
            images=self.images.facts(),
            environment=environment(self.device.type),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def run(self) -> dict[str, Any]:
        """What the whole curve depends on: options and images."""
        return {"options": self.settings.of_the_curve(), "images": self.images.facts()}

    def state(self) -> dict[str, Any]:
        """All that the next epoch depends on. Its batches come from the seed and its number, so no RNG does."""
        parts: dict[str, Any] = {"network": self.network, "optimizer": self.optimizer, "scaler": self.scaler}
        states = {name: part.state_dict() for name, part in parts.items()}
        return {"run": self.run(), "epochs_done": self.epochs_done, **states}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.epochs_done = state["epochs_done"]

    def _train(self, epoch: int, say: Say) -> tuple[list[float], int]:
        """The loss of each step, and how many images were recognized."""
        self.network.train()
        losses: list[float] = []
        right = 0
        batches = self._batches(self.images.train, _order(count(self.images.train), self.settings.seed, epoch))
        said = time.perf_counter()
        for images, labels in batches:
            loss, found = self._step(images, labels)
            losses.append(loss)
            right += found
            if not math.isfinite(loss):
                raise DivergedError(_diverged(self.settings, self.strategy, epoch, len(losses), loss))
            if time.perf_counter() - said > SECONDS_BETWEEN_LINES:
                said = time.perf_counter()
                say(f"{self.strategy}: epoch {epoch}, step {len(losses):,} of {len(batches):,}, loss {loss:.4f}")
        return losses, right

    def _step(self, images: Tensor, labels: Tensor) -> tuple[float, int]:
        images, labels = self._moved(images, labels)
        with self._autocast():
            outputs = self.network(images)
            loss = F.cross_entropy(outputs, labels)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.item(), int((outputs.detach().argmax(1) == labels).sum())

    @torch.no_grad()
    def _test(self) -> tuple[float, float]:
        """Mean loss, and the share of test images that are recognized."""
        self.network.eval()
        loss, right = 0.0, 0
        for images, labels in self._batches(self.images.test):
            images, labels = self._moved(images, labels)
            with self._autocast():
                outputs = self.network(images)
                loss += F.cross_entropy(outputs, labels, reduction="sum").item()
            right += int((outputs.argmax(1) == labels).sum())
        total = count(self.images.test)
        return loss / total, right / total

    def _batches(self, images: Dataset[Any], order: Sequence[int] | None = None) -> DataLoader[Any]:
        """Batches of equal size in an order, or as they come with what is left over."""
        return DataLoader(
            images,
            self.settings.batch,
            sampler=order,
            drop_last=order is not None,
            num_workers=self.settings.workers,
            pin_memory=self.device.type == "cuda",
        )

    def _moved(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        images = images.to(self.device, non_blocking=True, memory_format=torch.channels_last)
        return images, labels.to(self.device, non_blocking=True)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.settings.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, AUTOCAST[self.settings.autocast])


def _optimizer(network: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    options: dict[str, Any] = {"lr": settings.lr}
    if settings.optimizer == "sgd":
        options["momentum"] = settings.momentum
    if settings.weight_decay is not None:
        options["weight_decay"] = settings.weight_decay
    return kinds[settings.optimizer](network.parameters(), **options)


def _order(images: int, seed: int, epoch: int) -> list[int]:
    """The order of an epoch's images, the same for every strategy."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order: list[int] = torch.randperm(images, generator=generator).tolist()
    return order


def _diverged(settings: Settings, strategy: str, epoch: int, step: int, loss: float) -> str:
    wider = " or take --autocast bf16" if settings.autocast == "fp16" else ""
    where = f"step {step} of epoch {epoch} by {strategy}"
    return f"the loss is {loss} at {where}, so the run ends; lower --lr (it is {settings.lr:g}){wider}"
