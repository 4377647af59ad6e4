"""Output folders and files that appear whole or not at all: written next to the target, then renamed.

A folder is staged in `.NAME.RANDOM.partial`, a name of its own, so that two writers of one target do not meet, and only
the one that made it removes it. The last step is one rename, which the file system refuses where the target is not
empty: what somebody else wrote there meanwhile stays. A killed process leaves its staging folder; `left_behind` lists
such folders, and nobody but the user removes them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path


def require_new_folder(out_dir: Path) -> None:
    """Raises ValueError when `out_dir` is a file, a folder with anything in it, or cannot be looked at."""
    try:
        taken = out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir()))
    except OSError as error:
        raise ValueError(f"{out_dir} cannot be created ({error}): choose another place") from error
    if taken:
        raise ValueError(f"{out_dir} exists already: remove it or choose another place")


@contextlib.contextmanager
def staged_folder(out_dir: Path) -> Iterator[Path]:
    """An empty folder that becomes `out_dir` at the end of the block, and is removed when the block raises.

    A link is followed, and missing parents are created. Raises ValueError when `out_dir` is not new or empty, at the
    start or at the end, when its parent cannot be written to, and when the disk is full.
    """
    require_new_folder(out_dir)
    target = Path(os.path.realpath(out_dir))
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.partial")
    created = [parent for parent in target.parents if not parent.exists()]
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"{out_dir} cannot be created ({error}): choose another place") from error
    try:
        yield partial
        _publish(partial, target, out_dir)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(f"the disk of {out_dir} is full ({error}); nothing was written, free some space") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in created:
            with contextlib.suppress(OSError):
                parent.rmdir()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A free path next to `path`; the file written there replaces `path` at the end of the block, unless it raises."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def left_behind(out_dir: Path) -> list[Path]:
    """Staging folders of `out_dir`: of killed processes, or of ones that are writing now."""
    target = Path(os.path.realpath(out_dir))
    return sorted(target.parent.glob(f".{_escaped(target.name)}.{'[0-9a-f]' * 12}.partial"))


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _publish(partial: Path, target: Path, out_dir: Path) -> None:
    try:
        # Replaces an empty folder, and nothing else.
        os.rename(partial, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise ValueError(
                f"{out_dir} was written by another process meanwhile; it stays as it is, and this result was dropped"
            ) from error
        raise
