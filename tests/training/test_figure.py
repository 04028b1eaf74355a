"""Learning curves are drawn from the records alone."""

from __future__ import annotations

import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from densebench.report.figure_learning import learning_picture, smoothed, write_curves
from densebench.report.units import memory
from densebench.training.records import read_epochs
from tests.report.records import learning_run
from tests.training.conftest import Command, needs_torchvision


@needs_torchvision()
def test_curves_are_written(idx_folder: Path, tmp_path: Path, drawing_command: Command) -> None:
    out = tmp_path / "run"
    code, said, _ = drawing_command(idx_folder, "--strategy", "naive,fused", "--epochs", 2, "--out", out)
    assert code == 0
    assert said.splitlines()[-1] == str(out / "curves.svg")
    text = " ".join("".join(ET.parse(out / "curves.svg").getroot().itertext()).split())  # the setting is wrapped
    for record in read_epochs(out):
        assert record.strategy in text
        assert f"activations {memory(record.peak_delta_bytes)}" in text
    for words in ("densenet_d2l on MNIST-format images", "to train and", "sgd lr 0.1", "from seed 0"):
        assert words in text
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copy(out / "training.jsonl", copy)
    assert write_curves(copy) == copy / "curves.svg"
    assert (copy / "curves.svg").read_bytes() == (out / "curves.svg").read_bytes()


def test_nothing_is_drawn_of_nothing(tmp_path: Path) -> None:
    assert write_curves(tmp_path) is None
    (tmp_path / "training.jsonl").write_text('{"half": \n')
    assert write_curves(tmp_path) is None
    assert not (tmp_path / "curves.svg").exists()


def test_a_picture_has_its_data() -> None:
    records = learning_run()
    picture = learning_picture(records, "curves")
    assert len(picture.table.rows) == len(records)
    assert "fused recognizes 70.0 % after epoch 3 with 12.0 MiB of activations" in picture.alt


def test_smoothing_takes_the_mean_of_what_came_before() -> None:
    assert smoothed([4.0, 2.0, 6.0, 0.0], 2) == pytest.approx([4, 3, 4, 3])
    assert smoothed([4.0, 2.0, 6.0, 0.0], 3) == pytest.approx([4, 3, 4, 8 / 3])
    assert smoothed([4.0, 2.0], 1) == [4.0, 2.0]
