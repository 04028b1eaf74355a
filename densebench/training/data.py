"""Images to train on, read as they lie on the disk, or made up; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset

from densebench.peers import import_peer, why_not_importable
from densebench.training.errors import TrainingError
from densebench.training.idx import is_idx_folder, read_splits

RANDOM = "random"
_CIFAR = "cifar-10-batches-py"
_LAYOUTS = (
    f"a folder with train/ and val/ (or test/) of class folders, one of MNIST-format idx files, one that holds "
    f"{_CIFAR}/, or the word {RANDOM}"
)
# What torchvision's weights were trained with.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Images:
    """Images to train on and images to test on, each a pair of [channels, size, size] in float32 and a label.

    Attributes:
        classes: how many; labels count from 0.
        source: where they are from, in words.
    """

    train: Dataset[Any]
    test: Dataset[Any]
    classes: int
    channels: int
    size: int
    source: str

    def facts(self) -> dict[str, Any]:
        """What a record says of them."""
        shape = [self.channels, self.size, self.size]
        counts = {"train": count(self.train), "test": count(self.test)}
        return {"source": self.source, **counts, "classes": self.classes, "shape": shape}


def load_images(data: str, size: int, channels: int, limit: int | None) -> Images:
    """The images that the command's DATA names.

    Args:
        data: a folder, or "random".
        size: their shorter side is resized to so many pixels and their middle cut out.
        channels: of random images; others have what they have.
        limit: at most so many images a split, drawn at random, always the same.

    Raises:
        TrainingError: if it cannot be read, is laid out in none of the known ways, or torchvision is missing.
    """
    images = _random(size, channels, limit) if data == RANDOM else _from_folder(Path(data), size)
    if images.classes < 2:
        raise TrainingError(f"{data} has one class; there is nothing to tell apart")
    train, test = (_limited(split, limit) for split in (images.train, images.test))
    return Images(train, test, images.classes, images.channels, size, images.source)


def count(images: Dataset[Any]) -> int:
    """How many images there are."""
    return len(images)  # type: ignore[arg-type]  # a Dataset of PyTorch's need not have a length, these have


def _from_folder(folder: Path, size: int) -> Images:
    if not folder.is_dir():
        raise TrainingError(f"there is no folder {folder}; DATA is {_LAYOUTS}")
    read = _reader(folder)
    missing = why_not_importable("torchvision")
    if missing:
        raise TrainingError(f"images are read with torchvision: {missing}")
    return read(folder, size)


def _reader(folder: Path) -> Callable[[Path, int], Images]:
    """What reads a folder of its layout."""
    if is_idx_folder(folder):
        return _idx
    if (folder / _CIFAR).is_dir():
        return _cifar
    if (folder / "train").is_dir():
        return _class_folders
    raise TrainingError(f"{folder} is laid out in no way known here; DATA is {_LAYOUTS}")


def _idx(folder: Path, size: int) -> Images:
    train, test = read_splits(folder, _transform(1, size))
    classes = 1 + max(int(train.labels.max()), int(test.labels.max()))
    return Images(train, test, classes, 1, size, f"MNIST-format images in {folder}")


def _cifar(folder: Path, size: int) -> Images:
    cifar = import_peer("torchvision").datasets.CIFAR10
    try:
        train, test = (cifar(folder, train=train, transform=_transform(3, size)) for train in (True, False))
    except (RuntimeError, OSError) as error:  # a checksum differs or a file is missing; it does not say which
        raise TrainingError(
            f"{folder / _CIFAR} is incomplete or broken ({error}); unpack cifar-10-python.tar.gz anew"
        ) from None
    return Images(train, test, len(train.classes), 3, size, f"CIFAR-10 in {folder}")


def _class_folders(folder: Path, size: int) -> Images:
    other = next((name for name in ("val", "test") if (folder / name).is_dir()), None)
    if other is None:
        raise TrainingError(f"{folder} has train/, but neither val/ nor test/ to test on")
    _check_same_classes(folder / "train", folder / other)
    of_folder = import_peer("torchvision").datasets.ImageFolder
    transform = _transform(3, size)
    try:
        train, test = (of_folder(folder / name, transform, loader=_open) for name in ("train", other))
    except (FileNotFoundError, PermissionError) as error:  # names the classes that have no image
        raise TrainingError(f"{folder}: {error}") from None
    return Images(train, test, len(train.classes), 3, size, f"images in {folder} (tested on {other}/)")


def _check_same_classes(train: Path, test: Path) -> None:
    ours, theirs = ({path.name for path in split.iterdir() if path.is_dir()} for split in (train, test))
    if not ours:
        raise TrainingError(f"{train} has no class folders; put the images of each class into one of its own")
    for names, has, lacks in ((ours - theirs, train, test), (theirs - ours, test, train)):
        if names:
            raise TrainingError(
                f"class folders differ: {', '.join(sorted(names))} in {has}, but not in {lacks}; they must agree"
            )


def _open(path: str) -> Image.Image:
    """A file as RGB, as torchvision does it, but naming the file that cannot be read, and with 16 bits (X-rays).

    Pillow makes white of all that does not fit into 8.
    """
    try:
        with open(path, "rb") as file:
            image: Image.Image = Image.open(file)
            if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            elif image.mode in ("I", "F"):
                raise ValueError(f"its values, of mode {image.mode!r}, have no range that is known")
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise TrainingError(f"cannot read the image {path} ({str(error).split(' <')[0]}); remove it") from None


def _transform(channels: int, size: int) -> Any:
    transforms = import_peer("torchvision").transforms
    steps = [transforms.Resize(size), transforms.CenterCrop(size), transforms.ToTensor()]
    return transforms.Compose(steps if channels == 1 else [*steps, transforms.Normalize(_MEAN, _STD)])


def _limited(images: Dataset[Any], limit: int | None) -> Dataset[Any]:
    """At most so many of the images; not the first, which may all be of one class."""
    if limit is None or limit >= count(images):
        return images
    order = torch.randperm(count(images), generator=torch.Generator().manual_seed(0))
    return Subset(images, order[:limit].tolist())


class RandomImages(Dataset[Any]):
    """Noise over a pattern that is the label's own, so that there is something to learn.

    Args:
        images: how many.
        shape: [C, H, W] of one.
        start: number of the first; the same number is the same image.
    """

    CLASSES = 10

    def __init__(self, images: int, shape: tuple[int, int, int], start: int) -> None:
        self.images, self.shape, self.start = images, shape, start
        coarse = torch.randn(self.CLASSES, shape[0], 4, 4, generator=torch.Generator().manual_seed(0))
        self.patterns = F.interpolate(coarse, shape[1:], mode="bilinear")

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not 0 <= index < self.images:
            raise IndexError(index)
        generator = torch.Generator().manual_seed(1 + self.start + index)
        label = int(torch.randint(self.CLASSES, (), generator=generator))
        return self.patterns[label] + torch.randn(self.shape, generator=generator), label


def _random(size: int, channels: int, limit: int | None) -> Images:
    train, test = limit or 1024, limit or 256
    shape = (channels, size, size)
    source = "random images with made-up labels (synthetic: their accuracy means nothing)"
    splits = RandomImages(train, shape, 0), RandomImages(test, shape, train)
    return Images(*splits, RandomImages.CLASSES, channels, size, source)
