"""Artifacts: immutable, content-addressed directories with a manifest.

A draft is a directory in the same store. `commit` hashes its files, writes `manifest.json` last and renames the whole
directory into place, so that an artifact is either whole or absent. The digest is a SHA-256 over the kind, the schema
version and every file's name, size and SHA-256; statistics are not in it, so that equal content has one name.
Cost: one read of every file at commit and at `verify`, about 1 to 2 GB/s per core.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eclectus.storage.atomic_write import is_held, locked_folder, write_atomically
from eclectus.storage.commands import command
from eclectus.storage.errors import DamagedArtifact, EclectusError
from eclectus.storage.mirror import Mirror, is_below
from eclectus.storage.secrets import scrubbed
from eclectus.storage.tags import Tags, is_tag

KINDS = (
    "documents",
    "embeddings",
    "neighbors",
    "grouping",
    "tokenizer",
    "instances",
    "checkpoint",
    "evaluation",
    "report",
)
SCHEMA = 1
MANIFEST = "manifest.json"
# A file that changed this long ago has another time stamp when it changes again; some file systems count in 2 seconds.
SETTLED_SECONDS = 3
MOST_HASHED = 100_000
EMPTY = "none"
MANIFEST_FIELDS = {"kind", "digest", "schema", "created", "rows", "bytes", "statistics", "files", "seal"}


@dataclass(frozen=True)
class Artifact:
    """A reference to an artifact: passed between steps instead of data.

    kind: one of `KINDS`. digest: hex SHA-256 of the content. path: the directory on this machine.
    """

    kind: str
    digest: str
    path: str

    @property
    def name(self) -> str:
        """Short name for users: `checkpoint-1a2b3c4d5e6f`."""
        return f"{self.kind}-{self.digest[:12]}"

    def file(self, name: str) -> Path:
        return Path(self.path) / name

    def manifest(self) -> dict[str, Any]:
        """The manifest written at commit: kind, digest, schema, created, rows, statistics, files."""
        return read_manifest(Path(self.path))

    @property
    def statistics(self) -> dict[str, Any]:
        return self.manifest()["statistics"]

    def digests(self) -> dict[str, str]:
        """Hex SHA-256 of each file, by name."""
        return {file["name"]: file["sha256"] for file in self.manifest()["files"]}


@dataclass
class Draft:
    """A directory being written: files under `path`, then `rows` and `statistics`; the step decorator commits it.

    read: digests of what the step read besides artifacts, hashed while it was read and named as in its fingerprint, so
    that the artifact is never stored under a key that is not true of it. None if the step does not report it.
    """

    kind: str
    path: Path
    rows: int | None = None
    statistics: dict[str, Any] = field(default_factory=dict)
    read: dict[str, str] | None = None

    def file(self, name: str) -> Path:
        """Path of a new file; its folders are created. Raises EclectusError for a name that leads out of the draft."""
        path = self.path / name
        if not path.resolve().is_relative_to(self.path.resolve()):
            raise EclectusError(f"'{name}' leads out of its artifact; nothing was written")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


class ArtifactStore:
    """The artifacts under one root directory: `<root>/<kind>/<first 32 digits of the digest>/`."""

    def __init__(self, root: Path | str, mirror: Mirror | None = None) -> None:
        """mirror: the object store to which artifacts are uploaded and from which missing ones are downloaded."""
        self.root = Path(root).absolute()
        self.mirror = mirror

    @contextlib.contextmanager
    def draft(self, kind: str) -> Iterator[Draft]:
        """An empty draft; an uncommitted one is removed at the end of the block, or after a kill by the next draft."""
        if kind not in KINDS:
            raise EclectusError(f"artifact kind '{kind}' is unknown; the kinds are {', '.join(KINDS)}")
        drafts = self.root / ".drafts"
        for left in drafts.glob(f"{kind}-{socket.gethostname()}-*"):
            if draft_is_held(left) is False:
                shutil.rmtree(left, ignore_errors=True)
        path = drafts / f"{kind}-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        try:
            with locked_folder(path):
                yield Draft(kind, path)
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def commit(self, draft: Draft) -> Artifact:
        """Makes the draft an artifact. Where the same content is already stored and whole, the draft is dropped."""
        files = _hash_files(draft.path)
        if not files:
            raise EclectusError(f"the step wrote no file into its {draft.kind} artifact; nothing was kept")
        digest = content_digest(draft.kind, files)
        place = self.place(draft.kind, digest)
        artifact = Artifact(draft.kind, digest, str(place))
        if place.exists():
            if not self.faults(artifact):
                if self.mirror and not self.mirror.has(place / MANIFEST):
                    self.mirror.push(place, last=MANIFEST)
                return artifact
            self._quarantine(place)
        manifest = {
            "kind": draft.kind,
            "digest": digest,
            "schema": SCHEMA,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "rows": draft.rows,
            "bytes": sum(file["bytes"] for file in files),
            "statistics": scrubbed(draft.statistics),
            "files": files,
        }
        write_json(draft.path / MANIFEST, {**manifest, "seal": seal(manifest)})
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(draft.path, place)
        except OSError:
            # Another process committed the same content between the check and the rename.
            if self.faults(artifact):
                raise
        _fsync_directory(place.parent)
        if self.mirror:
            self.mirror.push(place, last=MANIFEST)
        return artifact

    @property
    def tags(self) -> Tags:
        """The names that users gave to artifacts."""
        return Tags(self.root / ".tags", self.mirror)

    def find(self, name: str) -> Artifact:
        """The artifact with this name (`kind-digits`), digest or start of a digest, tag (`greek@2`), or path.

        Raises EclectusError when none or several match.
        """
        path = Path(name)
        if (path / MANIFEST).is_file():
            manifest = read_manifest(path)
            return Artifact(manifest["kind"], manifest["digest"], str(path.absolute()))
        name = self.tags.find(name) or name
        kind, _, digits = name.rpartition("-")
        digits = digits.lower()
        if (kind and kind not in KINDS) or not re.fullmatch("[0-9a-f]{1,64}", digits):
            raise EclectusError(
                f"'{name}' names no artifact; expected KIND-DIGITS, a digest, a tag such as greek@2, or an artifact's "
                "directory"
            )
        pattern = f"{kind or '[!.]*'}/{digits[:32]}*"
        self._pull_all(pattern)
        found = []
        for place in self.root.glob(pattern):
            if (place / MANIFEST).is_file() and read_manifest(place)["digest"].startswith(digits):
                found.append(place)
        if len(found) != 1:
            count = "no artifact" if not found else f"{len(found)} artifacts"
            home = self.mirror.url if self.mirror else self.root.parent
            raise EclectusError(
                f"{count} under {self.root} match '{name}'; see: {command('sql', 'from artifacts', home=home)}"
            )
        return self.find(str(found[0]))

    def find_whole(self, name: str) -> Artifact:
        """As `find`. Raises EclectusError also when a byte is not as it was committed."""
        artifact = self.find(name)
        if fault := self.faults(artifact):
            raise EclectusError(f"{fault}; put it back from a copy, or make it again: run what made it")
        return artifact

    def faults(self, artifact: Artifact) -> str | None:
        """Why this artifact cannot be used, as a message, or None if every byte is as committed.

        A missing or damaged one is first downloaded from the object store, where there is one.
        """
        fault = self._faults(artifact)
        if fault and self.mirror and self.mirror.has(Path(artifact.path) / MANIFEST):
            if Path(artifact.path).exists():
                self._quarantine(Path(artifact.path))
            self.mirror.pull(Path(artifact.path))
            fault = self._faults(artifact)
        return fault

    def _faults(self, artifact: Artifact) -> str | None:
        place = Path(artifact.path)
        if not place.is_dir():
            return f"{artifact.name} is gone"
        try:
            manifest = read_manifest(place)
        except DamagedArtifact as error:
            return f"{artifact.name} is damaged: {error}"
        for file in manifest["files"]:
            path = place / file["name"]
            if not path.is_file():
                return f"{artifact.name} is damaged: {file['name']} is gone"
            if path.stat().st_size != file["bytes"]:
                return f"{artifact.name} is damaged: {file['name']} changed"
        try:
            digests = hash_all(place / file["name"] for file in manifest["files"])
        except OSError as error:
            return f"{artifact.name} is damaged: {error.filename} cannot be read ({error.strerror})"
        for file, digest in zip(manifest["files"], digests, strict=True):
            if digest != file["sha256"]:
                return f"{artifact.name} is damaged: {file['name']} changed"
        sealed = manifest.pop("seal", "")
        if content_digest(manifest["kind"], manifest["files"]) != artifact.digest or sealed != seal(manifest):
            return f"{artifact.name} is damaged: {MANIFEST} changed"
        return None

    def all(self) -> Iterator[Artifact]:
        """Every artifact under the root, in order of kind and digest."""
        self._pull_all("[!.]*/*")
        for manifest in sorted(self.root.glob(f"[!.]*/*/{MANIFEST}")):
            yield self.find(str(manifest.parent))

    def strays(self) -> list[str]:
        """A message per directory without a manifest: half of a copy, or a lost manifest."""
        places = [
            place for place in sorted(self.root.glob("[!.]*/*")) if place.is_dir() and not place.name.startswith(EMPTY)
        ]
        return [
            f"{place} is no whole artifact: {MANIFEST} is gone" for place in places if not (place / MANIFEST).exists()
        ]

    def _pull_all(self, pattern: str) -> None:
        """Downloads the store's whole artifacts that match `<kind>/<digits>` and are missing here."""
        if not self.mirror:
            return
        for manifest, _ in self.mirror.listing(self.root, MANIFEST):
            place = manifest.parent
            if not place.exists() and place.relative_to(self.root).match(pattern):
                self.mirror.pull(place)

    def place(self, kind: str, digest: str) -> Path:
        """The directory of an artifact, whether or not it is there."""
        return self.root / kind / digest[:32]

    def _quarantine(self, place: Path) -> None:
        target = self.root / ".damaged" / f"{place.parent.name}-{place.name}-{uuid.uuid4().hex[:6]}"
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(place, target)


