"""Other people's DenseNets, run by this project's strategies.

torchvision, timm, MONAI, torchxrayvision and whoever copied them keep the network up to its head as a sequence in
which dense blocks and transitions stand. `convert` puts a sequence that strategies can run in its place, made of
the same norms and convolutions. What is a dense layer is told by the names of its parts, which all of them took
over from torchvision; that it computes what a dense layer computes is confirmed by running both on random values.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from densebench.models.densenet import Features
from densebench.models.layers import DenseBlock, DenseLayer, NormReLU, ReLU, Transition
from densebench.models.stage import why_not_bypass
from densebench.registry import UnsupportedError, get_strategy

KNOWN = "DenseNets of torchvision, timm, MONAI (in 2-D) and torchxrayvision"
TOLERANCE = 1e-3  # of two orders of the same sums, in any dtype; another computation is off by all of it

_M = TypeVar("_M", bound=nn.Module)


def convert(model: _M, strategy: str = "fused") -> _M:
    """Run the dense blocks of a network by a strategy, in place.

    Parameters and buffers stay the same objects under the same `state_dict` names, so weights, optimizers and
    checkpoints stay valid, and so do the network's own head, its `forward` and its mode. (`named_parameters` of
    MONAI's lose a level, `layers`.) An option by which the network recomputes (`memory_efficient`) no longer does
    anything; choose a strategy instead.

    Args:
        model: one of the networks in `KNOWN`, or anything that contains some. Convert before hooks are registered.
        strategy: see `densebench.list_strategies()`; `densebench.set_strategy` changes it later.

    Returns:
        The same model; only where it is itself the sequence of blocks, the new sequence.

    Raises:
        ValueError: if the strategy is unknown, or no dense block is found.
        UnsupportedError: if a block is not made of 2-D batch norms, ReLUs and convolutions as a DenseNet's is, has
            hooks, or cannot be run by the strategy here. Nothing is changed then.
    """
    chosen = get_strategy(strategy)
    sequences = {module: name for name, module in model.named_modules() if _is_sequence_of_blocks(module)}
    converted = {module: _features(name, module) for module, name in sequences.items()}
    networks = [*converted.values(), *(module for module in model.modules() if isinstance(module, Features))]
    if not networks:
        raise ValueError(f"{type(model).__name__} contains no dense blocks that convert knows: {KNOWN}")
    for network in networks:
        for stage in network.stages():
            stage.check(chosen)
    for module in [*model.modules(), *networks]:
        for name, child in module._modules.items():
            if child in converted:
                module._modules[name] = converted[child]
    for network in networks:
        network.strategy = strategy
    return cast("_M", converted.get(model, model))


def _is_sequence_of_blocks(module: nn.Module) -> bool:
    plain = isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
    return plain and not isinstance(module, Features) and any(map(_is_block, module.children()))


def _is_block(module: nn.Module) -> bool:
    layers = list(module.children())
    other = isinstance(module, DenseBlock) or _layer_parts(module)  # MONAI's layer is what its parts stand in, too
    return bool(layers) and not other and all(map(_layer_parts, layers))


_OF_A_LAYER = {"norm1", "relu1", "conv1", "norm2", "relu2", "conv2", "dropout"}
_OF_A_TRANSITION = {"norm", "relu", "conv", "pool"}


def _layer_parts(module: nn.Module) -> dict[str, nn.Module]:
    """A dense layer's parts, of MONAI's those one level down; none if it is no dense layer."""
    parts = _parts(module)
    if list(parts) == ["layers"]:
        parts = _parts(parts["layers"])
    return parts if {"norm1", "conv1"} <= parts.keys() <= _OF_A_LAYER else {}


def _parts(module: nn.Module) -> dict[str, nn.Module]:
    return {name: part for name, part in module._modules.items() if part is not None}


def _features(name: str, sequence: nn.Module) -> Features:
    """The sequence with dense blocks and transitions in this project's form; the other children are the same."""
    _refuse_hooks(name or "the network", sequence)
    children: OrderedDict[str, nn.Module] = OrderedDict()
    for own, child in _parts(sequence).items():
        full = f"{name}.{own}" if name else own
        new: nn.Module = child
        if _is_block(child):
            new = _block(full, child)
        elif {"norm", "conv"} <= _parts(child).keys() <= _OF_A_TRANSITION:
            new = _transition(full, child)
        elif _is_norm_and_relu(child):
            _refuse_hooks(full, child)
            new = _of_the_same(cast("nn.BatchNorm2d", child), NormReLU)
        if new is not child:
            _confirm(full, child, new)
        children[own] = new
    return _in_mode_of(sequence, Features(children))


def _block(name: str, block: nn.Module) -> DenseBlock:
    _refuse_hooks(name, block)
    layers = {own: _layer(f"{name}.{own}", layer) for own, layer in _parts(block).items()}
    width = next(iter(layers.values())).in_channels
    for own, layer in layers.items():
        if layer.in_channels != width:
            raise UnsupportedError(f"{name}.{own} reads {layer.in_channels} channels where {width} come before it")
        width += layer.growth_rate
    return _in_mode_of(block, DenseBlock.of(layers))


