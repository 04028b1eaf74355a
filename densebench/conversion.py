"""Other people's DenseNets, run by this project's strategies.

torchvision, timm, MONAI and torchxrayvision keep a network up to its head as a sequence in which dense blocks and
transitions stand. `convert` puts a sequence that strategies can run in its place, made of the same norms and
convolutions, and a block in the place of one that stands elsewhere, as in the encoder of a U-Net. Blocks, layers
and transitions are known by their classes: a copy of one may compute anything else, and values that agree today do
not show that gradients, or another mode, will. Whose classes are copies has to say so.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar, cast

from torch import Tensor, nn

from densebench.models.dimensions import BatchNorm, Conv
from densebench.models.features import Features, set_strategy, stages_in
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


def convert(
    model: _M,
    strategy: str = "fused",
    *,
    block: type[nn.Module] | None = None,
    layer: type[nn.Module] | None = None,
    transition: type[nn.Module] | None = None,
) -> _M:
    """Run the dense blocks of a network by a strategy, in place.

    Parameters and buffers stay the same objects under the same names, so weights, optimizers and checkpoints stay
    valid, and so do the network's own head, its `forward` and its mode. What recomputed (`memory_efficient`) no
    longer does: choose a strategy instead. A sequence of blocks and transitions is run stage by stage. Where
    blocks stand by themselves, or code calls them one by one (U-Nets, feature pyramids), they are run by the
    strategy, and what is around them stays as it was; that, and timm's stem norm, saves a little less.

    Args:
        model: one of the networks in `KNOWN`, or anything that contains some; for images or volumes. Hooks on what
            is replaced are to be registered afterwards.
        strategy: see `densebench.list_strategies()`; `densebench.set_strategy` changes it later.
        block, layer, transition: classes of your own that compute what torchvision's of that kind do, from parts
            of the same names. That they do is taken on trust;
            `densebench.assert_equivalent(converted, strategy, inputs, reference=original)` looks.

    Returns:
        The same model; only where it is itself the sequence of blocks, or a block, the new one.

    Raises:
        TypeError: if model is no module, or what is given as a class is none.
        ValueError: if the strategy is unknown, or there are no dense blocks.
        UnsupportedError: if a block was changed, has hooks, or cannot be run by the strategy here, or if a layer
            is known by another name, too. Nothing is changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert takes a network, not {type(model).__name__}")
    get_strategy(strategy)
    conversion = _Conversion(model, _kinds(block=block, layer=layer, transition=transition))
    if not conversion.new and not stages_in(model):
        raise ValueError(
            f"{type(model).__name__} contains no dense blocks that convert knows; it knows {KNOWN}, by their "
            "classes, and copies of them by block=, layer= and transition="
        )
    with conversion.applied_to(model) as converted:
        return cast("_M", set_strategy(converted, strategy))


_Kinds = Mapping[str | type, str]


def _kinds(**own: type[nn.Module] | None) -> _Kinds:
    """What each class is; libraries' by name, since they need not be installed."""
    kinds: dict[str | type, str] = dict(_KINDS.items())
    for kind, given in own.items():
        if given is None:
            continue
        if not (isinstance(given, type) and issubclass(given, nn.Module)):
            raise TypeError(f"{kind}= takes a class of modules, not {given!r}")
        kinds[given] = kind
    return kinds


def _name_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _join(name: str, own: str) -> str:
    return f"{name}.{own}" if name else own


