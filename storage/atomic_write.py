"""Writes that are whole or absent: content goes to a temporary path in the same folder, which is then renamed.

Temporary names begin with a dot, so that no glob of ours matches them. Output folders: eclectus.models.staged_folder.
A folder is locked while its process lives, so that what killed processes left is told from what is being written.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path


def write_atomically(path: Path, content: str | bytes, sync: bool = False) -> None:
    """Writes bytes, or text as UTF-8 with its newlines as they are. sync: as in `replacing`."""
    with replacing(path, sync) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def replacing(path: Path, sync: bool = False) -> Iterator[Path]:
    """A temporary path; the file written there replaces `path` at the end of the block, unless the block raises.

    sync: the content is on disk before it has its name.
    """
    with temporary_path(path) as temporary:
        yield temporary
        if sync:
            with open(temporary, "rb") as handle:
                os.fsync(handle.fileno())
        os.replace(temporary, path)


@contextlib.contextmanager
def creating(path: Path) -> Iterator[Path]:
    """As `replacing`, but raises FileExistsError where something has the name by then, and leaves it as it is."""
    with temporary_path(path) as temporary:
        yield temporary
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise
        except OSError:
            # No hard links on this file system.
            if os.path.lexists(path):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
            os.rename(temporary, path)


@contextlib.contextmanager
def temporary_path(path: Path) -> Iterator[Path]:
    """A free path next to `path`; a file or folder that is still there at the end of the block is removed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:6]}")
    try:
        yield temporary
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """As `temporary_path`, a new and empty folder; removes those that killed processes left next to `path` for it."""
    for left in path.parent.glob(f".{path.name}.*"):
        if is_held(left) is False:
            shutil.rmtree(left, ignore_errors=True)
    with temporary_path(path) as folder, locked_folder(folder):
        yield folder


@contextlib.contextmanager
def locked_folder(path: Path) -> Iterator[None]:
    """Creates a folder that `is_held` by this process during the block."""
    opening = path.with_name(f".{path.name}")
    opening.mkdir(parents=True)
    handle = os.open(opening, os.O_RDONLY)
    try:
        # Locked before it has its name: an unlocked one is one whose process is gone.
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.rename(opening, path)
        yield
    finally:
        os.close(handle)
        shutil.rmtree(opening, ignore_errors=True)


def is_held(path: Path) -> bool | None:
    """Whether the process that writes a locked folder is alive; None where locks do not work."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(handle)
    return False
