"""A home on an object store: the same tree under an fsspec URL (`s3://bucket/prefix`), with the local home as its cache.

Steps read and write local files, as without a store. What is finished goes up: an artifact with its manifest last, so that
it is either whole there or absent; the records of keys; journals as they grow. What is missing here comes down when asked for,
beside its place and renamed into it. Credentials and address are the object store's own variables (AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL for MinIO). Price: one upload of every new byte, one listing a query of the lineage.

Left local: `work/` (a machine that takes over a lost one begins the unfinished stage again) and locks: two machines at once may make
the same artifact twice, which is then one artifact, as it is named by its content.
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

SCHEME = "://"


def cache_folder(url: str) -> Path:
    """Where the local copy of a store's home lies: under $ECLECTUS_CACHE or ~/.cache/eclectus, one folder a URL."""
    top = os.environ.get("ECLECTUS_CACHE") or Path.home() / ".cache" / "eclectus"
    return Path(top).absolute() / hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Mirror:
    """The tree at `url` that mirrors the local folder `local`; its methods take paths under `local`."""

    url: str
    local: Path

    def push(self, path: Path, last: str | None = None) -> None:
        """Uploads a file or a whole folder. last: the file of the folder that goes up after all others."""
        files = [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if file.is_file()]
        files.sort(key=lambda file: file.relative_to(path).as_posix() == last)
        with self._faults():
            for file in files:
                self._files.put_file(str(file), self._key(file))

    def pull(self, path: Path) -> bool:
        """Brings a file or a folder here, over nothing that is here already; False if the store has none."""
        with self._faults():
            names = self._files.find(self._key(path))
            if not names:
                return False
            with temporary_path(path) as temporary:
                for name in names:
                    target = temporary / self._below(name, path)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    self._files.get_file(name, str(target))
                with contextlib.suppress(OSError):  # another process downloaded it meanwhile
                    os.rename(temporary, path)
        return path.exists()

    def read(self, path: Path) -> bytes:
        """What the store has at `path`, without bringing it here."""
        with self._faults():
            return self._files.cat_file(self._key(path))

    def pull_changed(self, folder: Path, suffix: str) -> None:
        """Brings every file below `folder` whose name ends in `suffix` and which is not here or is smaller here: journals grow."""
        for path, size in self.listing(folder, suffix):
            if not path.exists() or path.stat().st_size < size:
                path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(path) as temporary, self._faults():
                    self._files.get_file(self._key(path), str(temporary))

    def listing(self, folder: Path, suffix: str) -> Iterator[tuple[Path, int]]:
        """(where it is or would be here, bytes) of the store's files below `folder` whose names end in `suffix`."""
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
        """Raises EclectusError when the store cannot be reached or the bucket is not there."""
        with self._faults():
            bucket = self._root.split("/")[0]
            if bucket and not self._is_there(bucket):
                raise EclectusError(f"home {self.url}: bucket '{bucket}' does not exist; create it")

    @property
    def _files(self) -> Any:
        """The file system; fsspec keeps one a URL and process. Nothing is taken from its listing cache: others write too."""
        import fsspec

        protocol = self.url.partition(SCHEME)[0]
        try:
            return fsspec.filesystem(protocol, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise EclectusError(
                f"home {self.url}: {error}; for s3:// install the extra: pip install 'eclectus[s3]'"
            ) from error

    def _is_there(self, key: str) -> bool:
        """Unlike fsspec's `exists`, which takes a server that does not answer for an absent file."""
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
        """What the store calls `name`, relative to `path`; empty when it is that very file."""
        return name.lstrip("/")[len(self._key(path).lstrip("/")) :].lstrip("/")

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        """Turns what an object store's client raises into one line that names the home and the fix."""
        try:
            yield
        except EclectusError:
            raise
        except Exception as error:
            raise EclectusError(
                f"home {self.url} cannot be used ({type(error).__name__}: {error}); check the bucket, AWS_ENDPOINT_URL and the credentials"
            ) from error