class _Conversion:
    """What takes the place of which module of a model.

    Attributes:
        new: by what they replace, sequences, blocks and transitions.
    """

    def __init__(self, model: nn.Module, kinds: _Kinds) -> None:
        self._kinds = kinds
        self.new: dict[nn.Module, nn.Module] = {}
        for name, module in model.named_modules():
            if self._is_sequence_of_blocks(module):
                self._replace(name, module, self._features)
            elif self._is(module, "block"):
                self._replace(name, module, self._block)
            else:
                self._refuse_if_derived(name, module)
        for name, module in model.named_modules():
            if module in self.new:
                _refuse_to_lose_anything(name, module, self.new[module])
        self._refuse_other_names(model)

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model with all that is new in its places; as it was, if anything is raised."""
        places = [place for place in _references(model, *self.new.values()) if place[2] in self.new]
        for parent, name, old in places:
            parent._modules[name] = self.new[old]
        try:
            yield self.new.get(model, model)
        except Exception:
            for parent, name, old in places:
                parent._modules[name] = old
            raise

    def _replace(self, name: str, old: _M, by: Callable[[str, _M], nn.Module]) -> nn.Module:
        if old not in self.new:
            self.new[old] = new = _in_the_mode_of(old, by(name, old))
            for key, value in vars(old).items():  # a backbone's out_channels
                vars(new).setdefault(key, value)
        return self.new[old]

    def _is(self, module: nn.Module, kind: str) -> bool:
        return self._kind_of(type(module)) == kind

    def _kind_of(self, of: type) -> str | None:
        return self._kinds.get(of) or self._kinds.get(_name_of(of))

    def _is_sequence_of_blocks(self, module: nn.Module) -> bool:
        return type(module) is nn.Sequential and any(self._is(child, "block") for child in module.children())

    def _refuse_if_derived(self, name: str, module: nn.Module) -> None:
        """What is derived from a dense block would go on as it is, unseen."""
        if any(self._kind_of(base) == "block" for base in type(module).__mro__):
            raise self._unknown(name, module, "block")

    def _unknown(self, name: str, module: nn.Module, kind: str) -> UnsupportedError:
        return UnsupportedError(
            f"{name or 'the network'} is a {_name_of(type(module))}; convert knows {KNOWN}, by their classes; if "
            f"it computes the same, say so with {kind}="
        )

    def _features(self, name: str, sequence: nn.Module) -> Features:
        """The sequence with its dense blocks and transitions in this project's form, and its other children."""
        children: OrderedDict[str, nn.Module] = OrderedDict()
        for own, child in cast("dict[str, nn.Module]", sequence._modules).items():
            full = _join(name, own)
            if self._is(child, "block"):
                child = self._replace(full, child, self._block)
            elif self._is(child, "transition"):
                child = self._replace(full, child, _transition)
            children[own] = child
        return Features(children)

    def _block(self, name: str, block: nn.Module) -> DenseBlock:
        layers = {own: self._layer(_join(name, own), layer) for own, layer in block.named_children()}
        if not layers:
            raise UnsupportedError(f"{name or 'the block'} has no layers")
        width = next(iter(layers.values())).in_channels
        for own, layer in layers.items():
            if layer.in_channels != width:
                raise UnsupportedError(
                    f"{_join(name, own)} reads {layer.in_channels} channels where {width} come before it"
                )
            width += layer.growth_rate
        return DenseBlock.of(layers)

    def _layer(self, name: str, layer: nn.Module) -> DenseLayer:
        if not self._is(layer, "layer"):
            raise self._unknown(name, layer, "layer")
        return _layer(name, layer)

    def _refuse_other_names(self, model: nn.Module) -> None:
        """A layer known elsewhere, too, would there go on as it is, apart from the network."""
        gone = {part for old, new in self.new.items() for part in {*old.modules()} - {*new.modules()}}
        for parent, name, child in _references(model):
            if child in gone and child not in self.new and parent not in gone:
                what = f"{type(parent).__name__}.{name}"
                raise UnsupportedError(f"a part of a dense block is also {what}, which would be left behind")


def _layer(name: str, layer: nn.Module) -> DenseLayer:
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
    return Transition.of(normal)


def _norm_relu_conv(name: str, parts: dict[str, nn.Module], number: str) -> dict[str, nn.Module]:
    """Takes three parts from those of a layer or transition; timm's norm, which is two of them, apart."""
    norm, relu, conv = (parts.pop(f"{part}{number}", None) for part in ("norm", "relu", "conv"))
    if relu is None and norm is not None and _name_of(type(norm)) == _NORM_AND_RELU:
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


def _refuse_to_lose_anything(name: str, old: nn.Module, new: nn.Module) -> None:
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


def _references(*models: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Every module that contains another one, under which name, and that one."""
    for parent in [parent for model in models for parent in model.modules()]:
        for name, child in list(parent._modules.items()):
            if child is not None:
                yield parent, name, child
