"""Channels-last maps as matrices: pixels are rows, channels columns."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pixels:
    """The pixels of a batch of maps: N x H x W, of volumes N x D x H x W.

    Attributes:
        images: N.
        size: (H, W) or (D, H, W).
    """

    images: int
    size: tuple[int, ...]

    @property
    def image(self) -> int:
        """Pixels of one image."""
        return math.prod(self.size)

    @property
    def count(self) -> int:
        return self.images * self.image

    def shape(self, channels: int) -> torch.Size:
        """As a map, [N, C, H, W]."""
        return torch.Size((self.images, channels, *self.size))

    def grid(self, rows: Tensor) -> Tensor:
        """A matrix [N H W, C] as [N, H, W, C]."""
        return rows.view(self.images, *self.size, rows.shape[1])

    def map(self, rows: Tensor) -> Tensor:
        """A matrix [N H W, C] as a channels-last map [N, C, H, W]."""
        return self.grid(rows).movedim(-1, 1)

    def parts(self, pixels: int) -> Iterator[tuple[Pixels, slice]]:
        """Whole images, about so many pixels at a time, and which rows they are."""
        step = max(1, round(pixels / max(1, self.image)))
        for start in range(0, self.images, step):
            part = Pixels(min(step, self.images - start), self.size)
            yield part, slice(start * self.image, start * self.image + part.count)

    def buffer(self, channels: int, like: Tensor) -> Tensor:
        """An uninitialized matrix [N H W, C] whose first columns a kernel can read with wide loads.

        On a GPU rows start at multiples of 16 values: without that not one load is 16 bytes wide.
        """
        width = -(-channels // 16) * 16 if like.is_cuda else channels
        return like.new_empty(self.count, width)[:, :channels]


class Scratch:
    """Named pieces of memory, made at their widest use so far and used again by every layer."""

    def __init__(self) -> None:
        self._flat: dict[str, Tensor] = {}

    def rows(
        self, name: str, like: Tensor, columns: int | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """A dense matrix with the rows (and by default columns and dtype) of `like`."""
        columns, dtype = like.shape[1] if columns is None else columns, dtype or like.dtype
        size, held = like.shape[0] * columns, self._flat.pop(name, None)
        if held is None or held.numel() < size or held.dtype != dtype:
            del held  # before the new one is made
            held = like.new_empty(size, dtype=dtype)
        self._flat[name] = held
        return held[:size].view(like.shape[0], columns)

    def free(self, name: str) -> None:
        """Give a piece back before it is needed again, where others need memory more."""
        self._flat.pop(name, None)