def is_checkpoint_name(text: str) -> bool:
    """Whether a text names a checkpoint of a home, `checkpoint-1a2b3c4d` or a tag, and no folder that is there."""
    named = is_tag(text) or re.fullmatch("checkpoint-[0-9a-f]{4,64}", text) is not None
    return named and not Path(text).exists()


def draft_is_held(path: Path) -> bool | None:
    """Whether the process that writes a draft is alive; None on another machine, or where locks do not work."""
    if f"-{socket.gethostname()}-" not in path.name:
        return None
    return is_held(path)


def content_digest(kind: str, files: list[dict[str, Any]]) -> str:
    content = [kind, SCHEMA, [[file["name"], file["bytes"], file["sha256"]] for file in files]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def seal(manifest: dict[str, Any]) -> str:
    """Hex SHA-256 over everything else in a manifest, statistics too, so that any change is detected."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def hash_unchanged(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read once per process for as long as the file is not written.

    Whoever writes into a file, or puts another one in its place, changes its inode or its change time, which no program
    can set back. A file that changed just now is read again every time: its next change may have the same times. One
    that `link` gave another name has changed too, but is known. Names of one file count as one.
    """
    status = os.stat(path)
    known = _HASHED.get(_identity(status))
    if known is None:
        known = hash_file(path)
        if is_settled(status):
            _remember(status, known)
    return known


def link(source: Path, target: Path) -> None:
    """Gives a file another name, a hard link. What `hash_unchanged` knows of it stays known. Raises OSError."""
    status = os.stat(source)
    digest = hash_unchanged(source)
    unchanged = _identity(os.stat(source)) == _identity(status)
    os.link(source, target)
    linked = os.stat(target)
    if unchanged and _identity(linked)[:-1] == _identity(status)[:-1]:
        _remember(linked, digest)


_HASHED: dict[tuple[int, ...], str] = {}
"""Digests of files, by `_identity`."""


def _identity(status: os.stat_result) -> tuple[int, ...]:
    """What changes with a file: device, inode, size, times of its last modification and of its last change."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _remember(status: os.stat_result, digest: str) -> None:
    if len(_HASHED) >= MOST_HASHED:
        _HASHED.clear()
    _HASHED[_identity(status)] = digest


def hash_all(paths: Iterable[Path]) -> list[str]:
    """`hash_unchanged` of each file, by all cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(hash_unchanged, paths))


