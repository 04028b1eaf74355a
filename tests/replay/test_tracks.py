"""When work is recorded: the second time, and after something came of none, ever more seldom."""

from __future__ import annotations

from torch import Tensor

from densebench.replay.tracks import Plain, Track


def test_a_recording_that_came_to_nothing_is_made_again_after_as_many_runs() -> None:
    """As of backwards that stop halfway; where all of them do, recording must not be most of the work."""
    track = Track(key_tells=True)
    recorded = [run for run in range(1, 40) if not isinstance(track.start(), Plain)]
    assert recorded == [2, 4, 8, 16, 32]


def test_after_runs_that_stopped_halfway_a_whole_one_is_recorded() -> None:
    track = Track(key_tells=True)
    for _ in range(6):
        track.start().advance(_twice, [Tensor([1.0])])
    assert track.recording is None
    for _ in range(2):
        run = track.start()
        run.advance(_twice, [Tensor([1.0])])
        run.finish()
    assert track.recording is not None
    assert track.refusal is None


def _twice(inputs: list[Tensor | None]) -> tuple[list[Tensor | None], None]:
    return [2 * one for one in inputs if one is not None], None
