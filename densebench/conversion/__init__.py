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

from densebench.conversion.parts import children_of, class_name, in_the_mode_of, layer_of, transition_of
from densebench.models.features import Features, set_strategy, stages_in
from densebench.models.layers import DenseBlock, DenseLayer
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
_OWN_ATTRIBUTES = frozenset(vars(nn.Module()))  # of every module, where its parts are known to be

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
    strategy, and what is around them stays as it was; that, and timm's stem norm, saves a little less. What such
    a block returns is also what it keeps for backward, and cannot be changed in place; it is channels-last where
    the strategy computes so. timm's norms in transitions, which are norm and ReLU, are norms after that for code
    that calls them itself.

    Args:
        model: one of the networks in `KNOWN`, or anything that contains some; for images or volumes. Hooks on what
            is replaced are to be registered afterwards.
        strategy: see `densebench.list_strategies()`; `densebench.set_strategy` changes it later.
        block, layer, transition: classes of your own that compute what torchvision's of that kind do, from parts
            of the same names. That they do is taken on trust;
            `densebench.assert_equivalent(converted, strategy, inputs, reference=original)` looks: in training
            mode, where dropout shows, and with the original's own checkpointing off, which moves running
            statistics twice. A transition that is not named stays as it is, and saves nothing.

    Returns:
        The same model; only where it is itself the sequence of blocks, or a block, the new one.

    Raises:
        TypeError: if model is no module, or what is given as a class is none.
        ValueError: if the strategy is unknown, or there are no dense blocks, or none of a class that is given.
        UnsupportedError: if a block was changed, has hooks, or cannot be run by the strategy here, or if something
            that is replaced is known by another name, too. Nothing is changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert takes a network, not {type(model).__name__}")
    get_strategy(strategy)
    given = {"block": block, "layer": layer, "transition": transition}
    kinds = _kinds(given)
    for kind, own in given.items():
        if own is not None and not any(type(module) is own for module in model.modules()):
            raise ValueError(f"{type(model).__name__} contains no {own.__qualname__}, given as {kind}=")
    conversion = _Conversion(model, kinds)
    if not conversion.new and not stages_in(model):
        raise ValueError(
            f"{type(model).__name__} contains no dense blocks that convert knows; it knows {KNOWN}, by their "
            "classes, and copies of them by block=, layer= and transition="
        )
    with conversion.applied_to(model) as converted:
        return cast("_M", set_strategy(converted, strategy))


_Kinds = Mapping[str | type, str]


def _kinds(given: Mapping[str, type[nn.Module] | None]) -> _Kinds:
    """What each class is; libraries' by name, since they need not be installed."""
    kinds: dict[str | type, str] = dict(_KINDS.items())
    for kind, own in given.items():
        if own is None:
            continue
        if not (isinstance(own, type) and issubclass(own, nn.Module)):
            raise TypeError(f"{kind}= takes a class of modules, not {own!r}")
        kinds[own] = kind
    return kinds


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
        except BaseException:
            for parent, name, old in places:
                parent._modules[name] = old
            raise

    def _replace(self, name: str, old: _M, by: Callable[[str, _M], nn.Module]) -> nn.Module:
        if old not in self.new:
            self.new[old] = in_the_mode_of(old, by(name, old))
        return self.new[old]

    def _is(self, module: nn.Module, kind: str) -> bool:
        return self._kind_of(type(module)) == kind

    def _kind_of(self, of: type) -> str | None:
        return self._kinds.get(of) or self._kinds.get(class_name(of))

    def _is_sequence_of_blocks(self, module: nn.Module) -> bool:
        return type(module) is nn.Sequential and any(self._is(child, "block") for child in module.children())

    def _refuse_if_derived(self, name: str, module: nn.Module) -> None:
        """What is derived from a dense block would go on as it is, unseen."""
        if any(self._kind_of(base) == "block" for base in type(module).__mro__):
            raise self._unknown(name, module, "block")

    def _unknown(self, name: str, module: nn.Module, kind: str) -> UnsupportedError:
        return UnsupportedError(
            f"{name or 'the network'} is a {class_name(type(module))}; convert knows {KNOWN}, by their classes; "
            f"if it computes the same, say so with {kind}=, and if not, convert the parts beside it"
        )

    def _features(self, name: str, sequence: nn.Module) -> Features:
        """The sequence with its dense blocks and transitions in this project's form, and its other children."""
        children: OrderedDict[str, nn.Module] = OrderedDict()
        for own, child in children_of(sequence).items():
            full = _join(name, own)
            if self._is(child, "block"):
                child = self._replace(full, child, self._block)
            elif self._is(child, "transition"):
                child = self._replace(full, child, transition_of)
            children[own] = child
        features = Features(children)
        for key, value in vars(sequence).items():  # a backbone's out_channels
            vars(features).setdefault(key, value)
        return features

    def _block(self, name: str, block: nn.Module) -> DenseBlock:
        layers = {own: self._layer(_join(name, own), layer) for own, layer in children_of(block).items()}
        if not layers:
            raise UnsupportedError(f"{name or 'the block'} has no layers")
        return DenseBlock.of(layers)

    def _layer(self, name: str, layer: nn.Module) -> DenseLayer:
        if not self._is(layer, "layer"):
            raise self._unknown(name, layer, "layer")
        return layer_of(name, layer)

    def _refuse_other_names(self, model: nn.Module) -> None:
        """What is replaced and known elsewhere, too, would there go on as it is, apart from the network."""
        gone = {part for old, new in self.new.items() for part in {*old.modules()} - {*new.modules()}}
        for parent, name, child in _references(model):
            if child in gone and child not in self.new and parent not in gone:
                what = f"{type(parent).__name__}.{name}"
                raise UnsupportedError(f"a part of a dense block is also {what}, which would be left behind")
        for module in [module for module in model.modules() if module not in gone]:
            for name, value in vars(module).items():
                if name not in _OWN_ATTRIBUTES and any(part in gone for part in _modules_in(value)):
                    what = f"{type(module).__name__}.{name}"
                    raise UnsupportedError(
                        f"a part of a dense block is also in {what}, which would be left behind; in an "
                        "nn.ModuleList or nn.ModuleDict it would not be"
                    )


def _modules_in(value: object) -> Iterator[nn.Module]:
    """The modules in a plain attribute: a list or dict of them, or a method of one."""
    if isinstance(value, dict):
        value = [*value.values()]
    for each in value if isinstance(value, list | tuple | set) else [value]:
        owner = getattr(each, "__self__", each)
        if isinstance(owner, nn.Module):
            yield owner


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
        reason = why_not_bypass(module) or _replaced_method(module)
        if any(getattr(module, hooks, None) for hooks in _STATE_HOOKS):
            reason = "a hook on its state"
        elif type(module).get_extra_state is not nn.Module.get_extra_state:
            reason = "state of its own"
        elif module._compiled_call_impl is not None:
            reason = "been compiled"
        if module not in kept and reason:
            raise UnsupportedError(f"{own or 'the network'} has {reason}; convert before that")
    before, after = _tensors(old), _tensors(new)
    if [(key, id(value)) for key, value in before.items()] != [(key, id(value)) for key, value in after.items()]:
        extra = next((key for key in before if after.get(key) is not before[key]), "other tensors")
        raise UnsupportedError(f"{name or 'the network'} has {extra}, which is not a DenseNet's")


def _replaced_method(module: nn.Module) -> str | None:
    """What an instance puts in the place of a method of its class; None where there is nothing."""
    replaced = (name for name in vars(module) if callable(getattr(type(module), name, None)))
    found = next(replaced, None)
    return None if found is None else f"a replaced {found}"


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
