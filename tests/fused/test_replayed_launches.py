"""What a driver is handed when a step is played back: what it was handed when the step was recorded.

With Triton's compiler and a driver that runs nothing, so in a process of its own
(`python -m tests.fused.test_replayed_launches`): in this one kernels belong to the interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from densebench.kernels import compiled
from densebench.kernels.language import triton
from densebench.replay import tracks
from tests.fused.conftest import call_launchers
from tests.kernels.test_starting import driver_of
from tests.networks import images, small
from tests.replays import STEPS, tracks_in

pytest.importorskip("triton.backends.nvidia", reason="Triton for NVIDIA is not installed")


def steps() -> dict[str, Any]:
    """What the driver receives in each step of training, and what was recorded."""
    machine = SimpleNamespace(device=0, stream=0, received=[])
    triton.runtime.driver.set_active(driver_of(machine))
    network = small("fused", stem="imagenet", block_config=(2, 1), growth_rate=16, num_init_features=16)
    network, x = network.float(), images(2, 32, dtype=torch.float32)
    found = []
    with pytest.MonkeyPatch.context() as monkeypatch, compiled.using(None):
        call_launchers(monkeypatch)
        monkeypatch.setattr(tracks, "worthwhile", lambda x, dtype: True)
        for number in range(STEPS):
            machine.stream = number
            network.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                output = network(x)
            output.float().sum().backward()
            found.append(machine.received[:])
            machine.received.clear()
    sources = [source for track in tracks_in(network) for source in track.recording.sources]  # type: ignore[union-attr]
    return {"steps": found, "sources": sources}


@pytest.fixture(scope="module")
def handed(repository: Path) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.fused.test_replayed_launches"]
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_driver_is_handed_the_same(handed: dict[str, Any]) -> None:
    """Kernels, grids and numbers; addresses differ, but not in what kernels are compiled for."""
    _, recorded, *played = ([_plain(launch) for launch in step] for step in handed["steps"])
    assert len(recorded) > 50
    for number, step in enumerate(played, 2):
        assert [launch["stream"] for launch in step] == [f"(0, {number})"] * len(step)
        assert [launch["rest"] for launch in step] == [launch["rest"] for launch in recorded]


def _plain(launch: list[str]) -> dict[str, Any]:
    """A launch without what differs from step to step."""
    kernel, *grid, stream = launch[:5]
    rest = [argument if not _is_address(argument) else f"address {int(argument) % 16}" for argument in launch[5:]]
    return {"stream": stream, "rest": [kernel, *grid, *rest]}


def _is_address(argument: str) -> bool:
    return argument.isdecimal() and int(argument) > 2**32


def test_a_recording_can_be_read(handed: dict[str, Any]) -> None:
    """Kernels and operators stand in it by their names."""
    source = "\n".join(handed["sources"])
    for name in ("bn_relu_conv1x1__kernel", "bn_relu_conv1x1_backward__kernel", "aten_convolution"):
        assert name in source


if __name__ == "__main__":
    print(json.dumps(steps()))
