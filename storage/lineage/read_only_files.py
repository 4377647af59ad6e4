"""Files that DuckDB may read and nothing else: the file system behind `eclectus.storage.lineage.connection.connect`.

DuckDB's own switch (`enable_external_access = false` with `allowed_directories`) still lets COPY, ATTACH and EXPORT write into the
directories that it lets views read. So the connection's local file system is switched off altogether, and views read through
this one (`books:///absolute/path`), which opens files for reading only, and only below its roots. Price: none measured; Parquet
and JSON are read in large blocks.
"""

from __future__ import annotations

import datetime
import glob
import io
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem

from eclectus.storage.journal import DECISIONS, EVENTS, METRICS

PROTOCOL = "books"
PREFIX = f"{PROTOCOL}://"


class ReadOnlyFiles(AbstractFileSystem):
    """Local files below `roots`, symbolic links resolved first. Everything else raises PermissionError.

    replaced: gives the journals and parts, as `events/NAME`, that are not listed any more, since others stand for them.
    """

    protocol = PROTOCOL
    cachable = False

    def __init__(self, roots: list[Path], replaced: Callable[[], set[str]] = set, **options: Any) -> None:
        super().__init__(**options)
        self._replaced = replaced
        self._roots = [os.path.realpath(root) for root in roots]

    def open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        if mode not in ("r", "rb"):
            raise PermissionError(f"the books are read-only: {path} is not written")
        return _File(self._inside(path))

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        place = self._inside(path)
        status = os.stat(place)
        kind = "directory" if os.path.isdir(place) else "file"
        return {
            "name": place,
            "size": status.st_size,
            "type": kind,
            "mtime": status.st_mtime,
            "created": status.st_ctime,
        }

    def modified(self, path: str) -> datetime.datetime:
        return datetime.datetime.fromtimestamp(os.stat(self._inside(path)).st_mtime, datetime.UTC)

    def glob(self, path: str, maxdepth: int | None = None, **_: Any) -> list[str]:
        pattern = self._strip_protocol(path)
        # The part before the first wildcard must lie inside, and so must every match, links and `..` resolved.
        self._inside(pattern[: len(pattern) - len(pattern.lstrip("/"))] + pattern.split("*")[0].strip("/"))
        replaced = self._replaced()
        return sorted(self._inside(found) for found in glob.glob(pattern) if not _belongs_to(found, replaced))

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        place = self._inside(path)
        found = [os.path.join(place, name) for name in sorted(os.listdir(place))]
        return [self.info(each) for each in found] if detail else found

    def _inside(self, path: str) -> str:
        place = os.path.realpath(self._strip_protocol(path))
        if not any(place == root or place.startswith(root + os.sep) for root in self._roots):
            raise PermissionError(f"{path} is not part of the books")
        return place

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return str(path).removeprefix(PREFIX)


def _belongs_to(path: str, names: set[str]) -> bool:
    """Whether a journal or part is one of these, or the index of one."""
    folder, name = path.split(os.sep)[-2:]
    part = name.rpartition("-")[0] + ".parquet"
    return f"{folder}/{name}" in names or any(f"{stream}/{part}" in names for stream in (EVENTS, METRICS, DECISIONS))


class _File(io.RawIOBase):
    """A file for reading that threads may share. DuckDB seeks and then reads, in two calls, from several threads at once: so
    a seek holds for the next read of its own thread, and a read without a seek goes on where the last read of any ended."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.name = place
        self._handle = os.open(place, os.O_RDONLY)
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
