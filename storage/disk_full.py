"""A full disk, in one line that names folder, machine and disk, whoever noticed: Python, Arrow, NumPy or a worker."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
from pathlib import Path

from eclectus.storage.errors import EclectusError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class NoRoom(EclectusError):
    """A disk that takes no more. node: Ray's name of the machine, where a worker met it."""

    node: str = ""


def why_full(error: BaseException) -> str | None:
    """The reason why no more can be written, if the error says so; libraries in Rust and C++ give it as text only."""
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return os.strerror(error.errno).lower()
    full = os.strerror(errno.ENOSPC)
    # NumPy's tofile reports only how much it wrote.
    cut = isinstance(error, OSError) and error.errno is None and re.search(r"\d+ requested and \d+ written", str(error))
    return full.lower() if full in str(error) or cut else None


def no_room(error: BaseException, folder: Path) -> NoRoom | None:
    """The error to raise in place of one that says that nothing more can be written; None for any other.

    folder: where was written, unless the error names a file that is elsewhere.
    """
    if isinstance(error, NoRoom):
        return error
    if (reason := why_full(error)) is None:
        return None
    named = getattr(error, "filename2", None) or getattr(error, "filename", None)
    place = Path(named).absolute().parent if isinstance(named, str | Path) else folder
    if place.is_relative_to(folder):
        place = folder
    return NoRoom(f"{reason}: {place} on {socket.gethostname()} ({_disk(place)})")


def _disk(place: Path) -> str:
    while not place.exists():
        place = place.parent
    usage = shutil.disk_usage(place)
    while not place.is_mount():
        place = place.parent
    return f"disk {place}, {usage.free / 1e9:.2f} of {usage.total / 1e9:.2f} GB free"
