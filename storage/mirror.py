"""A home on an object store: the same tree under an fsspec URL (`s3://bucket/prefix`), with a local home as its cache.

Steps read and write local files, as without a store. Finished files are uploaded: an artifact with its manifest last,
so that it is whole there or absent; the records of keys; journals as they grow. Missing files are downloaded on demand
to a temporary path and renamed. Credentials and address are the object store's own variables (AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL for MinIO). Cost: one upload of every new byte, one listing per lineage query.

A store that is slow, overloaded (503) or away for a moment is asked again, with waits that double up to a minute in
all; files go 16 at a time. A download whose size is not the store's is taken for cut short, and asked for again.

Local only: unfinished training in `work/` (a machine that replaces a lost one starts the unfinished stage again) and
locks: two machines may make the same artifact at once, which is then one artifact, as it is named by its content.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from eclectus.storage.atomic_write import replacing, temporary_path
from eclectus.storage.disk_full import no_room
from eclectus.storage.errors import EclectusError
from eclectus.storage.secrets import scrub

T = TypeVar("T")
SCHEME = "://"
WAITS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Seconds before each new try of a call that failed; the clients' own, which are shorter, come before."""
AT_A_TIME = 16
"""Files on their way at once: a call takes 0.1 to 2 s, most of it waiting."""
# What no second try changes.
REFUSALS = (FileNotFoundError, PermissionError, ImportError, ValueError, TypeError, LookupError, AttributeError)
MISTYPED = ("EndpointConnectionError",)
"""What an address without a server gives; not waited for when a home is opened."""
NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "ParamValidationError")


def cache_folder(url: str) -> Path:
    """The local copy of a store's home: under $ECLECTUS_CACHE or ~/.cache/eclectus, one folder per URL."""
    top = os.environ.get("ECLECTUS_CACHE") or Path.home() / ".cache" / "eclectus"
    return Path(top).absolute() / hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]


def is_below(name: str) -> bool:
    """Whether a file's name in a manifest or an object store stays below the folder that it is relative to."""
    return bool(name) and not name.startswith("/") and ".." not in name.split("/")


