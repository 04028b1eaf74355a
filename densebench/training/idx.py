"""Files in MNIST's idx format, gzipped or not; torchvision reads them only unpacked, and in folders of its own."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from densebench.counting import counted
from densebench.training.errors import TrainingError

_UNSIGNED_BYTES = b"\0\0\x08"  # how a file of them begins; the next byte is the number of dimensions
_SPLITS = ("train", "t10k")
Bytes = NDArray[np.uint8]


class IdxImages(Dataset[Any]):
    """Gray images and their labels.

    Args:
        images: [N, H, W].
        labels: [N].
        transform: what becomes of an image (of PIL's).
    """

    def __init__(self, images: Bytes, labels: Bytes, transform: Any) -> None:
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


def is_idx_folder(folder: Path) -> bool:
    """Whether a folder holds files by MNIST's names."""
    return any(_find(folder, f"{split}-{kind}", rank) for split in _SPLITS for kind, rank in _KINDS)


def read_splits(folder: Path, transform: Any) -> tuple[IdxImages, IdxImages]:
    """Images to train on and images to test on.

    Raises:
        TrainingError: if a file is missing or broken; it names the file.
    """
    train, test = (_split(folder, name, transform) for name in _SPLITS)
    return train, test


def read_idx(path: Path) -> Bytes:
    """The array of unsigned bytes in an idx file.

    Raises:
        TrainingError: if it cannot be read, is of another format, or is cut short.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise TrainingError(f"cannot read {path} ({error}); copy it anew") from None
    rank = content[3] if len(content) > 3 else 0
    header = 4 + 4 * rank
    if content[:3] != _UNSIGNED_BYTES or len(content) < header:
        raise TrainingError(f"{path} is no idx file of unsigned bytes, MNIST's format")
    shape = struct.unpack(f">{rank}I", content[4:header])
    if len(content) - header != math.prod(shape):
        promised = " x ".join(map(str, shape))
        raise TrainingError(f"{path} holds {len(content) - header:,} bytes, not {promised}; copy it anew")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


_KINDS = (("images", 3), ("labels", 1))


def _split(folder: Path, name: str, transform: Any) -> IdxImages:
    found = []
    for kind, rank in _KINDS:
        path = _find(folder, f"{name}-{kind}", rank)
        if path is None:
            raise TrainingError(f"{folder} lacks {name}-{kind}-idx{rank}-ubyte (or the same with .gz)")
        found.append(read_idx(path))
        if found[-1].ndim != rank:
            raise TrainingError(f"{path} has {counted(found[-1].ndim, 'dimension')}, {kind} have {rank}")
    images, labels = found
    if len(images) != len(labels):
        raise TrainingError(f"{folder} has {len(images):,} images and {len(labels):,} labels as {name}-...")
    if not images.size:
        raise TrainingError(f"{folder} has no images in {name}-images-idx3-ubyte")
    return IdxImages(images, labels, transform)


def _find(folder: Path, name: str, rank: int) -> Path | None:
    """The file of a name as MNIST's authors spelled it, before and after unpacking, and as others did."""
    spellings = (f"{name}{mark}idx{rank}-ubyte{end}" for mark in "-." for end in ("", ".gz"))
    return next((folder / spelling for spelling in spellings if (folder / spelling).is_file()), None)
