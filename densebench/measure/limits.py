"""How much fits into cards of several sizes, as records: the largest batch, and the deepest network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from densebench.capacities import GIB
from densebench.measure.environment import environment
from densebench.prediction.batches import PeakCurve
from densebench.prediction.cuda import CONTEXT_BYTES, cublas_bytes
from densebench.prediction.trace import trace_case
from densebench.records import Case, Record

DEEPEST = 1000  # layers; a trace of more takes minutes, and nothing is said about what was not traced


def largest_batches(case: Case, capacities_gib: Sequence[int], check: bool) -> Iterator[Record]:
    """Records of kind "fit": the largest batch of a case's network for each capacity, from the largest down.

    `case.options` gain `capacity_gib` and `largest_batch`. The peak is with cuBLAS's workspaces, and 0.5 GiB are
    left to the driver (see `densebench.prediction.cuda`).

    Args:
        case: its batch is where the search begins.
        check: trace near every answer; without, only near that of the largest capacity: the others lie between
            traced batches.
    """
    fixed = cublas_bytes(None, case.mode) + CONTEXT_BYTES
    curve = PeakCurve(lambda batch: trace_case(replace(case, batch=batch)), fixed)
    curve.peak(case.batch)
    order = sorted(capacities_gib, reverse=True)
    for capacity in order:
        batch = curve.largest(capacity * GIB, check=check or capacity == order[0])
        peak = int(curve.estimate(max(1, batch))) - CONTEXT_BYTES
        options = {**case.options, "capacity_gib": capacity, "largest_batch": batch}
        yield _record(replace(case, kind="fit", batch=max(1, batch), options=options), peak)


def deepest_networks(case: Case, capacities_gib: Sequence[int]) -> Iterator[Record]:
    """Records of kind "deepest": the most layers of a DenseNet-BC whose step fits into each capacity.

    `case.options` gain `capacity_gib` and `depth`, which is 6n + 4. Every answer has been traced, and so has the
    next depth, which does not fit; where even 1,000 layers fit, the reason says that no more was tried.
    """
    fixed = cublas_bytes(None, case.mode) + CONTEXT_BYTES
    known: dict[int, int] = {}

    def peak(layers: int) -> int:
        if layers not in known:
            options = {**case.options, "depth": 6 * layers + 4}
            known[layers] = trace_case(replace(case, options=options)).peak_bytes + fixed
        return known[layers]

    for capacity in sorted(capacities_gib):
        layers = deepest(peak, capacity * GIB, (DEEPEST - 4) // 6)
        options = {**case.options, "capacity_gib": capacity, "depth": 6 * layers + 4}
        reason = f"{DEEPEST} layers fit; no deeper network was traced" if 6 * layers + 4 == DEEPEST else None
        yield _record(replace(case, kind="deepest", options=options), peak(max(1, layers)) - CONTEXT_BYTES, reason)


def deepest(peak: Callable[[int], int], capacity: int, most: int, start: int = 16) -> int:
    """The largest n up to `most` with peak(n) <= capacity (0 if none), guessed along a power law.

    `peak` must grow with n; it is asked for few n, the answer and the next among them.
    """
    fits, fails = 0, most + 1
    tried: dict[int, int] = {}
    guess = min(start, most)
    while fails - fits > 1:
        tried[guess] = peak(guess)
        fits, fails = (guess, fails) if tried[guess] <= capacity else (fits, guess)
        guess = min(max(_along_power_law(tried, capacity), fits + 1), fails - 1)
    return fits


def _along_power_law(tried: dict[int, int], capacity: int) -> int:
    """Where bytes = a n^p through the two nearest points reaches the capacity; one point is taken for p = 1."""
    nearest = sorted(tried, key=lambda n: abs(math.log(tried[n] / capacity)))[:2]
    n = nearest[0]
    power = 1.0
    if len(nearest) == 2 and tried[nearest[1]] != tried[n]:
        power = math.log(tried[n] / tried[nearest[1]]) / math.log(n / nearest[1])
    return int(n * (capacity / tried[n]) ** (1 / max(0.2, power)))


def _record(case: Case, peak: int, reason: str | None = None) -> Record:
    return Record(
        case,
        "ok",
        reason,
        peak_allocated_bytes=peak,
        predicted_peak_bytes=peak,
        environment=environment("cpu"),
    )
