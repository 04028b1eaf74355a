"""How a recording is made: by running what is to be recorded, once, and watching."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from densebench.kernels.library import implementation
from densebench.kernels.started import Started, watched
from densebench.replay.recording import (
    ALIGNMENT,
    Allocate,
    Call,
    Geometry,
    Input,
    Made,
    Pointer,
    Segment,
    Start,
    Step,
    Tensors,
    View,
)
from densebench.step_tracker import ALLOCATE, storage_key, written_arguments

Function = Callable[[Tensors], tuple[Tensors, Any]]


class UnrecordableError(Exception):
    """Something cannot be played back; the message says what."""


class _Place(NamedTuple):
    """Memory of a slot: the first address, bytes from there, and what stands in the slot."""

    slot: int
    address: int
    nbytes: int
    geometry: Geometry
    dtype: torch.dtype

    def holds(self, address: int, nbytes: int) -> bool:
        return self.address <= address and address + nbytes <= self.address + self.nbytes

    def overlaps(self, address: int, nbytes: int) -> bool:
        return max(self.address, address) < min(self.address + self.nbytes, address + nbytes)


class Recorder(TorchDispatchMode):
    """Records what runs in `segment`, while it runs.

    Attributes:
        segments: all so far.
        refusal: why they cannot be played back; None as long as all that was met can.
    """

    def __init__(self) -> None:
        super().__init__()
        self.refusal: str | None = None
        self.segments: list[Segment] = []
        self._steps: list[Step] = []
        self._slots = 0
        self._given: set[int] = set()  # slots of inputs
        self._written: set[int] = set()  # and of what is written into
        self._places: dict[int, list[_Place]] = {}  # by storage, as long as it lives
        self._references: dict[int, weakref.ref[Any]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """To keep the compiler out of here PyTorch would import it, which takes a second; it never comes here."""
        return False

    def segment(self, function: Function, inputs: Tensors) -> tuple[Tensors, Any]:
        """Run a function of tensors and return what it returns: tensors, and anything that holds none.

        All memory that it touches is among the inputs, or was made in this recorder's segments.
        """
        self._steps = []
        taken: tuple[Input | None, ...] = ()
        with self._refusing():
            taken = self._inputs(inputs)
        with self, watched(self._started):
            outputs, structure = function(inputs)
        with self._refusing():
            views = tuple(None if tensor is None else self._view(tensor) for tensor in outputs)
            taken = tuple(one and one._replace(written=one.slot in self._written) for one in taken)
            self.segments.append(Segment(taken, tuple(self._steps), views))
        return outputs, structure

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "densebench":  # recorded is what it allocates and starts
            with self._refusing():
                self._require_own(func, args)
            with self:
                return implementation(func, args[0])(*args)
        result = func(*args, **(kwargs or {}))
        for tensors in _written(func, args, kwargs):
            if isinstance(tensors, list):  # PyTorch tells autograd so itself, but not of lists where a mode is on
                torch.autograd.graph.increment_version(tensors)
        with self._refusing():
            self._called(func, args, kwargs or {}, result)
        return result

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        """What cannot be recorded, for whatever reason, is done all the same."""
        try:
            yield
        except Exception as reason:
            self.refusal = self.refusal or str(reason) or repr(reason)

    def _called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        results = list(result) if isinstance(result, (list, tuple)) else [] if result is None else [result]
        if not all(made is None or isinstance(made, Tensor) for made in results):
            if not _holds_tensors((args, tuple(kwargs.values()))):
                return  # of dtypes, say
            raise UnrecordableError(f"{func} returns what is no tensor")
        written = _written(func, args, kwargs)
        new = [made is not None and self._place(made) is None for made in results]
        if not any(new) and not written:
            return  # views
        self._written.update(self._known(one).slot for one in tree_leaves(written) if isinstance(one, Tensor))
        if written_arguments(func)[0] in ALLOCATE:
            self._steps.append(Allocate(self._add(result), Geometry.of(result), result.dtype, result.device))
            return
        arguments, keywords = self._noted(args), {key: self._noted(value) for key, value in kwargs.items()}
        made = tuple(self._made(one) if is_new else None for one, is_new in zip(results, new, strict=True))
        self._steps.append(Call(func, arguments, keywords, made, alone=isinstance(result, Tensor)))

    def _made(self, tensor: Tensor) -> Made:
        if tensor.storage_offset() != 0:
            raise UnrecordableError("an operator whose result lies within more memory")
        return Made(self._add(tensor), Geometry.of(tensor), tensor.dtype)

    def _started(self, started: Started | None) -> None:
        with self._refusing():
            if started is None:
                raise UnrecordableError("a kernel that was not compiled")
            self._steps.append(Start(started._replace(arguments=self._pointed_at(started.arguments))))

    def _require_own(self, func: Any, args: tuple[Any, ...]) -> None:
        """Autograd is not told of what kernels write; so they write into no memory that it may have saved."""
        for tensor in _written(func, args, None):
            if tensor is not None and self._known(tensor).slot in self._given:
                raise UnrecordableError(f"{func} writes into an input")

    def _noted(self, value: Any) -> Any:
        """An argument, with views in place of tensors."""
        if isinstance(value, Tensor):
            return self._view(value)
        return type(value)(map(self._noted, value)) if type(value) in (list, tuple) else value

    def _pointed_at(self, value: Any) -> Any:
        """An argument of what is started, with pointers in place of tensors."""
        if type(value) is tuple:
            return tuple(map(self._pointed_at, value))
        if not isinstance(value, Tensor):
            return value
        place = self._known(value)
        return Pointer(place.slot, value.data_ptr() - place.address)

    def _view(self, tensor: Tensor) -> View:
        place = self._known(tensor)
        if tensor.dtype != place.dtype:
            raise UnrecordableError(f"memory of {place.dtype} read as {tensor.dtype}")
        geometry = Geometry.of(tensor)
        offset = (tensor.data_ptr() - place.address) // tensor.element_size()
        return View(place.slot, geometry, offset, whole=offset == 0 and geometry == place.geometry)

    def _known(self, tensor: Tensor) -> _Place:
        place = self._place(tensor)
        if place is None:
            raise UnrecordableError(f"a tensor of shape {list(tensor.shape)} that was neither given nor made here")
        return place

    def _place(self, tensor: Tensor) -> _Place | None:
        span = tensor.data_ptr(), _span(tensor)
        return next((place for place in self._in_storage(tensor) if place.holds(*span)), None)

    def _in_storage(self, tensor: Tensor) -> list[_Place]:
        """All places in a tensor's storage, the latest first."""
        return self._places.get(storage_key(tensor), [])

    def _inputs(self, tensors: Tensors) -> tuple[Input | None, ...]:
        """A slot for each of a segment's inputs, also where its memory has one.

        Not where two share memory: from a step's addresses it could not be told which of them is meant.
        """
        first = self._slots
        taken: list[Input | None] = []
        for tensor in tensors:
            if tensor is None:
                taken.append(None)
                continue
            if tensor.is_neg():  # what stands at its address is not its value
                raise UnrecordableError("an input that is lazily negated")
            address = tensor.data_ptr()
            others = [place for place in self._in_storage(tensor) if place.slot >= first]
            if any(place.overlaps(address, _span(tensor)) for place in others):
                raise UnrecordableError("two inputs that share memory")
            slot = self._add(tensor)
            self._given.add(slot)
            kind = (Geometry.of(tensor), tensor.dtype, tensor.device)
            taken.append(Input(slot, *kind, address % ALIGNMENT, written=False))
        return tuple(taken)

    def _add(self, tensor: Tensor) -> int:
        """A new slot for what was made or given."""
        slot, key = self._slots, storage_key(tensor)
        self._slots += 1
        if key not in self._references:
            self._references[key] = weakref.ref(tensor.untyped_storage(), functools.partial(self._gone, key))
        place = _Place(slot, tensor.data_ptr(), _span(tensor), Geometry.of(tensor), tensor.dtype)
        self._places.setdefault(key, []).insert(0, place)
        return slot

    def _gone(self, key: int, _: Any) -> None:
        self._places.pop(key, None)  # not there yet, if an interrupt came between
        self._references.pop(key, None)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> list[Any]:
    """The arguments that an operator writes into: tensors, lists of them, None."""
    _, places = written_arguments(func)
    given: dict[int | str, Any] = dict(enumerate(args))
    given.update(kwargs or {})
    return [given[place] for place in places if place in given]


def _holds_tensors(values: Any) -> bool:
    if isinstance(values, (list, tuple)):
        return any(map(_holds_tensors, values))
    return isinstance(values, Tensor)


def _span(tensor: Tensor) -> int:
    """Bytes from a tensor's first value to behind its last."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
