"""Journals as they were written: which there are, and whether a process may still write to one."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from pathlib import Path

from eclectus.storage.artifact import EMPTY
from eclectus.storage.home import Home
from eclectus.storage.journal import EVENTS

QUIET = 86_400.0
LAST_BYTES = 10_000


def journals(home: Home, stream: str) -> list[Path]:
    """Journals by age, without the placeholder."""
    return sorted(path for path in (home.journal / stream).glob("*.ndjson") if not path.stem.startswith(EMPTY))


def finished(path: Path) -> bool:
    """Whether no process will write to this journal any more."""
    with open(path, "rb") as handle:
        if f".{socket.gethostname()}-" in path.name:
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            except OSError:
                return _has_ended(path)
            return True
    return _has_ended(path)


def _has_ended(path: Path) -> bool:
    """Whether a journal without a usable lock has not grown for a day, and its run has ended."""
    events = path.parent.parent / EVENTS / path.name
    if not events.exists():
        return path.parent.name != EVENTS and time.time() - path.stat().st_mtime > QUIET
    if time.time() - max(path.stat().st_mtime, events.stat().st_mtime) < QUIET:
        return False
    with open(events, "rb") as handle:
        handle.seek(-min(events.stat().st_size, LAST_BYTES), os.SEEK_END)
        return b'"run_ended"' in handle.read()
