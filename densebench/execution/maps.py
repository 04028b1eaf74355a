"""Feature maps in preallocated memory, in the memory format of the network's input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def memory_format_of(x: Tensor) -> torch.memory_format:
    """Channels-last if [N, C, H, W] is dense in that format and not also contiguous; else contiguous."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


@dataclass(frozen=True)
class MapShape:
    """N x H x W pixels in one memory format; channels are said when a map is made."""

    images: int
    height: int
    width: int
    channels_last: bool

    @classmethod
    def of(cls, x: Tensor) -> MapShape:
        """The shape of [N, C, H, W], in its memory format."""
        channels_last = memory_format_of(x) is torch.channels_last
        return cls(x.shape[0], x.shape[2], x.shape[3], channels_last)

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @property
    def pixels(self) -> int:
        return self.images * self.height * self.width

    def empty(self, channels: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialized [N, channels, H, W] on the device (and by default of the dtype) of `like`."""
        return self.view(like.new_empty(self.pixels * channels, dtype=dtype or like.dtype), channels)

    def view(self, flat: Tensor, channels: int) -> Tensor:
        """The beginning of a flat scratch as a dense [N, channels, H, W]."""
        flat = flat[: self.pixels * channels]
        if self.channels_last:
            return flat.view(self.images, self.height, self.width, channels).permute(0, 3, 1, 2)
        return flat.view(self.images, channels, self.height, self.width)
