"""What the fused strategies refuse, in one sentence with the remedy."""

from __future__ import annotations

import pytest
import torch

from densebench import UnsupportedError
from densebench.strategies import fused
from tests.networks import images, small


@pytest.mark.parametrize("name", ["fused", "fused_recompute"])
def test_other_devices(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    network = small().train()
    running = network.state_dict()["features.norm5.running_mean"].clone()
    for stage in network.features.stages():
        stage.block.strategy = name
    monkeypatch.setattr(fused, "DEVICES", ("cuda",))
    fused._lack.cache_clear()
    with pytest.raises(UnsupportedError, match="runs on cuda, not on cpu; use 'shared_buffer' there"):
        network(images(2))
    assert torch.equal(network.state_dict()["features.norm5.running_mean"], running)
    fused._lack.cache_clear()


def test_old_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    lack = fused._lack.__wrapped__
    assert lack(torch.device("cuda")) == "needs a GPU of compute capability 8.0 or newer, this one has 7.5"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert lack(torch.device("cuda")) is None
    monkeypatch.setattr(fused.language, "AVAILABLE", False)
    assert lack(torch.device("cuda")) == "needs Triton, which is not installed, on a GPU"


def test_unknown_recomputation() -> None:
    network = small()
    (stage, *_) = network.features.stages()
    x = torch.ones(2, stage.block.in_channels, 8, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="recompute='bottlenecks'; known: nothing, bottleneck"):
        fused.fused(stage, x, recompute="bottlenecks")  # type: ignore[arg-type]
