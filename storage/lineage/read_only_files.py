"""The read-only file system of DuckDB connections (`eclectus.storage.lineage.connection.connect`).

DuckDB's own setting (`enable_external_access = false` with `allowed_directories`) still lets COPY, ATTACH and EXPORT
write into the directories that views may read. So the connection's local file system is disabled, and views read
through this one (`books://./journal/...`), which opens files for reading only, and only below its folders. No
measurable cost: Parquet and JSON are read in large blocks.
"""

from __future__ import annotations

import datetime
import glob
import io
import os
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem

from eclectus.storage.artifact import EMPTY
from eclectus.storage.journal import DECISIONS, EVENTS, METRICS

PROTOCOL = "books"
PREFIX = f"{PROTOCOL}://"
# What the root is called in views, which are then the same in every home.
ROOT = f"{PREFIX}."


class ReadOnlyFiles(AbstractFileSystem):
    """Local files below the folders of a root, symbolic links resolved first. Others raise PermissionError.

    replaced: returns journals and parts, as `events/NAME`, that are no longer listed, since others replace them.
    runs: only their journals are listed, beside what was compacted (default: all).
    """

    protocol = PROTOCOL
    cachable = False

    def __init__(
        self,
        root: Path,
        folders: list[Path],
        replaced: Callable[[], set[str]] = set,
        runs: Collection[str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._runs = None if runs is None else {EMPTY, *runs}
        self._resolved: set[str] = set()
        self._replaced = replaced
        self._root = root
        self._folders = [os.path.realpath(folder) for folder in folders]

    def open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        if mode not in ("r", "rb"):
            raise PermissionError(f"the lineage is read-only: {path} is not written")
        return _File(self._inside(path))

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        resolved = self._inside(path)
        status = os.stat(resolved)
        kind = "directory" if os.path.isdir(resolved) else "file"
        return {
            "name": resolved,
            "size": status.st_size,
            "type": kind,
            "mtime": status.st_mtime,
            "created": status.st_ctime,
        }

    def modified(self, path: str) -> datetime.datetime:
        return datetime.datetime.fromtimestamp(os.stat(self._inside(path)).st_mtime, datetime.UTC)

    def glob(self, path: str, maxdepth: int | None = None, **_: Any) -> list[str]:
        below = self._strip_protocol(path)
        # The path up to the first wildcard must lie below a folder, and so must every match, links and `..` resolved.
        self._inside(below.split("*")[0].rstrip("/"))
        pattern = os.path.join(glob.escape(str(self._root)), below)
        replaced = self._replaced()
        found = [path for path in glob.glob(pattern) if not _belongs_to(path, replaced)]
        if self._runs is not None and below.endswith(".ndjson"):
            found = [path for path in found if os.path.basename(path).split(".")[0] in self._runs]
        return sorted(map(self._inside, found))

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        resolved = self._inside(path)
        found = [os.path.join(resolved, name) for name in sorted(os.listdir(resolved))]
        return [self.info(each) for each in found] if detail else found

    def _inside(self, path: str) -> str:
        if path in self._resolved:
            return path
        resolved = os.path.realpath(os.path.join(self._root, self._strip_protocol(path)))
        if not any(resolved == folder or resolved.startswith(folder + os.sep) for folder in self._folders):
            raise PermissionError(f"{path} is not part of the lineage")
        # Each journal is asked for several times in each query, and resolving costs a system call per folder above it.
        self._resolved.add(resolved)
        return resolved

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return str(path).removeprefix(PREFIX)


def _belongs_to(path: str, names: set[str]) -> bool:
    """Whether a journal or part is one of these, or the index of one."""
    folder, name = path.split(os.sep)[-2:]
    part = name.rpartition("-")[0] + ".parquet"
    return f"{folder}/{name}" in names or any(f"{stream}/{part}" in names for stream in (EVENTS, METRICS, DECISIONS))


class _File(io.RawIOBase):
    """A file that threads share: DuckDB seeks and then reads, in two calls, from several threads at once.

    Seek positions are per thread; a read without a seek continues at the shared position.
    """

    def __init__(self, resolved: str) -> None:
        super().__init__()
        self.name = resolved
        # What was resolved is no link; one that has become one since is not followed.
        self._handle = os.open(resolved, os.O_RDONLY | os.O_NOFOLLOW)
        self._at = 0
        self._sought = threading.local()

    def read(self, size: int = -1) -> bytes:
        start = getattr(self._sought, "at", None)
        self._sought.at = None
        start = self._at if start is None else start
        if size < 0:
            size = os.fstat(self._handle).st_size - start
        data = os.pread(self._handle, size, start)
        self._at = start + len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.tell(), os.SEEK_END: os.fstat(self._handle).st_size}[whence]
        self._sought.at = base + offset
        return base + offset

    def tell(self) -> int:
        start = getattr(self._sought, "at", None)
        return self._at if start is None else start

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            os.close(self._handle)
        super().close()
