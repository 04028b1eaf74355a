"""A recording written out as Python and compiled: one function a segment, one line a step.

What a line needs is a constant in it or a local variable, so that playing a step costs little more than what it
calls: for slot 5, `t5` is the tensor and `a5` its address. A variable is deleted after its last use, its memory
with it. Slots that more than one segment uses are handed on in a dictionary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from densebench.kernels.launch import current_stream
from densebench.kernels.started import STREAM
from densebench.replay.layout import NotAsRecordedError, laid_out
from densebench.replay.recording import (
    ALIGNMENT,
    Allocate,
    Call,
    Input,
    Pointer,
    Segment,
    Start,
    Step,
    Tensors,
    View,
)

_LITERALS = (bool, int, str, type(None))
_FACTS = ("shape", "stride()", "dtype", "device")
Slots = dict[int, Tensor]


class Recording:
    """Segments, ready to be played.

    Attributes:
        sources: of the functions, for people.

    Args:
        segments: in their order.
        checked: inputs may lie elsewhere, or be others, than those that were recorded; otherwise they do not.
    """

    def __init__(self, segments: Sequence[Segment], checked: bool = True) -> None:
        uses = _uses(segments)
        given = {taken.slot for segment in segments for taken in segment.inputs if taken}
        self.sources: list[str] = []
        self.functions: list[Callable[[Tensors, Slots], Tensors]] = []
        for number, segment in enumerate(segments):
            writer = _Writer(number, uses, given, checked)
            source = "\n".join(writer.function(segment))
            exec(compile(source, f"<segment {number}>", "exec"), writer.names)
            self.sources.append(source)
            self.functions.append(writer.names["play"])


class Playback:
    """One run of a recording, segment after segment."""

    def __init__(self, recording: Recording) -> None:
        self._ahead = iter(recording.functions)
        self._slots: Slots = {}

    def advance(self, inputs: Tensors) -> Tensors:
        """Play the next segment; takes the inputs out of their list, so that none lives longer than it is needed.

        Raises:
            NotAsRecordedError: if an input has another shape, dtype or device than the recorded one had, or an
                operator's result another dtype or layout.
        """
        return next(self._ahead)(inputs, self._slots)


class _Use(NamedTuple):
    """Of a slot.

    Attributes:
        filled: the segment in which.
        last: the segment in which it is used last, at its `step`; one behind its last step for outputs.
        addressed: whether a kernel takes its address.
    """

    filled: int
    last: int
    step: int
    addressed: bool


def _uses(segments: Sequence[Segment]) -> dict[int, _Use]:
    """Of all slots that are used at all."""
    given = {taken.slot: at for at, segment in enumerate(segments) for taken in segment.inputs if taken}
    uses: dict[int, _Use] = {}
    for number, segment in enumerate(segments):
        used = [(set(step.used()), isinstance(step, Start)) for step in segment.steps]
        for at, (slots, addressed) in enumerate([*used, (set(segment.results()), False)]):
            for slot in slots:
                before = uses.get(slot, _Use(given.get(slot, number), number, at, False))
                uses[slot] = _Use(before.filled, number, at, addressed or before.addressed)
    return uses


class _Writer:
    """Writes the function of one segment.

    Attributes:
        names: the globals of the function.
    """

    def __init__(self, number: int, uses: Mapping[int, _Use], given: set[int], checked: bool) -> None:
        self.number, self.uses, self.given, self.checked = number, uses, given, checked
        self.names: dict[str, Any] = {
            "torch": torch,
            "current_stream": current_stream,
            "laid_out": laid_out,
            "result_differs": _result_differs,
        }
        self._named: dict[int, str] = {}

    def function(self, segment: Segment) -> Iterator[str]:
        yield "def play(inputs, slots):"
        for line in self._lines(segment):
            yield f"    {line}"

    def _lines(self, segment: Segment) -> Iterator[str]:
        yield from self._opening(segment)
        ends: dict[int, list[str]] = {}
        for slot, use in self.uses.items():
            if use.last == self.number:
                ends.setdefault(use.step, []).append(f"t{slot}")
        for at, step in enumerate(segment.steps):
            yield from self._step(step)
            if at in ends:
                yield f"del {', '.join(ends[at])}"
        for slot, use in self.uses.items():
            if use.filled == self.number < use.last:
                yield f"slots[{slot}] = t{slot}"
        yield f"return [{', '.join(map(self._argument, segment.outputs))}]"

    def _opening(self, segment: Segment) -> Iterator[str]:
        """Inputs, checked; what earlier segments have left; what makes memory of each dtype."""
        taken = [one if one is not None and one.slot in self.uses else None for one in segment.inputs]
        yield f"[{', '.join('_' if one is None else f't{one.slot}' for one in taken)}] = inputs"
        yield "inputs.clear()"
        yield "_ = None"
        wanted = [one for one in taken if one is not None]
        addresses = [line for one in wanted for line in self._addressed(one.slot)]
        yield from addresses
        if self.checked and wanted:
            tensors = f"[{', '.join(f't{one.slot}' for one in wanted)}]"
            yield f"if {self._differ(wanted)}:"
            yield f"    {tensors} = laid_out({tensors}, {self._value(wanted, 'inputs')})"
            yield from (f"    {line}" for line in addresses)
        for slot, use in self.uses.items():
            if use.filled < self.number <= use.last:
                take = "pop" if use.last == self.number else "get"
                yield f"t{slot} = slots.{take}({slot})"
                yield from self._addressed(slot)
        if any(_holds(step.started.arguments, STREAM) for step in segment.steps if isinstance(step, Start)):
            yield "stream = current_stream()"
        for kind in {(step.dtype, step.device): None for step in segment.steps if isinstance(step, Allocate)}:
            dtype, device = map(self._value, kind)
            yield f"{self._maker(*kind)} = torch.empty(0, dtype={dtype}, device={device}).new_empty"

    def _differ(self, inputs: Sequence[Input]) -> str:
        """Whether any of the inputs is another, or lies in memory in another way, than was recorded."""
        facts = ", ".join(f"t{one.slot}.{fact}" for one in inputs for fact in _FACTS)
        as_recorded = [fact for one in inputs for fact in (*one.geometry, one.dtype, one.device)]
        differ = [f"[{facts}] != {self._value(as_recorded, 'as_recorded')}"]
        addressed = [one for one in inputs if self.uses[one.slot].addressed]
        if aligned := [f"a{one.slot}" for one in addressed if one.alignment == 0]:
            differ.append(f"({' | '.join(aligned)}) % {ALIGNMENT}")
        return " or ".join(
            differ + [f"a{one.slot} % {ALIGNMENT} != {one.alignment}" for one in addressed if one.alignment]
        )

    def _step(self, step: Step) -> Iterator[str]:
        if isinstance(step, Start):
            return self._start(step)
        return self._allocate(step) if isinstance(step, Allocate) else self._call(step)

    def _allocate(self, step: Allocate) -> Iterator[str]:
        slot, (size, stride) = step.slot, step.geometry
        if stride == _dense(size):
            yield f"t{slot} = {self._maker(step.dtype, step.device)}({size})"
        else:
            kind = f"dtype={self._value(step.dtype)}, device={self._value(step.device)}"
            yield f"t{slot} = torch.empty_strided({size}, {stride}, {kind})"
        yield from self._addressed(slot)

    def _addressed(self, slot: int) -> Iterator[str]:
        """Its address, if a kernel takes it."""
        if self.uses[slot].addressed:
            yield f"a{slot} = t{slot}.data_ptr()"

    def _start(self, step: Start) -> Iterator[str]:
        function, name, arguments, owner = step.started
        self.names[f"owner_{id(owner)}"] = owner  # alive as long as the recording
        yield f"{self._value(function, name)}({', '.join(map(self._argument, arguments))})"

    def _call(self, step: Call) -> Iterator[str]:
        arguments = [self._argument(argument) for argument in step.arguments]
        arguments += [f"{name}={self._argument(argument)}" for name, argument in step.keywords.items()]
        operator = self._value(step.operator, str(step.operator))
        call = f"{operator}({', '.join(arguments)})"
        if not any(step.made):
            yield call
            return
        targets = ["_" if made is None else f"t{made.slot}" for made in step.made]
        yield f"{targets[0]} = {call}" if step.alone else f"[{', '.join(targets)}] = {call}"
        for slot, geometry, dtype in (made for made in step.made if made is not None):
            differs = f"t{slot}.stride() != {geometry.stride} or t{slot}.dtype is not {self._value(dtype)}"
            yield f"if {differs}: result_differs({operator})"
            yield from self._addressed(slot)

    def _argument(self, argument: Any) -> str:
        if isinstance(argument, View):
            return self._view(argument)
        if isinstance(argument, Pointer):
            return f"a{argument.slot} + {argument.offset}"
        if argument is STREAM:
            return "stream"
        if not _holds(argument, STREAM, View, Pointer):
            return self._value(argument)
        parts = ", ".join(map(self._argument, argument))
        return f"[{parts}]" if isinstance(argument, list) else f"({parts},)"

    def _view(self, view: View) -> str:
        tensor = f"t{view.slot}"
        if view.whole:
            return tensor
        first = f"{tensor}.storage_offset() + {view.offset}" if view.slot in self.given else view.offset
        return f"{tensor}.as_strided({view.geometry.size}, {view.geometry.stride}, {first})"

    def _maker(self, dtype: torch.dtype, device: torch.device) -> str:
        return f"new_{str(dtype).removeprefix('torch.')}_{device.type}"

    def _value(self, value: Any, name: str = "constant") -> str:
        """An expression of it: itself, or a global variable."""
        if type(value) in _LITERALS:
            return repr(value)
        if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
            return str(value)
        name = re.sub(r"\W", "_", str(value) if isinstance(value, torch.device) else name)
        if not isinstance(value, torch.device):
            name = self._named.setdefault(id(value), f"{name}_{len(self._named)}")
        self.names[name] = value  # and so alive: none else gets its id
        return name


def _holds(value: Any, *wanted: Any) -> bool:
    """Whether it is one of those wanted, or of their types, or holds such a one."""
    if isinstance(value, (list, tuple)) and type(value) not in wanted:
        return any(_holds(one, *wanted) for one in value)
    return any(value is one or type(value) is one for one in wanted)


def _dense(size: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a contiguous tensor, as PyTorch gives them."""
    strides, step = [], 1
    for extent in reversed(size):
        strides.append(step)
        step *= max(1, extent)
    return tuple(reversed(strides))


def _result_differs(operator: Any) -> None:
    raise NotAsRecordedError(f"{operator} gives its result another dtype or layout than it did")
