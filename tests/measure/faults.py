"""Contenders that go wrong, each in its own way. Importing registers them; see the fixture `faults`."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from densebench.contenders import contender


class _Doing(nn.Module):
    """A small network that does something before each forward."""

    def __init__(self, act: Callable[[], Any]) -> None:
        super().__init__()
        self.act = act
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, input: Tensor) -> Tensor:
        self.act()
        output: Tensor = self.conv(input)
        return output


def _raise(error: Exception) -> None:
    raise error


def _garble() -> None:
    print("\x00\xff not a record {", flush=True)
    os.write(2, b"\xff\xfe broken \x00 bytes\n")


ACTS: dict[str, Callable[[], Any]] = {
    "fine": lambda: None,
    "exits": lambda: os._exit(3),
    "exits_in_silence": lambda: os._exit(0),
    "leaves": lambda: sys.exit("left without a word"),
    "segfaults": lambda: ctypes.string_at(0),
    "kills_itself": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "hangs": lambda: time.sleep(600),
    "runs_out_of_memory": lambda: _raise(torch.OutOfMemoryError("Tried to allocate 20.00 GiB.\nmore")),
    "fails": lambda: _raise(ValueError("first line\nsecond line")),
    "garbles": _garble,
}


def _register(name: str) -> None:
    @contender(name, summary=f"{name}, for tests", models="fault", reference=None)
    def build(model: str, **options: Any) -> nn.Module:
        return _Doing(ACTS[name])


for _name in ACTS:
    _register(_name)
