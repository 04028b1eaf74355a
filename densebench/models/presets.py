"""Networks by name. Every function takes the fields of `DenseNetConfig` as keywords, and `strategy`."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from densebench.models.config import DenseNetConfig
from densebench.models.densenet import DenseNet

_FIELDS = [field.name for field in fields(DenseNetConfig)]


def _densenet(strategy: str, options: dict[str, Any], **preset: Any) -> DenseNet:
    unknown = sorted(set(options) - set(_FIELDS))
    if unknown:
        raise TypeError(f"unknown option {unknown[0]!r}; a DenseNet takes {', '.join(_FIELDS)}")
    return DenseNet(DenseNetConfig(**{**preset, **options}), strategy)


def densenet121(*, strategy: str = "naive", **config: Any) -> DenseNet:
    """DenseNet-121: 7,978,856 parameters, 2.83 GMACs at 224x224 (arXiv 1608.06993, table 1)."""
    return _densenet(strategy, config)


def densenet161(*, strategy: str = "naive", **config: Any) -> DenseNet:
    """DenseNet-161 (k = 48, 96 stem channels): 28,681,000 parameters, 7.73 GMACs at 224x224."""
    return _densenet(strategy, config, growth_rate=48, block_config=(6, 12, 36, 24), num_init_features=96)


def densenet169(*, strategy: str = "naive", **config: Any) -> DenseNet:
    """DenseNet-169: 14,149,480 parameters, 3.36 GMACs at 224x224."""
    return _densenet(strategy, config, block_config=(6, 12, 32, 32))


def densenet201(*, strategy: str = "naive", **config: Any) -> DenseNet:
    """DenseNet-201: 20,013,928 parameters, 4.29 GMACs at 224x224."""
    return _densenet(strategy, config, block_config=(6, 12, 48, 32))


def densenet264(*, strategy: str = "naive", **config: Any) -> DenseNet:
    """DenseNet-264 (arXiv 1608.06993, table 1): 33,337,704 parameters."""
    return _densenet(strategy, config, block_config=(6, 12, 64, 48))


def densenet_x(
    block_config: tuple[int, ...],
    growth_rate: int = 32,
    compression: float = 0.5,
    *,
    strategy: str = "naive",
    **config: Any,
) -> DenseNet:
    """Any blocks, growth rate and compression on the ImageNet stem of 2k filters (TF-Slim's densenet_X)."""
    return _densenet(
        strategy,
        config,
        block_config=block_config,
        growth_rate=growth_rate,
        compression=compression,
        num_init_features=2 * growth_rate,
    )


def densenet_plain(*, strategy: str = "naive", **config: Any) -> DenseNet:
    """DenseNet-121's blocks without bottleneck: every layer is BN-ReLU-conv3x3 with k = 32."""
    return _densenet(strategy, config, bn_size=None)


def densenet_d2l(*, strategy: str = "naive", **config: Any) -> DenseNet:
    """The network of 'Dive into Deep Learning' (d2l.ai): (4, 4, 4, 4), k = 32, no bottleneck, gray images."""
    return _densenet(strategy, config, block_config=(4, 4, 4, 4), bn_size=None, in_channels=1, num_classes=10)


def densenet_cifar(
    depth: int = 40,
    growth_rate: int = 12,
    *,
    bottleneck: bool = False,
    compression: float = 1.0,
    strategy: str = "naive",
    **config: Any,
) -> DenseNet:
    """The CIFAR family (arXiv 1608.06993, section 4.2): three equal blocks on a 3x3 stem, no max-pool.

    Plain, -B (bottleneck), -C (compression < 1) or -BC; (40, 12) plain is the default. The stem has 16
    filters, or 2k in a DenseNet-BC.

    Raises:
        ValueError: if no three equal blocks make up `depth`.
    """
    per_layer = 2 if bottleneck else 1
    layers, rest = divmod(depth - 4, 3 * per_layer)
    if rest or layers < 1:
        raise ValueError(
            f"depth={depth} is not {3 * per_layer}n + 4: three blocks of n layers "
            f"of {per_layer} convolution{'s' * (per_layer > 1)}, the stem, two transitions and the classifier"
        )
    return _densenet(
        strategy,
        config,
        growth_rate=growth_rate,
        block_config=(layers,) * 3,
        num_init_features=2 * growth_rate if bottleneck and compression < 1 else 16,
        bn_size=4 if bottleneck else None,
        compression=compression,
        stem="cifar",
        num_classes=10,
    )


def densenet_bc(
    depth: int = 100,
    growth_rate: int = 12,
    num_classes: int | None = 10,
    *,
    strategy: str = "naive",
    **config: Any,
) -> DenseNet:
    """DenseNet-BC for CIFAR: bottleneck and compression 0.5. (100, 12) has 769,162 parameters."""
    config.setdefault("num_classes", num_classes)
    return densenet_cifar(depth, growth_rate, bottleneck=True, compression=0.5, strategy=strategy, **config)
