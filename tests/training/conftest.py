"""Tiny images on the disk in every form that training reads, and the command in this process."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from densebench import train
from densebench.peers import import_peer, why_not_importable
from densebench.training.records import EpochRecord, read_epochs

TINY = ["--model", "densenet_d2l", "--size", "32", "--batch", "8"]
CLASSES = 3
Bytes = NDArray[np.uint8]


def needs_torchvision() -> pytest.MarkDecorator:
    reason = why_not_importable("torchvision")
    return pytest.mark.skipif(reason is not None, reason=str(reason))


def gray_images(count: int, seed: int, side: int = 12) -> tuple[Bytes, Bytes]:
    """Images, the brighter the higher their label, and labels of all classes."""
    random = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.uint8) % CLASSES
    noise = random.integers(0, 80, (count, side, side), dtype=np.uint8)
    return noise + 60 * labels[:, None, None], labels


def write_idx(path: Path, values: Bytes) -> None:
    content = (
        b"\0\0\x08" + bytes([values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()
    )
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_idx_folder(folder: Path, end: str = ".gz", mark: str = "-", train: int = 24, test: int = 9) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("t10k", test)):
        images, labels = gray_images(count, seed=count)
        write_idx(folder / f"{split}-images{mark}idx3-ubyte{end}", images)
        write_idx(folder / f"{split}-labels{mark}idx1-ubyte{end}", labels)
    return folder


def write_class_folders(folder: Path, test: str = "val") -> Path:
    for split, each in (("train", 8), (test, 3)):
        for label, name in enumerate(("cat", "dog", "emu")):
            images, _ = gray_images(each, seed=10 * label + each, side=20)
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for number, image in enumerate(images):
                Image.fromarray(image // 2 + 40 * label).save(folder / split / name / f"{number}.png")
    return folder


def write_cifar(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """Six files of six images; torchvision is told their checksums."""
    inside = folder / "cifar-10-batches-py"
    inside.mkdir(parents=True)
    random = np.random.default_rng(0)
    sums = {}
    for name in [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]:
        data = random.integers(0, 255, (6, 3072), dtype=np.uint8)
        content = pickle.dumps({"data": data, "labels": [0, 1, 2, 3, 4, 9]})
        (inside / name).write_bytes(content)
        sums[name] = hashlib.md5(content).hexdigest()
    names = pickle.dumps({"label_names": [f"class {number}" for number in range(10)]})
    (inside / "batches.meta").write_bytes(names)
    cifar = import_peer("torchvision").datasets.CIFAR10
    patch.setattr(cifar, "train_list", [[name, sums[name]] for name in sums if name != "test_batch"])
    patch.setattr(cifar, "test_list", [["test_batch", sums["test_batch"]]])
    patch.setattr(cifar, "meta", {**cifar.meta, "md5": hashlib.md5(names).hexdigest()})
    return folder


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    """24 gray images of 12x12 to train on, 9 to test on, 3 classes."""
    return write_idx_folder(tmp_path / "idx")


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def drawing_command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command on a tiny network; exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = train.main([*TINY, *map(str, arguments)])
        except SystemExit as end:  # argparse
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def command(drawing_command: Command, monkeypatch: pytest.MonkeyPatch) -> Command:
    """The same without drawing, which takes as long as the rest."""
    monkeypatch.setattr(train, "_draw", lambda folder: None)
    return drawing_command


def losses(folder: Path) -> dict[tuple[str, int], tuple[float, ...]]:
    """The loss of every step, by strategy and epoch."""
    return {(record.strategy, record.epoch): record.step_losses for record in read_epochs(folder)}


def only(folder: Path) -> EpochRecord:
    (record,) = read_epochs(folder)
    return record
