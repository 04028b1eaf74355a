"""Every failure mode once more, recorded and played back, as steps are from the third on.

Recordings are made at once here, and shared by all networks: the key under which one is found has to say all that
it depends on.
"""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from densebench.execution import autograd
from densebench.replay import tracks
from tests import comparison
from tests.replays import replay_everywhere
from tests.test_equivalence import *  # noqa: F403
from tests.test_failure_modes_autograd import *  # noqa: F403
from tests.test_failure_modes_framework import *  # noqa: F403
from tests.test_failure_modes_numerics import *  # noqa: F403
from tests.test_failure_modes_processes import *  # noqa: F403
from tests.test_failure_modes_shapes import *  # noqa: F403
from tests.test_failure_modes_state import *  # noqa: F403

STRATEGIES = ["naive", "fused", "fused_recompute"]
WITH_PLAIN = False  # nothing of it is recorded
NEVER_RECORDED = ("momentum None", "no image")  # no step is like the last; nothing is computed
_shared = tracks.Tracks()
_play = comparison.play


@pytest.fixture(autouse=True)
def played_back(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Scenarios that are compared run twice, so that the second time is played back."""
    monkeypatch.setattr(tracks, "FIRST_RECORDED", 1)
    monkeypatch.setattr(tracks, "MOST", 2**20)
    monkeypatch.setattr(autograd, "tracks_of", lambda module: _shared)
    counts = replay_everywhere(monkeypatch)
    never_recorded = any(case in request.node.name for case in NEVER_RECORDED)

    def twice(scenario: comparison.Scenario, network: nn.Module, strategy: str) -> Any:
        found = _play(scenario, network, strategy)
        if strategy != "naive":
            found = _play(scenario, network, strategy)
            failed = any("Error" in name for name in found)
            assert counts["played"] or failed or never_recorded, "not played back"
        return found

    monkeypatch.setattr(comparison, "play", twice)
