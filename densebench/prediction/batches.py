"""The largest batch whose step fits: a few traces, interpolated event by event, and a check at the answer.

Between two batches every allocation grows linearly, so live memory at each event does, and the peak, the
highest of them, is piecewise linear: which event holds it may change. What is answered has been traced, or lies
so near a batch which has that the difference is a few images' worth of a straight line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from densebench.prediction.trace import Bytes, StepTrace

MOST_TRACES = 8
NEAR = 0.02  # of the batch: within this of a traced one, linearity is trusted
LARGEST = 2**24  # nobody's batch; stops the search where memory does not depend on the batch


@dataclass(frozen=True)
class Point:
    """One traced batch: what is constant, and what is live beyond it at each event."""

    batch: int
    constant: int
    live: Bytes

    @property
    def peak(self) -> int:
        return self.constant + int(self.live.max(initial=0))


@dataclass
class PeakCurve:
    """The peak of a step against the batch.

    Args:
        trace: `batch -> StepTrace`.
        fixed: bytes on top at every batch: optimizer state, libraries' workspaces, the driver.
        least: bytes that are needed beyond the constants in any case, such as an optimizer's step.
    """

    trace: Callable[[int], StepTrace]
    fixed: int = 0
    least: int = 0
    points: dict[int, Point] = field(default_factory=dict)

    def peak(self, batch: int) -> int:
        """Bytes at a batch, traced."""
        if batch not in self.points:
            self.add(batch, self.trace(batch))
        return self._total(self.points[batch].constant, self.points[batch].live)

    def add(self, batch: int, trace: StepTrace) -> None:
        """Take over a trace that exists already."""
        constant = trace.baseline_bytes + trace.rounding_bytes
        self.points[batch] = Point(batch, constant, trace.live.astype(np.int64))

    def estimate(self, batch: int) -> float:
        """Bytes at a batch, from the traced batches nearest to it (two at least must have been traced)."""
        if batch in self.points:
            return self.peak(batch)
        low, high = sorted(sorted(self.points, key=lambda at: abs(at - batch))[:2])
        a, b = self.points[low], self.points[high]
        share = (batch - low) / (high - low)
        constant = a.constant + share * (b.constant - a.constant)
        if len(a.live) != len(b.live):  # the network takes another path at another batch
            return self._total(constant, a.live.max() + share * (b.live.max() - a.live.max()))
        return self._total(constant, (a.live + share * (b.live - a.live)).max())

    def largest(self, capacity: int, start: int = 8, check: bool = True) -> int:
        """The largest batch whose step fits into so many bytes; 0 if not even one image does.

        Args:
            start: a batch to begin with, where none has been traced.
            check: trace near the answer; without, it may lie far from (or beyond) the traced batches.
        """
        if not self.points:
            self.peak(start)
        if len(self.points) == 1:
            (only,) = self.points
            self.peak(max(1, self._proportional_guess(only, capacity)))
        for _ in range(MOST_TRACES):
            guess = self._guess(capacity)
            if not check or guess == 0 or guess >= LARGEST - 1 or self._is_near_a_point(guess):
                return guess
            self.peak(guess)
        return max((batch for batch in self.points if self.peak(batch) <= capacity), default=0)

    def _proportional_guess(self, batch: int, capacity: int) -> int:
        """As if all that is live grew with the batch: right to a few images, and never the same batch."""
        point = self.points[batch]
        room = capacity - point.constant - self.fixed
        guess = max(1, int(batch * room / max(1, point.live.max(initial=1))))
        return min(guess if guess != batch else batch + 1, LARGEST)

    def _is_near_a_point(self, batch: int) -> bool:
        return any(abs(traced - batch) <= NEAR * batch for traced in self.points)

    def _guess(self, capacity: int) -> int:
        """By bisection on the estimate, between the traced batches that fit and that do not."""
        fits = max((batch for batch in self.points if self.peak(batch) <= capacity), default=0)
        fails = min((batch for batch in self.points if self.peak(batch) > capacity), default=LARGEST)
        while fails - fits > 1:
            middle = (fits + fails) // 2
            if self.estimate(middle) <= capacity:
                fits = middle
            else:
                fails = middle
        return fits

    def _total(self, constant: float, live: float | Bytes) -> int:
        return int(constant + max(float(np.max(live, initial=0)), self.least)) + self.fixed
