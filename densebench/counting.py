"""Counts in words; apart from the report's units, since measuring, models and kernels count, too."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """A number with its noun, which is plural unless it is one: 1 thread, 2 threads, 1,024 images."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
