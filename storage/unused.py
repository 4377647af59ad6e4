"""What steps and workers left below `work/` that nobody uses any more: parts, and files that were downloaded.

A part's folder gets the time of its last use (tasks/part_store.py).
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from eclectus.storage.home import Home

DAY = 86_400
PARTS = "parts"
PART = "part.json"
DOWNLOADED = "downloaded"


def unused_parts(home: Home) -> Iterator[Path]:
    """Folders below `work/` that no run used for a week, or that a killed process left half written a day ago."""
    for pattern in (f"{PARTS}/*/*", f"{DOWNLOADED}/*/*/*"):
        for place in sorted(home.work.glob(pattern)):
            if quiet(place) > (DAY if place.name.startswith(".") else 7 * DAY):
                yield place


def free_cache(home: Home) -> None:
    """Deletes them in the cache of a worker's machine, where nobody runs `eclectus gc`, after four weeks."""
    if home.mirror:
        for place in unused_parts(home):
            if quiet(place) > 28 * DAY:
                shutil.rmtree(place, ignore_errors=True)


def quiet(place: Path) -> float:
    """Seconds since anything in a folder changed."""
    last = 0.0
    for path in (place, *place.rglob("*")):
        with contextlib.suppress(FileNotFoundError):
            last = max(last, path.stat().st_mtime)
    return time.time() - last
