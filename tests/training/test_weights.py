"""Weights to start from: torchvision's by both their names, another number of classes, and what does not fit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from densebench.models import build_model
from densebench.peers import import_peer
from densebench.training.errors import TrainingError
from densebench.training.weights import load_weights
from tests.training.conftest import needs_torchvision


def test_another_number_of_classes_starts_the_classifier_anew(tmp_path: Path) -> None:
    theirs, ours = (build_model("densenet_d2l", num_classes=number) for number in (7, 3))
    torch.save(theirs.state_dict(), tmp_path / "w.pt")
    head = ours.classifier.weight.clone()
    note = load_weights(ours, str(tmp_path / "w.pt"))
    assert note is not None
    assert "has 7 outputs, the images have 3 classes" in note
    assert torch.equal(ours.classifier.weight, head)
    for name, tensor in theirs.features.state_dict().items():
        assert torch.equal(ours.features.state_dict()[name], tensor), name
    same = build_model("densenet_d2l", num_classes=7)
    assert load_weights(same, str(tmp_path / "w.pt")) is None
    assert torch.equal(same.classifier.weight, theirs.classifier.weight)


@needs_torchvision()
def test_torchvisions_weights_also_by_their_old_names(tmp_path: Path) -> None:
    theirs = import_peer("torchvision").models.densenet121()
    ours = build_model("densenet121", num_classes=1000)
    old = {
        re.sub(r"(denselayer\d+\.(norm|conv))([12])\.", r"\1.\3.", name): tensor
        for name, tensor in theirs.state_dict().items()
        if not name.endswith("num_batches_tracked")  # as in the files to download
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save(old, tmp_path / "w.pth")
    assert load_weights(ours, str(tmp_path / "w.pth")) is None
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: s.pop("features.conv0.weight"), "it lacks features.conv0.weight"),
        (lambda s: s.update(extra=torch.ones(1)), "it has extra, which the network has not"),
        (
            lambda s: s.update({"features.conv0.weight": torch.ones(64, 3, 7, 7)}),
            r"features.conv0.weight is \[64, 3, 7, 7\] there and \[64, 1, 7, 7\] in the network",
        ),
        (
            lambda s: s.update({"classifier.weight": torch.ones(5, 9), "classifier.bias": torch.ones(5)}),
            "classifier",
        ),
        (lambda s: s.update({"classifier.bias": torch.ones(5)}), "classifier.bias"),
        (lambda s: s.update(epoch=3), "no state_dict"),
        (lambda s: s.clear(), "no state_dict"),
    ],
)
def test_weights_that_do_not_fit_are_named(change: Any, named: str, tmp_path: Path) -> None:
    model = build_model("densenet_d2l", num_classes=3)
    state = dict(model.state_dict())
    change(state)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(TrainingError, match=named):
        load_weights(model, str(tmp_path / "w.pt"))
