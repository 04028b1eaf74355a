"""Other people's DenseNets, run by this project's strategies.

torchvision, timm, MONAI and torchxrayvision keep a network up to its head as a sequence in which dense blocks and
transitions stand. `convert` puts a sequence that strategies can run in its place, made of the same norms and
convolutions. Blocks, layers and transitions are known by their classes: a copy of one may compute anything else,
and values that agree today do not show that gradients, or another mode, will.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import TypeVar, cast

from torch import Tensor, nn

from densebench.models.densenet import Features
from densebench.models.dimensions import BatchNorm, Conv
from densebench.models.layers import DenseBlock, DenseLayer, NestedDenseLayer, ReLU, Transition
from densebench.models.stage import why_not_bypass
from densebench.registry import UnsupportedError, get_strategy

KNOWN = "DenseNets of torchvision, timm, MONAI and torchxrayvision"
# What each library calls a layer, a block and a transition.
_CLASSES = {
    "torchvision.models.densenet": ("_DenseLayer", "_DenseBlock", "_Transition"),
    "torchxrayvision.models": ("_DenseLayer", "_DenseBlock", "_Transition"),
    "monai.networks.nets.densenet": ("_DenseLayer", "_DenseBlock", "_Transition"),
    "timm.models.densenet": ("DenseLayer", "DenseBlock", "DenseTransition"),
}
_KINDS = {
    f"{module}.{name}": kind
    for module, names in _CLASSES.items()
    for kind, name in zip(("layer", "block", "transition"), names, strict=True)
}
_NORM_AND_RELU = "timm.layers.norm_act.BatchNormAct2d"

_M = TypeVar("_M", bound=nn.Module)


def convert(model: _M, strategy: str = "fused") -> _M:
    """Run the dense blocks of a network by a strategy, in place.

    Parameters and buffers stay the same objects under the same names, so weights, optimizers and checkpoints stay
    valid, and so do the network's own head, its `forward` and its mode. What recomputed (`memory_efficient`) no
    longer does: choose a strategy instead. Code that calls the blocks one by one (feature pyramids, timm's
    `forward_intermediates`) runs them as `naive` does. timm's stem norm is not taken over, so its networks save a
    little less.

    Args:
        model: one of the networks in `KNOWN`, or anything that contains some; for images or volumes. Hooks on what
            is replaced are to be registered afterwards.
        strategy: see `densebench.list_strategies()`; `densebench.set_strategy` changes it later.

    Returns:
        The same model; only where it is itself the sequence of blocks, the new sequence.

    Raises:
        TypeError: if model is no module.
        ValueError: if the strategy is unknown, or there is no sequence of dense blocks.
        UnsupportedError: if a block was changed, has hooks, is known by another name, too, or cannot be run by the
            strategy here. Nothing is changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert takes a network, not {type(model).__name__}")
    chosen = get_strategy(strategy)
    sequences = {module: name for name, module in model.named_modules() if _is_sequence_of_blocks(module)}
    converted = {module: _features(name, cast("nn.Sequential", module)) for module, name in sequences.items()}
    networks = [*converted.values(), *(module for module in model.modules() if isinstance(module, Features))]
    if not networks:
        raise ValueError(f"{type(model).__name__} {_why_not(model)}")
    _refuse_other_names(model, converted)
    for network in networks:
        for stage in network.stages():
            stage.check(chosen)
    for parent, name, child in _references(model, *networks):
        if child in converted:
            parent._modules[name] = converted[child]
    for network in networks:
        network.strategy = strategy
    return cast("_M", converted.get(model, model))


