"""Images are read as they lie: the right pixels, labels, channels and splits, or one sentence on what is wrong."""

from __future__ import annotations

import gzip
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from densebench import peers
from densebench.training.data import Images, count, load_images
from densebench.training.errors import TrainingError
from densebench.training.idx import read_idx
from tests.training.conftest import (
    gray_images,
    needs_torchvision,
    write_cifar,
    write_class_folders,
    write_idx,
    write_idx_folder,
)

pytestmark = needs_torchvision()


def load(data: object, size: int = 12, limit: int | None = None) -> Images:
    return load_images(str(data), size, 3, limit)


def pair(split: object, index: int) -> tuple[Tensor, int]:
    return split[index]  # type: ignore[index]


@pytest.mark.parametrize(("end", "mark"), [(".gz", "-"), ("", "-"), ("", "."), (".gz", ".")])
def test_idx_files(tmp_path: Path, end: str, mark: str) -> None:
    found = load(write_idx_folder(tmp_path, end, mark))
    assert (count(found.train), count(found.test), found.classes, found.channels) == (24, 9, 3, 1)
    for split, number in ((found.train, 24), (found.test, 9)):
        images, labels = gray_images(number, seed=number)
        for index in (0, 1, number - 1):
            image, label = pair(split, index)
            assert label == labels[index]
            assert torch.equal(image, torch.from_numpy(images[index : index + 1]).float() / 255)


def test_images_are_resized(tmp_path: Path) -> None:
    image, _ = pair(load(write_idx_folder(tmp_path), size=40).train, 0)
    assert image.shape == (1, 40, 40)


@pytest.mark.parametrize("other", ["val", "test"])
def test_class_folders(tmp_path: Path, other: str) -> None:
    found = load(write_class_folders(tmp_path, other), size=20)
    assert (count(found.train), count(found.test), found.classes, found.channels) == (24, 9, 3, 3)
    assert f"{other}/" in found.source
    image, label = pair(found.test, 8)
    assert label == 2
    with Image.open(tmp_path / other / "emu" / "2.png") as file:
        pixels = torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(image, (pixels - mean) / std)


def test_images_of_16_bits_keep_their_range(tmp_path: Path) -> None:
    """As X-rays have; Pillow makes white of all that does not fit into 8."""
    write_class_folders(tmp_path)
    wide = np.linspace(0, 65535, 400).astype(np.uint16).reshape(20, 20)
    Image.fromarray(wide).save(tmp_path / "train" / "cat" / "0.png")
    Image.fromarray((wide >> 8).astype(np.uint8)).save(tmp_path / "train" / "cat" / "1.png")
    found = load(tmp_path, size=20)
    assert torch.equal(pair(found.train, 0)[0], pair(found.train, 1)[0])
    assert pair(found.train, 0)[0].std() > 1