def is_settled(status: os.stat_result) -> bool:
    """Whether a later change of the file shows in its times: they are not those of this moment."""
    return max(status.st_mtime, status.st_ctime) < time.time() - SETTLED_SECONDS


def read_manifest(place: Path) -> dict[str, Any]:
    """The manifest of the artifact in a directory. Raises DamagedArtifact when it is missing or not readable."""
    try:
        manifest = json.loads((place / MANIFEST).read_text())
        if not manifest.keys() >= MANIFEST_FIELDS:
            raise ValueError(f"it lacks {', '.join(sorted(MANIFEST_FIELDS - manifest.keys()))}")
        if wrong := [file["name"] for file in manifest["files"] if not is_below(file["name"])]:
            raise ValueError(f"it names {wrong[0]!r}, which is outside the artifact")
        return manifest
    except (OSError, ValueError, AttributeError, LookupError, TypeError) as error:
        raise DamagedArtifact(f"{place} is no whole artifact: {MANIFEST} cannot be read ({error})") from error


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically, synced."""
    write_atomically(path, json.dumps(value, indent=1, sort_keys=True), sync=True)


def _hash_files(root: Path) -> list[dict[str, Any]]:
    paths = sorted(path for path in root.rglob("*") if path.is_file() and path != root / MANIFEST)
    return [
        {"name": path.relative_to(root).as_posix(), "bytes": path.stat().st_size, "sha256": hash_unchanged(path)}
        for path in paths
    ]


def _fsync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
