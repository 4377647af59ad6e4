"""Fingerprints: digests of everything that `ingest` reads, for its key, and of what it did read, to compare.

A file's digest is that of its bytes, of a file over 64 MB that of the digests of its pieces, so that many cores hash
it; a data set's is that of its files, or its commit on the hub. What cannot be read has a digest of the reason; one
that may pass, such as an error of the disk, is never reused by another process. How files are cut and hashed:
tasks/documents/intake/slices.py.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import uuid
from collections.abc import Callable
from pathlib import Path

from eclectus.storage.errors import EclectusError
from eclectus.tasks.allowed_paths import hash_all_allowed
from eclectus.tasks.documents.folders import files_below
from eclectus.tasks.documents.sources import Source, parse_dataset
from eclectus.tasks.step import CHANGED

FINGERPRINTS_PER_ENTRY = 64
PIECE = 64 * 2**20
_PERMANENT = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG)
_THIS_PROCESS = uuid.uuid4().hex[:12]


def named(sources: list[Source], digests: list[str]) -> dict[str, str]:
    """The digests of sources by name; an entry of many files gets one.

    A text file directly in the folder or glob of its entry has the folder's name as domain, so that name is in the key.
    """
    by_origin: dict[int, dict[str, str]] = {}
    result = {}
    for source, digest in zip(sources, digests, strict=True):
        by_origin.setdefault(source.origin, {})[source.name] = digest
        alone = "/" not in source.name.removeprefix(f"{source.origin}/")
        if source.kind == "text" and alone and source.domain:
            result[f"source.{source.origin} domain"] = f"name-{source.domain}"
    for origin, files in by_origin.items():
        if len(files) > FINGERPRINTS_PER_ENTRY:
            changed = CHANGED if CHANGED in files.values() else ""
            listing = hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()
            result[f"source.{origin}.{len(files)}-files"] = changed or f"files-{listing}"
        else:
            result |= {f"source.{origin}.{name}": digest for name, digest in files.items()}
    return result


class ContentHash:
    """The digest of bytes that are given one after another."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._hashed = 0
        self._pieces: list[str] = []

    def update(self, content: memoryview) -> None:
        while content:
            if self._hashed == PIECE:
                self._pieces.append(self._hash.hexdigest())
                self._hash, self._hashed = hashlib.sha256(), 0
            piece = content[: PIECE - self._hashed]
            self._hash.update(piece)
            self._hashed += len(piece)
            content = content[len(piece) :]

    def digest(self) -> str:
        return digest_of_pieces([*self._pieces, self._hash.hexdigest()])


def digest_of_pieces(pieces: list[str]) -> str:
    """The digest of content whose pieces of `PIECE` bytes have these hex SHA-256."""
    if len(pieces) == 1:
        return f"file-{pieces[0]}"
    return f"pieces-{hashlib.sha256(json.dumps(pieces).encode()).hexdigest()}"


def pieces_of(begin: int, end: int) -> list[tuple[int, int]]:
    """Where the pieces of a file's bytes [begin, end) begin and end; one, perhaps empty, at least."""
    return [(start, min(start + PIECE, end)) for start in range(begin, max(end, begin + 1), PIECE)]


def file_digest(digest: Callable[[], str]) -> str:
    """The digest of a file, or of the reason why it cannot be read."""
    try:
        return digest()
    except OSError as error:
        return unreadable_digest(error)


def is_same(digest: str, other: str) -> bool:
    """Whether two digests, perhaps of two processes, are of the same content, or of the same reason for none."""
    own = [each.rpartition("-")[0] if each.count("-") > 1 else each for each in (digest, other)]
    return digest == other or (digest.startswith("unreadable-") and own[0] == own[1])


def unreadable_digest(error: OSError) -> str:
    passing = "" if error.errno in _PERMANENT else f"-{_THIS_PROCESS}"
    return f"unreadable-{error.strerror}{passing}"


def digest_of_open_file(file: io.FileIO) -> str:
    """The digest of all bytes of an open file."""
    file.seek(0)
    content, space = ContentHash(), memoryview(bytearray(2**20))
    while size := file.readinto(space):
        content.update(space[:size])
    return content.digest()


def dataset_digest(source: Source, commit: str | None) -> str:
    """commit: of a data set on the hub; None for a local folder."""
    name, _, config, split = parse_dataset(source.path)
    content: str | list[tuple[str, str]] | None = commit
    if commit is None:
        try:
            files = files_below(Path(name))
            names = [path.relative_to(name).as_posix() for path in files]
            content = list(zip(names, hash_all_allowed(files, f"data set '{name}'"), strict=True))
        except OSError as error:
            return unreadable_digest(error)
    return f"dataset-{hashlib.sha256(json.dumps([content, config, split]).encode()).hexdigest()}"


def hub_commit_of(source: Source) -> str | None:
    """The present commit of a data set on the hub, so that a key changes when the data set does; None if it is local.

    Raises EclectusError when the hub cannot be reached.
    """
    from huggingface_hub import HfApi

    name, revision, _, _ = parse_dataset(source.path)
    if Path(name).is_dir():
        return None
    try:
        return str(HfApi().dataset_info(name, revision=revision, timeout=20).sha)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise EclectusError(
            f"data set '{name}' cannot be reached on the hub ({reason}); check the name, the network and HF_TOKEN, "
            "or give a local path"
        ) from error
