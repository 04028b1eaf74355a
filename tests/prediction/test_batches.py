"""The largest batch that fits: it fits, and one more does not; few traces find it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import densebench
from densebench.prediction.batches import LARGEST, PeakCurve
from densebench.prediction.networks import trace_network
from densebench.prediction.trace import StepTrace
from densebench.records import Case
from densebench.step_tracker import Allocation, Operation

MIB = 2**20


def _traces(strategy: str, traced: list[int]) -> Callable[[int], StepTrace]:
    def trace(batch: int) -> StepTrace:
        traced.append(batch)
        return trace_network("densenet_d2l", (batch, 1, 64, 64), strategy, "train", device="cuda")

    return trace


def test_one_more_does_not_fit(every_strategy: str) -> None:
    traced: list[int] = []
    curve = PeakCurve(_traces(every_strategy, traced), fixed=3 * MIB)
    batch = curve.largest(400 * MIB)
    assert len(traced) <= 5
    assert curve.peak(batch) <= 400 * MIB < curve.peak(batch + 1)


def _step(*live: int, constant: int = 0) -> StepTrace:
    """A step with so many bytes alive during each of its operations."""
    import torch

    operations = [Operation("op", None, 0, 0, 0, torch.float32) for _ in live]
    allocations = [Allocation(nbytes, "op", at, at) for at, nbytes in enumerate(live, 1)]
    return StepTrace({"input": constant}, {"input": (constant,)}, allocations, operations, len(live))


def test_another_event_may_hold_the_peak() -> None:
    """Piecewise linear: below 50 images the first event is the highest, above the second."""
    curve = PeakCurve(lambda n: _step(1000 + n, 21 * n, constant=10 * n))
    assert [curve.peak(n) for n in (10, 100)] == [1110, 3100]
    assert curve.estimate(60) == 60 * 31
    assert curve.largest(31 * 80) == 80
    assert curve.largest(1000 + 11 * 40) == 40


def test_memory_that_grows_in_steps() -> None:
    """A workspace that saturates is no straight line; the answer then is on the safe side."""
    curve = PeakCurve(lambda n: _step(min(n, 64) * 1000 + n))
    assert curve.peak(curve.largest(64_500)) <= 64_500
    assert PeakCurve(curve.trace).largest(80_000, start=100) == 16_000


def test_nothing_fits_or_everything_does() -> None:
    assert PeakCurve(lambda n: _step(100 * n, constant=50)).largest(120) == 0
    assert PeakCurve(lambda n: _step(7), fixed=1).largest(8) >= LARGEST - 1
    assert PeakCurve(lambda n: _step(7), fixed=2).largest(8) == 0


def test_a_path_that_changes_with_the_batch() -> None:
    """Steps of different lengths cannot be matched event by event; their peaks can."""
    curve = PeakCurve(lambda n: _step(*[10 * n] * (1 + n % 2)))
    assert curve.largest(1000) == 100


def test_prediction_says_whether_it_fits() -> None:
    prediction = densebench.predict_memory("densenet_d2l", (64, 1, 64, 64), "fused", device_memory="2GiB")
    assert prediction.fits
    assert prediction.largest_batch is not None
    assert prediction.largest_batch > 64
    assert prediction.peak_bytes + prediction.reserved_bytes <= 2**31
    tight = densebench.predict_memory("densenet_d2l", (512, 1, 64, 64), "naive", device_memory="1GiB")
    assert not tight.fits
    assert tight.largest_batch is not None
    assert tight.largest_batch < 512


def test_breakdown_adds_up(every_strategy: str) -> None:
    for device in ("cpu", "cuda"):
        prediction = densebench.predict_memory("densenet_d2l", (8, 1, 64, 64), every_strategy, device=device)
        assert sum(prediction.breakdown.values()) == prediction.peak_bytes
        assert prediction.module.startswith(("features", "classifier"))
        assert prediction.flops_model is not None
        assert prediction.roofline_s > 0
        totals = np.sum([np.array(v) for v in prediction.timeline.bytes.values()], axis=0)
        assert totals.max() == pytest.approx(prediction.peak_bytes, rel=0.05, abs=80 * MIB)


def test_cuda_rounds_every_block() -> None:
    """512 bytes at least: a norm's vectors of 64 channels take twice their size."""
    cpu = densebench.predict_memory("densenet_d2l", (2, 1, 64, 64), device="cpu")
    cuda = densebench.predict_memory("densenet_d2l", (2, 1, 64, 64), device="cuda")
    assert cuda.breakdown["parameters"] > cpu.breakdown["parameters"]
    assert all(nbytes % 512 == 0 for nbytes in cuda.breakdown.values())


def test_recomputation_is_executed_and_not_modeled() -> None:
    naive = densebench.predict_memory("densenet_d2l", (4, 1, 64, 64))
    checkpointed = densebench.predict_memory("densenet_d2l", (4, 1, 64, 64), "checkpointed")
    assert checkpointed.flops_model == naive.flops_model == naive.flops_executed
    assert checkpointed.bytes_moved > naive.bytes_moved


def test_case_and_name_agree() -> None:
    case = Case("step", "densenet_d2l", "shared_buffer", "train", 4, (1, 64, 64), memory_format="channels_last")
    from densebench.prediction import trace_case

    named = densebench.predict_memory("densenet_d2l", (4, 1, 64, 64), "shared_buffer", device="cpu")
    assert trace_case(case).peak_bytes == named.peak_bytes
