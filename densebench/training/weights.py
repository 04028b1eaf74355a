"""Weights to start from: a state_dict of torchvision's or of this project's networks."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from densebench.counting import counted
from densebench.training.errors import TrainingError

_HEAD = ("classifier.weight", "classifier.bias")
# The files that torchvision's weights are downloaded from still have the names of 2017: norm.1 for norm1.
_OLD_NAME = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..*)$")


def load_weights(network: nn.Module, path: str) -> str | None:
    """Start a network from a file; a classifier for another number of classes is left as it is.

    Returns:
        A sentence on the classifier, if it was left.

    Raises:
        TrainingError: if the file holds no state_dict, or one that does not fit; it names the first tensor.
    """
    state = {_OLD_NAME.sub(r"\1\2", name): tensor for name, tensor in _read(path).items()}
    own = network.state_dict()
    note = None
    if _only_classes_differ(own, state):
        outputs, classes = (len(tensors[_HEAD[0]]) for tensors in (state, own))
        had = counted(outputs, "output")
        note = f"the classifier starts anew: {path} has {had}, the images have {classes:,} classes"
        state |= {name: own[name] for name in _HEAD}
    wrong = _misfit(own, state)
    if wrong:
        raise TrainingError(
            f"--weights {path} does not fit: {wrong}; give the --model it is of, and images of as many channels"
        )
    network.load_state_dict(state)
    return note


def _read(path: str) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # whatever unpickling a wrong file comes to
        found = None
    if isinstance(found, Mapping) and found and all(isinstance(value, Tensor) for value in found.values()):
        return dict(found)
    raise TrainingError(
        f"--weights {path} holds no state_dict that torch.load can read with weights_only=True; write one with "
        "torch.save(model.state_dict(), ...)"
    )


def _only_classes_differ(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> bool:
    weight, bias = (state.get(name) for name in _HEAD)
    if weight is None or bias is None or weight.dim() != 2 or bias.shape != weight.shape[:1]:
        return False
    return weight.shape[1:] == own[_HEAD[0]].shape[1:] and weight.shape != own[_HEAD[0]].shape


def _misfit(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str | None:
    """The first thing that keeps a state_dict from a network, or None."""
    for name, tensor in own.items():
        if name not in state:
            if name.endswith("num_batches_tracked"):  # newer than torchvision's files, and PyTorch does without
                continue
            return f"it lacks {name}"
        if state[name].shape != tensor.shape:
            return f"{name} is {list(state[name].shape)} there and {list(tensor.shape)} in the network"
    unknown = next((name for name in state if name not in own), None)
    return None if unknown is None else f"it has {unknown}, which the network has not"