def _class_of(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _is(module: nn.Module, kind: str) -> bool:
    return _KINDS.get(_class_of(module)) == kind


def _is_sequence_of_blocks(module: nn.Module) -> bool:
    return type(module) is nn.Sequential and any(_is(child, "block") for child in module.children())


def _why_not(model: nn.Module) -> str:
    block = next((name for name, module in model.named_modules() if _is(module, "block")), None)
    if block is None:
        return f"contains no dense blocks that convert knows; it knows {KNOWN}, by their classes"
    return f"has dense blocks ({block}), but not in an nn.Sequential, which convert needs"


def _features(name: str, sequence: nn.Sequential) -> Features:
    """The sequence with its dense blocks and transitions in this project's form; other children are the same."""
    children: OrderedDict[str, nn.Module] = OrderedDict()
    for own, child in sequence._modules.items():
        full = f"{name}.{own}" if name else own
        if _is(child, "block"):
            children[own] = _block(full, child)
        elif _is(child, "transition"):
            children[own] = _transition(full, child)
        else:
            children[own] = child
            _refuse_hidden(full, child)
    features = _in_the_mode_of(sequence, Features(children))
    _refuse_to_lose_anything(name, sequence, features)
    for key, value in vars(sequence).items():  # a backbone's out_channels
        vars(features).setdefault(key, value)
    return features


def _block(name: str, block: nn.Module) -> DenseBlock:
    layers = {own: _layer(f"{name}.{own}", layer) for own, layer in block.named_children()}
    if not layers:
        raise UnsupportedError(f"{name} has no layers")
    width = next(iter(layers.values())).in_channels
    for own, layer in layers.items():
        if layer.in_channels != width:
            raise UnsupportedError(f"{name}.{own} reads {layer.in_channels} channels where {width} come before it")
        width += layer.growth_rate
    return _in_the_mode_of(block, DenseBlock.of(layers))


def _layer(name: str, layer: nn.Module) -> DenseLayer:
    if not _is(layer, "layer"):
        raise UnsupportedError(f"{name} is a {_class_of(layer)}; convert knows {KNOWN}, by their classes")
    nested = layer._modules.get("layers")
    own = dict((layer if nested is None else nested).named_children())
    parts = {**_norm_relu_conv(name, own, "1"), **_norm_relu_conv(name, own, "2")}
    _refuse_the_rest(name, own)
    drop_rate: float = getattr(layer, "drop_rate", 0.0)
    if nested is None:
        return _in_the_mode_of(layer, DenseLayer.of(parts, drop_rate))
    new = _in_the_mode_of(layer, NestedDenseLayer.of(parts, drop_rate))
    _in_the_mode_of(nested, new.layers)
    return new


def _transition(name: str, transition: nn.Module) -> Transition:
    own = dict(transition.named_children())
    normal = _norm_relu_conv(name, own, "")
    if "pool" in own:
        normal["pool"] = own.pop("pool")
    _refuse_the_rest(name, own)
    return _in_the_mode_of(transition, Transition.of(normal))


def _norm_relu_conv(name: str, parts: dict[str, nn.Module], number: str) -> dict[str, nn.Module]:
    """Takes three parts from those of a layer or transition; timm's norm, which is two of them, apart."""
    norm, relu, conv = (parts.pop(f"{part}{number}", None) for part in ("norm", "relu", "conv"))
    if relu is None and norm is not None and _class_of(norm) == _NORM_AND_RELU:
        relu = cast("nn.Module", norm.act)
        if type(relu) is nn.ReLU and type(norm.drop) is nn.Identity:
            norm, relu = _norm_alone(cast("nn.BatchNorm2d", norm)), ReLU()
    for part, found, expected in (
        ("norm", norm, BatchNorm),
        ("relu", relu, nn.ReLU),
        ("conv", conv, Conv),
    ):
        if not isinstance(found, expected):
            what = "missing" if found is None else f"a {type(found).__name__}"
            raise UnsupportedError(
                f"{name}: {part}{number} is {what}; strategies take batch norms of images or "
                "volumes, ReLU and convolutions"
            )
    return {f"norm{number}": norm, f"relu{number}": relu, f"conv{number}": conv}  # type: ignore[dict-item]


def _norm_alone(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    """A plain norm with the same options, parameters and buffers."""
    plain = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum, affine=False, track_running_stats=False)
    plain.affine, plain.track_running_stats = norm.affine, norm.track_running_stats
    plain._parameters.update(norm._parameters)
    plain._buffers.update(norm._buffers)
    return _in_the_mode_of(norm, plain)


def _refuse_hidden(name: str, child: nn.Module) -> None:
    """What is derived from a dense block or a transition, or wraps one: it would go on as it is, unseen."""
    if _is_sequence_of_blocks(child):
        return  # converted by itself
    bases = {f"{base.__module__}.{base.__qualname__}" for base in type(child).__mro__}
    if bases & _KINDS.keys():
        raise UnsupportedError(
            f"{name} is a {_class_of(child)}; convert knows {KNOWN}, by their classes, where they stand in an "
            "nn.Sequential"
        )
    for own, module in child.named_children():
        _refuse_hidden(f"{name}.{own}", module)


def _in_the_mode_of(old: nn.Module, new: _M) -> _M:
    """`new`, put in training or evaluation as `old` is, without what it contains."""
    new.training = old.training
    return new


def _refuse_the_rest(name: str, parts: Mapping[str, nn.Module]) -> None:
    for own, part in parts.items():
        raise UnsupportedError(f"{name} has {own} ({type(part).__name__}), which strategies do not run")


_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def _refuse_to_lose_anything(name: str, old: nn.Sequential, new: Features) -> None:
    """Hooks on what is replaced; parameters and buffers that are not a DenseNet's."""
    kept = set(new.modules())
    for own, module in old.named_modules(prefix=name):
        reason = why_not_bypass(module)
        if any(getattr(module, hooks, None) for hooks in _STATE_HOOKS):
            reason = "a hook on its state"
        if module not in kept and reason:
            raise UnsupportedError(f"{own or 'the network'} has {reason}; convert before that")
    before, after = _tensors(old), _tensors(new)
    if [(key, id(value)) for key, value in before.items()] != [(key, id(value)) for key, value in after.items()]:
        extra = next((key for key in before if after.get(key) is not before[key]), "other tensors")
        raise UnsupportedError(f"{name or 'the network'} has {extra}, which is not a DenseNet's")


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, in order."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return {**parameters, **dict(module.named_buffers(remove_duplicate=False))}


def _refuse_other_names(model: nn.Module, converted: Mapping[nn.Module, Features]) -> None:
    """A block known elsewhere, too, would there go on as it is, apart from the network."""
    replaced = {module for old, new in converted.items() for module in {*old.modules()} - {*new.modules()}}
    for parent, name, child in _references(model):
        if child in replaced and child not in converted and parent not in replaced:
            what = f"{type(parent).__name__}.{name}"
            raise UnsupportedError(f"a part of a dense block is also {what}, which would be left behind")


def _references(*models: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Every module that contains another one, under which name, and that one."""
    for parent in [parent for model in models for parent in model.modules()]:
        for name, child in list(parent._modules.items()):
            if child is not None:
                yield parent, name, child
