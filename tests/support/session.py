"""What one test session makes once, for all of its worker processes (pytest-xdist)."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

# Set by tests/conftest.py: a temporary folder that all worker processes of this session share.
FOLDER: Path | None = None


def make_once(name: str, make: Callable[[Path], None]) -> Path:
    """The folder that `make(folder)` has filled. The first caller makes it; others wait for it, then read it only."""
    assert FOLDER is not None, "tests/conftest.py sets the session's folder"
    folder = FOLDER / name
    with open(FOLDER / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            unfinished = FOLDER / f"{name}.{os.getpid()}"
            unfinished.mkdir()
            make(unfinished)
            unfinished.rename(folder)
    return folder
