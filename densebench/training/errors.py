"""What ends a training command."""

from __future__ import annotations


class TrainingError(ValueError):
    """What was asked for cannot be done; one sentence that names what is wrong and the remedy."""


class DivergedError(RuntimeError):
    """A loss is no number any more; one sentence that says where."""
