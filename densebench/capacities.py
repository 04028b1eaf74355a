"""Powers of 1024, and the memories of cards for which what fits is asked and shown."""

from __future__ import annotations

MIB = 2**20
GIB = 2**30
CAPACITIES_GIB = (8, 16, 24, 40, 80)
