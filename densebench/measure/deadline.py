"""A limit on how long a case may take within this process."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

TIMEOUT_SECONDS = 420.0  # 300 to compile, 120 to run


class CaseTimeout(Exception):  # noqa: N818 - a limit, not a fault
    """A case took longer than it may."""


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise `CaseTimeout` inside the block once the time is up.

    Python raises it between two operators, so what hangs inside one is not ended: that takes a process of its
    own (`densebench.measure.worker`). Outside the main thread, where signals do not arrive, there is no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(_: int, __: FrameType | None) -> None:
        raise CaseTimeout(f"took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    # Again after as long: raised in a destructor, or where somebody catches everything, it is lost.
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
