"""Files of tensors in a run's folder: the weights of each strategy, and what `--resume` goes on from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from densebench.training.errors import TrainingError


def save_weights(network: nn.Module, folder: Path, strategy: str) -> None:
    """Write `<strategy>.pt`: a plain state_dict with torchvision's names, on the CPU.

    Raises:
        TrainingError: if it cannot be written.
    """
    state: dict[str, Tensor] = {name: t.detach().cpu().contiguous() for name, t in network.state_dict().items()}
    _save(state, folder / f"{strategy}.pt")


def save_checkpoint(state: dict[str, Any], folder: Path, strategy: str) -> None:
    """Write what a later run goes on from, whole or not at all.

    Raises:
        TrainingError: if it cannot be written.
    """
    _save(state, _checkpoint(folder, strategy))


def load_checkpoint(folder: Path, strategy: str) -> dict[str, Any] | None:
    """What `save_checkpoint` wrote; None if nothing is there.

    Raises:
        TrainingError: if it cannot be read.
    """
    path = _checkpoint(folder, strategy)
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever unpickling a broken file comes to
        name = type(error).__name__
        raise TrainingError(f"cannot read {path} ({name}); delete it to train {strategy} from the start") from None
    return state


def _checkpoint(folder: Path, strategy: str) -> Path:
    return folder / f"{strategy}.checkpoint"


def _save(content: Any, path: Path) -> None:
    beside = path.with_name(f".{path.name}.part")
    try:
        torch.save(content, beside)
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:  # a full disk is a RuntimeError
        beside.unlink(missing_ok=True)
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise TrainingError(f"cannot write {path} ({reason})") from None
