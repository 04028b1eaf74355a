"""When work is recorded and when it is played back: what comes again with the same key.

The first time it runs as it is (and kernels are compiled), the second time it is recorded, from then on played
back; sizes that come once cost nothing. What is kept are lists of kernels and numbers, no memory, and they go with
the module that they are of. `DENSEBENCH_REPLAY=0` does without.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Hashable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from densebench.kernels import compiled
from densebench.replay.playback import Playback, Recording
from densebench.replay.recorder import Function, Recorder
from densebench.replay.recording import ALIGNMENT, Tensors

SWITCH = "DENSEBENCH_REPLAY"  # "0" in the environment: do without
FIRST_RECORDED = 2  # of a track's runs; the first compiles kernels, and of many a size there is no second
ATTEMPTS = 3  # to record; a run that fails, or is not run to its end, leaves nothing
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
        recording: once there is one.
        structures: what the functions return besides tensors, segment by segment.
        refusal: why it cannot be recorded, if that was found.
        following: tracks of what follows upon this.
    """

    def __init__(self) -> None:
        self.recording: Recording | None = None
        self.structures: list[Any] = []
        self.refusal: str | None = None
        self.following = Tracks()
        self._runs = 0

    def start(self) -> Pass:
        """The next run."""
        if self.recording is not None:
            return _Played(self)
        self._runs += 1
        tries = FIRST_RECORDED <= self._runs < FIRST_RECORDED + ATTEMPTS
        return _Recorded(self) if tries and self.refusal is None else Plain()


class Tracks(dict[Hashable, Track]):
    """Tracks by key, the latest to be new."""

    def of(self, key: Hashable) -> Track:
        found = self.get(key)
        if found is None:
            if len(self) >= MOST:
                del self[next(iter(self))]
            found = self[key] = Track()
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
        self.track.refusal = self.recorder.refusal
        if self.track.refusal is None:
            self.track.structures, self.track.recording = self.structures, Recording(self.recorder.segments)


class _Played:
    def __init__(self, track: Track) -> None:
        assert track.recording is not None
        self.playback, self.structures = Playback(track.recording), iter(track.structures)

    def advance(self, function: Function, inputs: Tensors) -> tuple[Tensors, Any]:
        return self.playback.advance(inputs), next(self.structures)

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


def replayable(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether work on x that computes in a dtype is to be recorded: nobody watches who would miss operators.

    On the current GPU, or a CPU where loops are compiled: PyTorch's operators, tile by tile, gain little by it.
    """
    if type(x) is not Tensor or torch._C._len_torch_dispatch_stack() > 0 or not enabled():
        return False
    if x.is_cuda:
        return x.get_device() == torch.cuda.current_device()
    return x.is_cpu and compiled.library(dtype) is not None


def described(tensor: Tensor | None) -> Hashable:
    """All of a tensor that decides what is launched for it."""
    if tensor is None:
        return None
    layout = (tensor.shape, tensor.stride(), tensor.data_ptr() % ALIGNMENT)
    return (layout, tensor.dtype, tensor.get_device(), tensor.requires_grad, type(tensor))
