"""Fingerprints: digests of everything that `ingest` reads, for its key, and of what it did read, to compare.

A file's digest is that of its bytes; a data set's is that of its files, or its commit on the hub. What cannot be read
has a digest of the reason; one that may pass, such as an error of the disk, is never reused by another process. Price:
every local byte is read once (SHA-256, 1 to 2 GB/s per core, all cores).
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from eclectus.storage.errors import EclectusError
from eclectus.tasks.allowed_paths import hash_all_allowed, hash_allowed
from eclectus.tasks.documents.folders import files_below
from eclectus.tasks.documents.sources import Source, parse_dataset
from eclectus.tasks.step import CHANGED

FINGERPRINTS_PER_ENTRY = 64
_PERMANENT = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG)
_THIS_PROCESS = uuid.uuid4().hex[:12]


def fingerprints(sources: Iterable[Source]) -> dict[str, str]:
    """Name -> digest of everything that is read, for the key of a step.

    Raises EclectusError when a data set on the hub cannot be reached.
    """
    sources = list(sources)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return named(sources, list(pool.map(digest_of, sources)))


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


def digest_of(source: Source) -> str:
    if source.kind == "dataset":
        return dataset_digest(source, hub_commit_of(source))
    return file_digest(lambda: hash_allowed(source.path, f"source '{source.name}'"))


def file_digest(hashed: Callable[[], str]) -> str:
    """The digest of a file, or of the reason why it cannot be read. hashed: hex SHA-256 of its bytes."""
    try:
        return f"file-{hashed()}"
    except OSError as error:
        return unreadable_digest(error)


def unreadable_digest(error: OSError) -> str:
    passing = "" if error.errno in _PERMANENT else f"-{_THIS_PROCESS}"
    return f"unreadable-{error.strerror}{passing}"


def hash_open_file(file: io.FileIO) -> str:
    """Hex SHA-256 of all bytes of an open file."""
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()


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
