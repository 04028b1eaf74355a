"""Feature maps in preallocated memory, in the memory format of the network's input."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from densebench.formats import memory_format_of


@dataclass(frozen=True)
class MapShape:
    """N maps of one size (H, W) or (D, H, W) in one memory format; channels are said when a map is made."""

    images: int
    size: tuple[int, ...]
    memory_format: torch.memory_format

    @classmethod
    def of(cls, x: Tensor) -> MapShape:
        """The shape of [N, C, H, W], in its memory format."""
        return cls(x.shape[0], tuple(x.shape[2:]), memory_format_of(x))

    @property
    def pixels(self) -> int:
        return self.images * math.prod(self.size)

    def empty(self, channels: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialized [N, channels, H, W] on the device (and by default of the dtype) of `like`."""
        return self.view(like.new_empty(self.pixels * channels, dtype=dtype or like.dtype), channels)

    def view(self, flat: Tensor, channels: int) -> Tensor:
        """The beginning of a flat scratch as a dense [N, channels, H, W]."""
        flat = flat[: self.pixels * channels]
        if self.memory_format is torch.contiguous_format:
            return flat.view(self.images, channels, *self.size)
        return flat.view(self.images, *self.size, channels).movedim(-1, 1)
