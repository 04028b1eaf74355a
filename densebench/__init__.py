"""DenseBench: densely connected networks with a fraction of the memory, measured and proved equal.

Names are imported when first used, so that `import densebench` and every `--help` stay quick.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "DenseNet": "models",
    "DenseNetConfig": "models",
    "ResNet": "models",
    "build_model": "models",
    "list_models": "models",
    "densenet121": "models",
    "densenet161": "models",
    "densenet169": "models",
    "densenet201": "models",
    "densenet264": "models",
    "densenet_bc": "models",
    "densenet_cifar": "models",
    "densenet_d2l": "models",
    "densenet_plain": "models",
    "densenet_x": "models",
    "resnet18": "models",
    "resnet34": "models",
    "resnet50": "models",
    "resnet101": "models",
    "resnet152": "models",
    "set_strategy": "models",
    "convert": "conversion",
    "Stage": "models",
    "Strategy": "registry",
    "UnsupportedError": "registry",
    "get_strategy": "registry",
    "list_strategies": "registry",
    "strategy": "registry",
    "assert_equivalent": "equivalence",
    "Prediction": "prediction",
    "predict_memory": "prediction",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'densebench' has no attribute {name!r}")
    return getattr(import_module(f"densebench.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
