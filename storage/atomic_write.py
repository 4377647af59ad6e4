"""Writes that are whole or absent: content goes to a temporary path in the same folder, which is then renamed.

Temporary names begin with a dot, so that no glob of ours matches them. Output folders: eclectus.models.staged_folder.
"""

from __future__ import annotations

import contextlib
import errno
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
