"""A home on an object store: the same tree under an fsspec URL (`s3://bucket/prefix`), with a local home as its cache.

Steps read and write local files, as without a store. Finished files are uploaded: an artifact with its manifest last,
so that it is whole there or absent; the records of keys; journals as they grow. Missing files are downloaded on demand
to a temporary path and renamed. Credentials and address are the object store's own variables (AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL for MinIO). Cost: one upload of every new byte, one listing per lineage query.

Local only: unfinished training in `work/` (a machine that replaces a lost one starts the unfinished stage again) and
locks: two machines may make the same artifact at once, which is then one artifact, as it is named by its content.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eclectus.storage.atomic_write import replacing, temporary_path
from eclectus.storage.errors import EclectusError
from eclectus.storage.secrets import scrub

SCHEME = "://"


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
        files.sort(key=lambda file: file.relative_to(path).as_posix() == last)
        with self._faults():
            for file in files:
                self._files.put_file(str(file), self._key(file))

    def pull(self, path: Path, kept: Path | None = None) -> bool:
        """Downloads a file or a folder, unless it is here; False if the store has none. kept: where, if elsewhere."""
        kept = kept or path
        with self._faults():
            names = self._files.find(self._key(path))
            if not names:
                return False
            with temporary_path(kept) as temporary:
                for name in names:
                    target = temporary / self._below(name, path)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    self._files.get_file(name, str(target))
                with contextlib.suppress(OSError):  # another process downloaded it meanwhile
                    os.rename(temporary, kept)
        return kept.exists()

    def read(self, path: Path) -> bytes:
        """The store's content of `path`, without downloading it into the cache."""
        with self._faults():
            return self._files.cat_file(self._key(path))

    def pull_changed(self, folder: Path, suffix: str) -> None:
        """Downloads files below `folder` ending in `suffix` that are missing or smaller here (journals grow)."""
        for path, size in self.listing(folder, suffix):
            if not path.exists() or path.stat().st_size < size:
                path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(path) as temporary, self._faults():
                    self._files.get_file(self._key(path), str(temporary))

    def listing(self, folder: Path, suffix: str) -> Iterator[tuple[Path, int]]:
        """(local path, bytes) of the store's files below `folder` with names ending in `suffix`."""
        with self._faults():
            found = self._files.find(self._key(folder), detail=True)
        for name, about in sorted(found.items()):
            if name.endswith(suffix):
                yield folder / self._below(name, folder), about["size"]

    def has(self, path: Path) -> bool:
        with self._faults():
            return self._is_there(self._key(path))

    def remove(self, path: Path) -> None:
        """Removes a file or a folder from the store."""
        with self._faults():
            if self._is_there(self._key(path)):
                self._files.rm(self._key(path), recursive=True)

    def check(self) -> None:
        """Raises EclectusError when the store cannot be reached or the bucket does not exist."""
        with self._faults():
            bucket = self._root.split("/")[0]
            if bucket and not self._is_there(bucket):
                raise EclectusError(f"home {self.name}: bucket '{bucket}' does not exist; create it")

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
            raise EclectusError(
                f"home {self.name} cannot be used ({type(error).__name__}: {error}); "
                "check the bucket, AWS_ENDPOINT_URL and the credentials"
            ) from error