def _layer(name: str, layer: nn.Module) -> DenseLayer:
    parts = _layer_parts(layer)
    drop_rate = float(getattr(layer, "drop_rate", 0.0))
    dropout = parts.pop("dropout", None)
    if isinstance(dropout, nn.Dropout):
        drop_rate = dropout.p
    elif dropout is not None:
        raise UnsupportedError(f"{name} has {type(dropout).__name__}; strategies drop single values (Dropout)")
    nested = layer._modules.get("layers")
    for module in (layer, nested):
        if module is not None:
            _refuse_hooks(name, module)
    new = _in_mode_of(layer, DenseLayer.of(_normal(name, parts, numbers=("1", "2")), drop_rate))
    if nested is not None:  # keep the names of the state
        new.register_state_dict_post_hook(_nest)
        new.register_load_state_dict_pre_hook(_unnest)
    return new


def _transition(name: str, transition: nn.Module) -> Transition:
    _refuse_hooks(name, transition)
    return _in_mode_of(transition, Transition.of(_normal(name, _parts(transition), numbers=("",))))


def _normal(name: str, parts: dict[str, nn.Module], numbers: tuple[str, ...]) -> dict[str, nn.Module]:
    """Parts by torchvision's names and in its order, a norm that rectifies taken apart."""
    normal: dict[str, nn.Module] = {}
    for number in numbers:
        if f"conv{number}" not in parts:
            continue
        for kind, expected in ((f"norm{number}", nn.BatchNorm2d), (f"conv{number}", nn.Conv2d)):
            found = parts.get(kind)
            if not isinstance(found, expected):
                raise UnsupportedError(
                    f"{name}.{kind} is {type(found).__name__}; convert takes BatchNorm2d, ReLU and Conv2d: {KNOWN}"
                )
        norm, relu = _norm_and_relu(f"{name}.norm{number}", parts[f"norm{number}"], parts.get(f"relu{number}"))
        normal |= {f"norm{number}": norm, f"relu{number}": relu, f"conv{number}": parts[f"conv{number}"]}
    return normal | ({"pool": parts["pool"]} if "pool" in parts else {})


def _norm_and_relu(name: str, norm: nn.Module, relu: nn.Module | None) -> tuple[nn.Module, nn.Module]:
    """A norm, and what follows it, as two modules; of timm's BatchNormAct2d, which is both, the same tensors."""
    if relu is None and _is_norm_and_relu(norm):
        _refuse_hooks(name, norm)
        return _of_the_same(cast("nn.BatchNorm2d", norm), nn.BatchNorm2d), _in_mode_of(norm, ReLU())
    if not isinstance(relu, nn.ReLU):
        after = "nothing" if relu is None else type(relu).__name__
        raise UnsupportedError(f"{name} ({type(norm).__name__}) is followed by {after}; strategies take ReLU")
    return norm, relu


def _is_norm_and_relu(module: nn.Module) -> bool:
    """Whether it is timm's BatchNormAct2d, with ReLU and without dropout."""
    inside = isinstance(module, nn.BatchNorm2d) and module._modules.keys() == {"drop", "act"}
    return inside and isinstance(module.drop, nn.Identity) and isinstance(module.act, nn.ReLU)


def _of_the_same(norm: nn.BatchNorm2d, kind: type[nn.BatchNorm2d]) -> nn.BatchNorm2d:
    """A norm of another kind with the same options, parameters and buffers."""
    new = kind(norm.num_features, norm.eps, norm.momentum, affine=False, track_running_stats=False)
    new.affine, new.track_running_stats = norm.affine, norm.track_running_stats
    new._parameters.update(norm._parameters)
    new._buffers.update(norm._buffers)
    return _in_mode_of(norm, new)


def _in_mode_of(old: nn.Module, new: _M) -> _M:
    """`new`, itself (not what it contains) in training or evaluation as `old` is."""
    new.training = old.training
    return new


def _refuse_hooks(name: str, module: nn.Module) -> None:
    reason = why_not_bypass(module)
    if reason:
        raise UnsupportedError(f"{name} has {reason}, which would be lost; convert first")


def _nest(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """The state of a layer whose parts the network keeps one level down, under the network's own names."""
    for key in [key for key in state if key.startswith(prefix)]:
        state[f"{prefix}layers.{key[len(prefix) :]}"] = state.pop(key)


def _unnest(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    nested = f"{prefix}layers."
    for key in [key for key in state if key.startswith(nested)]:
        state[prefix + key[len(nested) :]] = state.pop(key)


def _confirm(name: str, old: nn.Module, new: nn.Module) -> None:
    """Run both, which share their parts, in evaluation, and compare.

    Raises:
        UnsupportedError: if they do not give the same.
    """
    weight = next(new.parameters())
    if weight.is_meta:
        return
    norm = next(module for module in new.modules() if isinstance(module, nn.BatchNorm2d))
    x = torch.randn(2, norm.num_features, 8, 8, generator=torch.Generator().manual_seed(0)).to(weight)
    try:
        expected, values = (_evaluated(module, x) for module in (old, new))
    except Exception as error:
        raise UnsupportedError(
            f"{name} cannot be run on a map of {norm.num_features} channels ({type(error).__name__}: {error})"
        ) from error
    if expected.shape != values.shape or (values - expected).norm() > TOLERANCE * expected.norm():
        what = f"{name} ({type(old).__name__})"
        raise UnsupportedError(f"{what} does not compute what a DenseNet's does; convert knows {KNOWN}")


def _evaluated(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad(), _evaluation(module):
        result: Tensor = cast("Callable[[Tensor], Tensor]", module)(x.clone())
    return result.double()


@contextmanager
def _evaluation(module: nn.Module) -> Iterator[None]:
    """All of a module in evaluation, and afterwards each part in the mode in which it was."""
    modes = [(part, part.training) for part in module.modules()]
    for part, _ in modes:
        part.training = False
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
