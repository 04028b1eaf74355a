"""What a DenseNet is made of: one frozen set of options, checked when it is made."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

Stem = Literal["imagenet", "cifar"]


@dataclass(frozen=True)
class DenseNetConfig:
    """The architecture of a DenseNet (Huang et al. 2017, arXiv 1608.06993; names as in torchvision).

    Attributes:
        growth_rate: channels that each layer adds (k).
        block_config: layers in each dense block.
        num_init_features: channels of the stem convolution.
        bn_size: the 1x1 bottleneck has `bn_size * growth_rate` channels (DenseNet-B); None: no bottleneck,
            a layer is BN-ReLU-conv3x3.
        drop_rate: dropout on each layer's new channels, in training.
        num_classes: outputs of the classifier; None: features, no classifier.
        compression: share of the channels that a transition keeps (theta; below 1: DenseNet-C).
        in_channels: channels of the input.
        spatial_dims: 2 for images, 3 for volumes (MONAI's name and networks): every kernel, stride and pool is
            as long through the depth as across.
        stem: "imagenet" (7x7 stride 2, norm, ReLU, max-pool) or "cifar" (3x3 stride 1, nothing else).
        global_pool: average over the last feature map; False gives one prediction a pixel.
        spatial_squeeze: drop the spatial dimensions of a pooled output.
        output_stride: input pixels per pixel of the last map, at most: once reached, transitions no longer
            pool and the later 3x3 convolutions are dilated instead (TF-Slim's option).
        initial_output_stride: stride of the ImageNet stem: 4, or 2 to leave out the max-pool.

    Raises:
        ValueError: for values that make no network, naming the value and the remedy.
    """

    growth_rate: int = 32
    block_config: tuple[int, ...] = (6, 12, 24, 16)
    num_init_features: int = 64
    bn_size: int | None = 4
    drop_rate: float = 0.0
    num_classes: int | None = 1000
    compression: float = 0.5
    in_channels: int = 3
    spatial_dims: int = 2
    stem: Stem = "imagenet"
    global_pool: bool = True
    spatial_squeeze: bool = True
    output_stride: int = 32
    initial_output_stride: int = 4

    def __post_init__(self) -> None:
        if isinstance(self.block_config, str) or not isinstance(self.block_config, Iterable):
            raise ValueError(
                f"block_config={self.block_config!r} is not a sequence; give the number of layers of each block, "
                "e.g. (6, 12, 24, 16)"
            )
        object.__setattr__(self, "block_config", tuple(self.block_config))
        for name in ("compression", "drop_rate"):
            if not isinstance(getattr(self, name), int | float):
                raise ValueError(f"{name}={getattr(self, name)!r} is not a number")
        if not self.block_config:
            raise ValueError(
                "block_config is empty; give the number of layers of each block, e.g. (6, 12, 24, 16)"
            )
        for layers in self.block_config:
            _positive_integer("each entry of block_config", layers)
        for name in ("growth_rate", "num_init_features", "in_channels"):
            _positive_integer(name, getattr(self, name))
        for name in ("bn_size", "num_classes"):
            if getattr(self, name) is not None:
                _positive_integer(name, getattr(self, name))
        self._check_choices()

    def _check_choices(self) -> None:
        if not 0 < self.compression <= 1:
            raise ValueError(f"compression={self.compression} must be in (0, 1]: the share of channels kept")
        if not 0 <= self.drop_rate < 1:
            raise ValueError(f"drop_rate={self.drop_rate} must be in [0, 1)")
        _one_of("spatial_dims", self.spatial_dims, (2, 3))
        _one_of("stem", self.stem, ("imagenet", "cifar"))
        _one_of("output_stride", self.output_stride, (32, 16, 8))
        _one_of("initial_output_stride", self.initial_output_stride, (4, 2))
        if self.stem == "cifar" and self.initial_output_stride != 4:
            raise ValueError("initial_output_stride belongs to stem='imagenet'; the CIFAR stem has stride 1")
        if any(channels < 1 for channels in self.stage_channels()):
            raise ValueError(
                f"compression={self.compression} leaves no channel after a transition; "
                "raise it, or growth_rate or num_init_features"
            )

    @property
    def stem_stride(self) -> int:
        """Input pixels per pixel of the first block's map, along one side."""
        return self.initial_output_stride if self.stem == "imagenet" else 1

    def stage_channels(self) -> list[int]:
        """Channels that enter each block, and last those that leave the network."""
        channels = [self.num_init_features]
        for layers in self.block_config:
            width = channels[-1] + layers * self.growth_rate
            channels.append(compressed(width, self.compression))
        channels[-1] = channels[-2] + self.block_config[-1] * self.growth_rate  # the last block has no transition
        return channels

    def stage_strides(self) -> list[int]:
        """Input pixels per pixel of each block's map, along one side."""
        strides = [self.stem_stride]
        for _ in self.block_config[1:]:
            strides.append(strides[-1] * (2 if strides[-1] < self.output_stride else 1))
        return strides

    def smallest_input(self) -> int:
        """The shortest side of an image that still has a pixel after every stride."""
        size = self.stage_strides()[-1] // self.stem_stride  # pixels the first block needs
        for _ in range({4: 2, 2: 1, 1: 0}[self.stem_stride]):
            size = 2 * size - 1  # a stem convolution or max-pool of stride 2 rounds up, average pooling down
        return size


def compressed(channels: int, compression: float) -> int:
    """Channels after a transition: floor(theta * m), without the rounding error of a decimal theta."""
    return int(channels * compression + 1e-6)


def _positive_integer(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def _one_of(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}")
