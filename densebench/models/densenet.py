"""DenseNet (Huang et al. 2017): one set of modules and parameters, run by whichever strategy is set."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.fx
from torch import Tensor, nn

from densebench.counting import counted
from densebench.models.config import DenseNetConfig
from densebench.models.dimensions import KINDS, Conv
from densebench.models.features import Features, set_strategy, steps_of
from densebench.models.layers import DenseBlock, ReLU, Transition
from densebench.models.stage import Stage


class DenseNet(nn.Module):
    """A densely connected network for images, or for volumes.

    Args:
        config: the architecture.
        strategy: how its stages are run; see `densebench.list_strategies()`. It changes memory and time,
            never a value, and can be changed later with `densebench.set_strategy`.

    `state_dict` names and initialization are torchvision's.
    """

    def __init__(self, config: DenseNetConfig | None = None, strategy: str = "naive") -> None:
        super().__init__()
        self.config = config = config or DenseNetConfig()
        self.features = Features(_features(config))
        if config.num_classes is not None:
            self.classifier = nn.Linear(config.stage_channels()[-1], config.num_classes)
        _initialize(self)
        set_strategy(self, strategy)

    @property
    def strategy(self) -> str:
        return self.features.strategy

    def forward(self, input: Tensor) -> Tensor:
        """Predictions for a batch of images; of volumes, there is a depth before each height.

        Args:
            input: [N, in_channels, H, W].

        Returns:
            [N, num_classes]; without global pooling [N, num_classes, H / stride, W / stride]; with
            `num_classes=None` the features instead of predictions.

        Raises:
            ValueError: if the input has the wrong rank, channels or size.
            TypeError: if its dtype or device is not the parameters'.
        """
        self._check_input(input)
        return self._predict(self.features(input))

    def end_points(self, input: Tensor) -> dict[str, Tensor]:
        """Every intermediate map by name (as in TF-Slim); the last, "output", is `forward`'s result.

        Names are those of the modules: a dense block's map stands under the block, its transition's under the
        transition; a norm and what follows it stand under the last module of the run.
        """
        self._check_input(input)
        points: dict[str, Tensor] = {}
        x = input
        names = {module: name for name, module in self.features.named_children()}
        for step in steps_of(self.features):
            if isinstance(step, Stage):
                block_only = Stage(step.block, step.head, None, step.children)
                points[step.name] = x = block_only.run(x)
                x = step.run_tail(x)
                points[step.children[-1][0]] = x
            else:
                points[names[step]] = x = step(x)
        points["output"] = self._predict(x)
        return points

    def _predict(self, features: Tensor) -> Tensor:
        config = self.config
        if config.global_pool:
            features = KINDS[config.spatial_dims].global_pool(features, 1)
        if config.num_classes is not None:
            # One linear map a pixel; a pooled map has one pixel.
            features = self.classifier(features.movedim(1, -1)).movedim(-1, 1)
        return features.flatten(1) if config.global_pool and config.spatial_squeeze else features

    def _check_input(self, input: Tensor) -> None:
        config = self.config
        if torch.compiler.is_compiling() or isinstance(input, torch.fx.Proxy):
            return
        if input.dim() != 2 + config.spatial_dims:
            sides = "H, W" if config.spatial_dims == 2 else "D, H, W"
            raise ValueError(
                f"input must be [N, {config.in_channels}, {sides}], got shape {list(input.shape)}"
                f"{_remedy_for_rank(config, input)}"
            )
        if input.shape[1] != config.in_channels:
            channels = counted(input.shape[1], "channel")
            raise ValueError(f"input has {channels}, the network takes in_channels={config.in_channels}")
        smallest = config.smallest_input()
        if min(input.shape[2:]) < smallest:
            raise ValueError(
                f"input {'x'.join(map(str, input.shape[2:]))} is too small for a network of stride "
                f"{config.stage_strides()[-1]}: each side needs at least {counted(smallest, 'pixel')}"
            )
        _check_dtype_and_device(self, input)

    def extra_repr(self) -> str:
        return f"strategy={self.strategy!r}"


def _features(config: DenseNetConfig) -> OrderedDict[str, nn.Module]:
    first, *rest = config.stage_channels()
    kinds = KINDS[config.spatial_dims]
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    if config.stem == "imagenet":
        parts["conv0"] = kinds.conv(config.in_channels, first, kernel_size=7, stride=2, padding=3, bias=False)
        parts["norm0"] = kinds.norm(first)
        parts["relu0"] = ReLU()
        if config.initial_output_stride == 4:
            parts["pool0"] = kinds.max_pool(kernel_size=3, stride=2, padding=1)
    else:
        parts["conv0"] = kinds.conv(config.in_channels, first, kernel_size=3, padding=1, bias=False)
    strides = config.stage_strides()
    widths = [first, *rest]
    dilation = 1
    for number, layers in enumerate(config.block_config, 1):
        block = DenseBlock(
            layers,
            widths[number - 1],
            config.growth_rate,
            config.bn_size,
            config.drop_rate,
            dilation,
            config.spatial_dims,
        )
        parts[f"denseblock{number}"] = block
        if number < len(config.block_config):
            pool = strides[number] > strides[number - 1]
            parts[f"transition{number}"] = Transition(
                block.out_channels, config.compression, pool, config.spatial_dims
            )
            dilation *= 1 if pool else 2
    parts["norm5"] = kinds.norm(widths[-1])
    parts["relu5"] = ReLU()
    return parts


def _initialize(network: nn.Module) -> None:
    """As torchvision: Kaiming normal convolutions, unit norms, zero classifier bias."""
    for module in network.modules():
        if isinstance(module, Conv):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


def _remedy_for_rank(config: DenseNetConfig, input: Tensor) -> str:
    if input.dim() == 1 + config.spatial_dims and input.shape[0] == config.in_channels:
        return "; give a batch, x[None] is one of a single input"
    if input.dim() in (4, 5):
        return f"; build the network with spatial_dims={input.dim() - 2}"
    return ""


def _check_dtype_and_device(network: DenseNet, input: Tensor) -> None:
    weight = network.features[0].weight
    if input.device != weight.device:
        raise TypeError(f"input is on {input.device}, the network on {weight.device}; move one with .to()")
    if input.dtype != weight.dtype and not torch.is_autocast_enabled(input.device.type):
        raise TypeError(f"input is {input.dtype}, the network {weight.dtype}; cast one, or use torch.autocast")
