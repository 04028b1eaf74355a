"""Where what costs time to make again is kept: predictions and compiled code."""

from __future__ import annotations

import functools
import os
import stat
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """A folder of this user's that can be written: $XDG_CACHE_HOME/densebench, by default ~/.cache/densebench.

    Where there is no home, or none that can be written, a private one among the temporary files.
    """
    return _writable(os.environ.get("XDG_CACHE_HOME") or None)


@functools.cache
def _writable(base: str | None) -> Path:
    try:
        folder = (Path(base) if base else Path.home() / ".cache") / "densebench"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        return _private_temporary()


def _private_temporary() -> Path:
    user = getattr(os, "getuid", lambda: 0)()
    folder = Path(tempfile.gettempdir()) / f"densebench-{user}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        # What is compiled there is executed: nobody else may have made the folder, or be able to write to it.
        if stat.S_ISDIR(found.st_mode) and found.st_uid == user and not found.st_mode & 0o077:
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="densebench-"))
