"""When work is recorded and when it is played back: what comes again with the same key.

The first time it runs as it is (and kernels are compiled), the second time it is recorded, from then on played
back; sizes that come once cost nothing. Where nothing comes of a recording, as of a backward that stops halfway,
the next is made after as many runs again. What is kept are lists of kernels and numbers, no memory, and they go
with the module that they are of. `DENSEBENCH_REPLAY=0` does without.
"""

from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Hashable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from densebench.kernels import compiled
from densebench.replay.layout import NotAsRecordedError
from densebench.replay.playback import Playback, Recording
from densebench.replay.recorder import Function, Recorder
from densebench.replay.recording import ALIGNMENT, Tensors

SWITCH = "DENSEBENCH_REPLAY"  # "0" in the environment: do without
FIRST_RECORDED = 2  # of a track's runs; the first compiles kernels, and of many a size there is no second
MOST = 32  # tracks of a module: its training step and its evaluation, at a few sizes


class Pass(Protocol):
    """One run of a function, in one or more segments."""

    def advance(self, function: Function, inputs: Tensors) -> tuple[Tensors, Any]:
        """What the function returns of the inputs, which may be taken out of their list."""

    def finish(self) -> None:
        """All segments have run."""


class Plain:
    """The functions themselves."""

    def advance(self, function: Function, inputs: Tensors) -> tuple[Tensors, Any]:
        return function(inputs)

    def finish(self) -> None:
        pass


class Track:
    """What always runs in the same way: how often it has, and what is known of it.

    Attributes:
        key_tells: whether inputs that lie in another way have another track; otherwise playback has to look.
        recording: once there is one.
        structures: what the functions return besides tensors, segment by segment.
        refusal: why it cannot be recorded, if that was found.
        following: tracks of what follows upon this; their keys tell nothing of what was kept for it.
        used: the higher, the later it has been asked for.
    """

    def __init__(self, key_tells: bool) -> None:
        self.key_tells = key_tells
        self.recording: Recording | None = None
        self.structures: list[Any] = []
        self.refusal: str | None = None
        self.following = Tracks(keys_tell=False)
        self.used = 0
        self._runs, self._next = 0, FIRST_RECORDED

    def start(self) -> Pass:
        """The next run."""
        if self.recording is not None:
            return _Played(self)
        self._runs += 1
        if self._runs < self._next or self.refusal is not None:
            return Plain()
        self._next = 2 * self._runs  # a run that fails, or is not run to its end, leaves nothing
        return _Recorded(self)

    def refuse(self, reason: object) -> None:
        """Neither play nor record it from now on."""
        self.recording, self.refusal = None, str(reason) or repr(reason)


_uses = itertools.count(1)


class Tracks(dict[Hashable, Track]):
    """Tracks by key, those that were asked for last."""

    def __init__(self, keys_tell: bool = True) -> None:
        super().__init__()
        self.keys_tell = keys_tell

    def of(self, key: Hashable) -> Track:
        found = self.get(key)
        if found is None:
            if len(self) >= MOST:
                self.pop(min(list(self.items()), key=lambda item: item[1].used)[0], None)
            found = self[key] = Track(self.keys_tell)
        found.used = next(_uses)
        return found


class _Recorded:
    def __init__(self, track: Track) -> None:
        self.track, self.recorder = track, Recorder()
        self.structures: list[Any] = []

    def advance(self, function: Function, inputs: Tensors) -> tuple[Tensors, Any]:
        outputs, structure = self.recorder.segment(function, inputs)
        self.structures.append(structure)
        return outputs, structure

    def finish(self) -> None:
        if self.recorder.refusal is not None:
            self.track.refuse(self.recorder.refusal)
            return
        try:
            recording = Recording(self.recorder.segments, checked=not self.track.key_tells)
        except Exception as reason:  # the work itself is done
            self.track.refuse(reason)
            return
        self.track.structures, self.track.recording = self.structures, recording


class _Played:
    def __init__(self, track: Track) -> None:
        assert track.recording is not None
        self.track = track
        self.playback, self.structures = Playback(track.recording), iter(track.structures)

    def advance(self, function: Function, inputs: Tensors) -> tuple[Tensors, Any]:
        try:
            return self.playback.advance(inputs), next(self.structures)
        except NotAsRecordedError as reason:
            self.track.refuse(reason)
            raise

    def finish(self) -> None:
        pass


_tracks: weakref.WeakKeyDictionary[nn.Module, Tracks] = weakref.WeakKeyDictionary()


def tracks_of(module: nn.Module) -> Tracks:
    """The tracks of what runs for a module; they are no part of its state and of no copy of it."""
    found = _tracks.get(module)
    if found is None:
        found = _tracks[module] = Tracks()
    return found


def enabled() -> bool:
    """Whether anything is recorded at all."""
    return os.environ.get(SWITCH, "1") != "0"


def replayable(x: Tensor, others: Iterable[Tensor | None], dtype: torch.dtype) -> bool:
    """Whether work on x and others that computes in a dtype is to be recorded or played back.

    Not where somebody watches who would miss operators: a dispatch mode, a function transform, a kind of tensor of
    its own.
    """
    if torch._C._len_torch_dispatch_stack() > 0 or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if not {type(x), *map(type, others)} <= _ORDINARY:
        return False
    return enabled() and worthwhile(x, dtype)


_ORDINARY = {Tensor, nn.Parameter, type(None)}


def worthwhile(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether a recording gains anything: not on PyTorch's own operators, tile by tile.

    On the current GPU, or a CPU where loops are compiled.
    """
    if x.is_cuda:
        return x.get_device() == torch.cuda.current_device()
    return x.is_cpu and compiled.library(dtype) is not None


def described(tensor: Tensor | None) -> Hashable:
    """All of an ordinary tensor that decides what is launched for it."""
    if tensor is None:
        return None
    layout = (tensor.shape, tensor.stride(), tensor.data_ptr() % ALIGNMENT)
    return (layout, tensor.dtype, tensor.device, tensor.requires_grad, tensor.is_neg())