def test_images_without_a_range_are_refused(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    Image.fromarray(np.zeros((20, 20), np.float32)).save(tmp_path / "train" / "cat" / "0.tiff")
    images = load(tmp_path, size=20).train
    with pytest.raises(TrainingError, match=r"0\.tiff \(its values, of mode 'F', have no range that is known\)"):
        [pair(images, index) for index in range(3)]


def test_the_middle_of_a_long_image_is_taken(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    stripes = np.zeros((20, 60), np.uint8)
    stripes[:, 20:40] = 255
    Image.fromarray(stripes).save(tmp_path / "train" / "cat" / "0.png")
    image, _ = pair(load(tmp_path, size=20).train, 0)
    assert image.shape == (3, 20, 20)
    assert image.amin(dim=(1, 2)).tolist() == image.amax(dim=(1, 2)).tolist()


def test_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = load(write_cifar(tmp_path / "data", monkeypatch), size=32)
    assert (count(found.train), count(found.test), found.classes, found.channels) == (30, 6, 10, 3)
    image, label = pair(found.train, 5)
    assert (tuple(image.shape), label) == ((3, 32, 32), 9)


def test_random_images_are_called_that() -> None:
    found = load("random", size=16)
    assert (count(found.train), count(found.test), found.classes, found.channels) == (1024, 256, 10, 3)
    assert "synthetic" in found.source
    image, label = pair(found.train, 3)
    again, same = pair(load("random", size=16).train, 3)
    assert torch.equal(image, again)
    assert label == same
    assert not torch.equal(image, pair(found.test, 3)[0])
    with pytest.raises(IndexError):
        pair(found.train, 1024)


def test_random_images_have_something_to_learn() -> None:
    """A nearest-mean classifier made from the first split knows the second."""
    found = load("random", size=16)
    train, test = ([pair(split, i) for i in range(200)] for split in (found.train, found.test))
    means = torch.stack([torch.stack([x for x, y in train if y == label]).mean(0) for label in range(10)])
    right = [int((means - x).flatten(1).norm(dim=1).argmin()) == y for x, y in test]
    assert sum(right) > 150


def test_a_limit_takes_of_all_classes_and_always_the_same(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    one, other = (load(tmp_path, 20, limit=8) for _ in range(2))
    assert (count(one.train), count(one.test)) == (8, 8)
    labels = [pair(one.train, i)[1] for i in range(8)]
    assert len(set(labels)) == 3  # the first eight are all cats
    assert labels == [pair(other.train, i)[1] for i in range(8)]
    assert count(load(tmp_path, 20, limit=100).test) == 9


def refusal(data: object) -> str:
    with pytest.raises(TrainingError) as found:
        load(data, size=20)
    assert "\n" not in str(found.value)
    return str(found.value)


def test_no_folder_and_no_layout_name_the_layouts(tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        said = refusal(folder)
        assert str(folder) in said
        for layout in ("train/ and val/", "MNIST-format", "cifar-10-batches-py/", "random"):
            assert layout in said


def test_training_images_alone_are_not_enough(tmp_path: Path) -> None:
    (tmp_path / "train" / "cat").mkdir(parents=True)
    assert "neither val/ nor test/" in refusal(tmp_path)


def test_class_folders_that_differ_are_named(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    (tmp_path / "val" / "emu").rename(tmp_path / "val" / "gnu")
    assert f"emu in {tmp_path / 'train'}, but not in {tmp_path / 'val'}" in refusal(tmp_path)
    (tmp_path / "train" / "emu").rename(tmp_path / "train" / "gnu")
    (tmp_path / "val" / "owl").mkdir()
    assert f"owl in {tmp_path / 'val'}, but not in {tmp_path / 'train'}" in refusal(tmp_path)


def test_empty_class_folders_are_named(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    for split in ("train", "val"):
        (tmp_path / split / "yak").mkdir()
    assert "yak" in refusal(tmp_path)
    (tmp_path / "bare" / "train").mkdir(parents=True)
    (tmp_path / "bare" / "val").mkdir()
    assert "no class folders" in refusal(tmp_path / "bare")


def test_one_class_is_nothing_to_learn(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    for path in [path for split in ("train", "val") for path in (tmp_path / split).iterdir()]:
        if path.name != "cat":
            path.rename(tmp_path / f"{path.parent.name}-{path.name}")
    assert "one class" in refusal(tmp_path)


def test_an_image_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    (tmp_path / "train" / "cat" / "0.png").write_bytes(b"no image")
    path = tmp_path / "train" / "cat" / "1.png"
    path.write_bytes(path.read_bytes()[:100])
    for number in (0, 1):
        with pytest.raises(TrainingError, match=f"cannot read the image .*cat/{number}.png"):
            pair(load(tmp_path, 20).train, number)


def test_broken_idx_files_are_named(tmp_path: Path) -> None:
    good = tmp_path / "good"
    write_idx(good, gray_images(4, 0)[0])
    assert read_idx(good).shape == (4, 12, 12)
    for name, content in {
        "short": good.read_bytes()[:-1],
        "long": good.read_bytes() + b"1",
        "header": good.read_bytes()[:9],
        "empty": b"",
        "floats": b"\0\0\x0d" + good.read_bytes()[3:],
        "plain.gz": good.read_bytes(),
        "cut.gz": gzip.compress(good.read_bytes())[:-20],
    }.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(TrainingError, match=name):
            read_idx(path)


def test_idx_folders_that_do_not_fit_together(tmp_path: Path) -> None:
    folder = write_idx_folder(tmp_path / "a")
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    assert "lacks t10k-labels-idx1-ubyte" in refusal(folder)
    folder = write_idx_folder(tmp_path / "b")
    write_idx(folder / "train-labels-idx1-ubyte.gz", gray_images(23, 0)[1])
    assert "24 images and 23 labels" in refusal(folder)
    folder = write_idx_folder(tmp_path / "c")
    write_idx(folder / "train-labels-idx1-ubyte.gz", gray_images(24, 0)[0])
    assert "3 dimensions, labels have 1" in refusal(folder)
    assert "no images" in refusal(write_idx_folder(tmp_path / "d", test=0))


def test_broken_cifar_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_cifar(tmp_path / "data", monkeypatch)
    (folder / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"something else")
    assert "unpack cifar-10-python.tar.gz anew" in refusal(folder)


@pytest.fixture
def no_torchvision(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    peers.why_not_importable.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    yield
    peers.why_not_importable.cache_clear()


def test_without_torchvision(tmp_path: Path, no_torchvision: None) -> None:
    assert "pip install 'densebench[peers]'" in refusal(write_idx_folder(tmp_path))
    assert count(load("random").train) == 1024
