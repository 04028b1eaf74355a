"""Sizes as people write them: '24GiB' is 24 x 2^30 bytes, '24GB' 24 x 10^9, which is 22.35 GiB."""

from __future__ import annotations

import re

from densebench.capacities import GIB

_UNITS = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
_DECIMAL = ("KB", "MB", "GB", "TB")


def parse_size(text: str | int) -> int:
    """Bytes of a size such as '24GiB', '24GB', '512 MiB' or 25769803776.

    Raises:
        ValueError: if it is no positive size; the message says what is one.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        if text <= 0:
            raise ValueError(f"memory of {text} bytes; give a positive size, e.g. '24GiB'")
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(
            f"cannot read {str(text)!r} as a size; write e.g. '24GiB' (24 x 2^30 bytes) or '24GB' (24 x 10^9)"
        )
    found = round(float(match[1]) * _UNITS[match[2].upper()])
    if found <= 0:
        raise ValueError(f"a size of {str(text)!r} holds nothing; give a positive one, e.g. '24GiB'")
    return found


def size_note(text: str | int) -> str | None:
    """What a decimal size is in the units of the tables ('24GB = 22.35 GiB'); None where nothing differs."""
    match = re.fullmatch(r"\s*[\d.]+\s*([A-Za-z]+)\s*", str(text))
    if match is None or match[1].upper() not in _DECIMAL:
        return None
    return f"{str(text).strip()} = {parse_size(text) / GIB:.2f} GiB"