@dataclass(frozen=True)
class Mirror:
    """The tree at `url` that mirrors the local folder `local`; its methods take paths under `local`."""

    url: str
    local: Path

    @property
    def name(self) -> str:
        """For messages: the URL without its password."""
        return scrub(self.url)

    def push(self, path: Path, last: str | None = None) -> None:
        """Uploads a file or a whole folder. last: the file of the folder that is uploaded after all others."""
        files = [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if file.is_file()]
        final = [file for file in files if file.relative_to(path).as_posix() == last]
        self._each([file for file in files if file not in final], self._put)
        self._each(final, self._put)

    def pull(self, path: Path, kept: Path | None = None) -> bool:
        """Downloads a file or a folder, unless it is here; False if the store has none. kept: where, if elsewhere."""
        kept = kept or path
        found = self._find(path)
        if not found:
            return False
        with temporary_path(kept) as temporary, self._faults():
            targets = {temporary / self._below(name, path): (name, size) for name, size in found.items()}
            for folder in {target.parent for target in targets}:
                folder.mkdir(parents=True, exist_ok=True)
            self._each(targets, lambda target: self._get(*targets[target], target))
            with contextlib.suppress(OSError):  # another process downloaded it meanwhile
                os.rename(temporary, kept)
        return kept.exists()

    def read(self, path: Path) -> bytes:
        """The store's content of `path`, without downloading it into the cache."""
        content: bytes = self._try(lambda: self._files.cat_file(self._key(path)))
        return content

    def pull_changed(self, folder: Path, suffix: str) -> None:
        """Downloads files below `folder` ending in `suffix` that are missing or smaller here (journals grow)."""
        wanted = {
            path: size for path, size in self.listing(folder, suffix) if not path.exists() or path.stat().st_size < size
        }

        def get(path: Path) -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                # One that is being written may have grown since it was listed.
                self._get(self._key(path), 0, temporary)

        self._each(wanted, get)

    def listing(self, folder: Path, suffix: str) -> Iterator[tuple[Path, int]]:
        """(local path, bytes) of the store's files below `folder` with names ending in `suffix`."""
        for name, size in sorted(self._find(folder).items()):
            if name.endswith(suffix):
                yield folder / self._below(name, folder), size

    def ages(self, folder: Path, name: str) -> Iterator[tuple[Path, float]]:
        """(local path, seconds since it was written) of the store's files below `folder` of this name, where known."""
        found = self._try(lambda: self._files.find(self._key(folder), detail=True))
        for key, about in sorted(found.items()):
            written = about.get("LastModified") or about.get("updated") or about.get("created")
            if key.endswith(f"/{name}") and isinstance(written, datetime.datetime):
                yield folder / self._below(key, folder), time.time() - written.timestamp()

    def has(self, path: Path) -> bool:
        return self._try(lambda: self._is_there(self._key(path)))

    def remove(self, path: Path) -> None:
        """Removes a file or a folder from the store."""

        def remove() -> None:
            with contextlib.suppress(FileNotFoundError):  # also where an earlier try removed it
                if self._is_there(self._key(path)):
                    self._files.rm(self._key(path), recursive=True)

        self._try(remove)

    def check(self) -> None:
        """Raises EclectusError when the store cannot be reached or the bucket does not exist."""
        bucket = self._root.split("/")[0]
        if bucket and not self._try(lambda: self._is_there(bucket), MISTYPED):
            raise EclectusError(f"home {self.name}: bucket '{bucket}' does not exist; create it")

    def _find(self, path: Path) -> dict[str, int]:
        """Names and bytes of the store's files below `path`, or of that very file."""
        found = self._try(lambda: self._files.find(self._key(path), detail=True))
        return {name: about.get("size") or 0 for name, about in found.items()}

    def _put(self, file: Path) -> None:
        self._try(lambda: self._files.put_file(str(file), self._key(file)))

    def _get(self, name: str, size: int, target: Path) -> None:
        """Downloads one file. size: bytes that it must have, at least."""

        def get() -> None:
            self._files.get_file(name, str(target))
            if (come := target.stat().st_size) < size:
                raise ConnectionError(f"of {name} came {come} of {size} bytes")

        self._try(get)

    def _each(self, files: Iterable[Path], act: Callable[[Path], None]) -> None:
        """Calls `act` for every file, many at a time; raises the first error when all have ended."""
        files = list(files)
        if len(files) < 2:
            for file in files:
                act(file)
            return
        with ThreadPoolExecutor(min(AT_A_TIME, len(files))) as pool:
            for _ in pool.map(act, files):
                pass

    def _try(self, call: Callable[[], T], at_once: tuple[str, ...] = ()) -> T:
        """What `call` returns, tried again while the store is overloaded or away. at_once: errors not to wait for."""
        with self._faults():
            for wait in WAITS:
                try:
                    return call()
                except Exception as error:
                    if not _may_pass(error) or type(error).__name__ in at_once:
                        raise
                # Many workers that were refused together do not come back together.
                time.sleep(wait * random.uniform(0.5, 1.0))
            return call()

    @property
    def _files(self) -> Any:
        """The file system; fsspec keeps one per URL and process. Its listing cache is off, since others write too."""
        import fsspec

        protocol = self.url.partition(SCHEME)[0]
        try:
            return fsspec.filesystem(protocol, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise EclectusError(
                f"home {self.name}: {error}; for s3:// install the extra: pip install 'eclectus[s3]'"
            ) from error

    def _is_there(self, key: str) -> bool:
        """Unlike fsspec's `exists`, which takes an unreachable server for a missing file."""
        try:
            self._files.info(key)
        except FileNotFoundError:
            return False
        return True

    @property
    def _root(self) -> str:
        return self.url.partition(SCHEME)[2].rstrip("/")

    def _key(self, path: Path) -> str:
        return f"{self._root}/{path.relative_to(self.local).as_posix()}".removesuffix("/.")

    def _below(self, name: str, path: Path) -> str:
        """The store's `name` relative to `path`; empty when it is that very file."""
        below = name.lstrip("/")[len(self._key(path).lstrip("/")) :].lstrip("/")
        if below and not is_below(below):
            raise EclectusError(f"home {self.name} holds '{name}', whose name leads out of the home; remove it there")
        return below

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        """Turns the errors of an object store's client into one line that names the home and the fix."""
        try:
            yield
        except EclectusError:
            raise
        except Exception as error:
            # Of this machine's disk: downloads are written to it.
            if full := no_room(error, self.local):
                raise full from error
            passing = "; what is finished is kept: run again when the store answers" if _may_pass(error) else ""
            raise EclectusError(
                f"home {self.name} cannot be used ({type(error).__name__}: {error}); "
                f"check the bucket, AWS_ENDPOINT_URL and the credentials{passing}"
            ) from error


def _may_pass(error: Exception) -> bool:
    """Whether a call that failed so may do when it is tried again: not one that the store or this disk refused."""
    if isinstance(error, (EclectusError, *REFUSALS)) or type(error).__name__ in NO_CREDENTIALS:
        return False
    return no_room(error, Path()) is None
