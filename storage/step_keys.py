"""Step keys: which step, settings and inputs made which artifacts, and why a step has to run again.

A key is a SHA-256 over (step, version, settings, digests of the inputs). Its record is one small JSON file, so that a
lookup is one read, without a database, by any number of processes. A second file per label keeps the last key, with
which a new key is compared to report what changed. A third kind says that somebody adopted an artifact for a key: it is
then reused as if the step had made it, with who did so and why as the reason.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from eclectus.storage.artifact import Artifact, ArtifactStore, write_json
from eclectus.storage.errors import EclectusError
from eclectus.storage.secrets import scrubbed

SHOWN = 6
RECORDS, ADOPTED = "records", "adopted"


@dataclass(frozen=True)
class Record:
    """What a step is asked to do, and its outputs once it is done.

    settings: the settings that can change the output, JSON-ready. inputs: name -> `kind-digest` (whole digest).
    outputs: name -> `kind-digest`; empty before the step ran.
    """

    step: str
    version: int
    settings: dict[str, Any]
    inputs: dict[str, str]
    outputs: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        content = [self.step, self.version, self.settings, self.inputs]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Adoption:
    """An artifact that somebody accepted as a step's result, which was made otherwise.

    key: of the step. artifact: `KIND-DIGEST`. label: of the step in its flow. by: the name of who accepted it. since:
    UTC, as in the journal.
    """

    key: str
    artifact: str
    label: str
    by: str
    reason: str
    since: str

    @property
    def words(self) -> str:
        return f"adopted by {self.by} on {self.since[:10]}: {self.reason}"


class KnownKeys:
    """The records under one directory."""

    def __init__(self, root: Path, store: ArtifactStore) -> None:
        self.root = root
        self.store = store

    def find(self, wanted: Record, label: str) -> tuple[dict[str, Artifact] | None, str]:
        """(outputs, why they are reused) if the key is known and its artifacts whole, else (None, why it must run)."""
        outputs, fault = self.expected(wanted), None
        for artifact in (outputs or {}).values():
            fault = fault or self.store.faults(artifact)
        if outputs and not fault:
            return outputs, "same settings and inputs; every file is as it was written"
        if adopted := self.adopted(wanted.key):
            return self._adopted(adopted)
        return None, fault or self._reason(wanted, label)

    def adopted(self, key: str) -> Adoption | None:
        """What was adopted for a key, if anything."""
        path = self._adoption_path(key)
        if self.store.mirror and not self.store.mirror.has(path):
            return None
        value = self._read(path)
        return Adoption(**value) if value else None

    def adopt(self, adoption: Adoption) -> None:
        """Accepts an artifact for a key that has none. Raises EclectusError if the key's own artifact is there."""
        record = self._read(self._record_path(adoption.key))
        if record and not any(self.store.faults(self._artifact(value)) for value in record.outputs.values()):
            raise EclectusError(
                f"step '{adoption.label}' has {_brief_digest(next(iter(record.outputs.values())))} already, made with "
                "exactly these settings and inputs; there is nothing to adopt"
            )
        self._write(self._adoption_path(adoption.key), asdict(adoption))

    def unadopt(self, key: str) -> None:
        """Takes an adoption back; the step runs again when it is next asked for."""
        path = self._adoption_path(key)
        if self.store.mirror:
            self.store.mirror.remove(path)
        path.unlink(missing_ok=True)

    def adoptions(self) -> list[Adoption]:
        """All adoptions, first to last."""
        folder = self.root / ADOPTED
        if self.store.mirror:
            self.store.mirror.pull_changed(folder, ".json")
        found = [self.adopted(path.stem) for path in folder.glob("*.json")]
        return sorted((each for each in found if each), key=lambda each: each.since)

    def _adopted(self, adoption: Adoption) -> tuple[dict[str, Artifact] | None, str]:
        artifact = self._artifact(adoption.artifact)
        if fault := self.store.faults(artifact):
            return None, f"{fault}, which was adopted by {adoption.by}"
        return {"out": artifact}, adoption.words

    def expected(self, wanted: Record) -> dict[str, Artifact] | None:
        """The outputs that a known key had, whether or not they are there and whole."""
        record = self._read(self._record_path(wanted.key))
        return {name: self._artifact(value) for name, value in record.outputs.items()} if record else None

    def last(self, label: str) -> Record | None:
        """The record of the key that `label` last used."""
        noted = self._read(self._label_path(label))
        found: Record | None = self._read(self._record_path(noted["key"])) if noted else None
        return found

    def remember(self, done: Record, label: str) -> None:
        """Records the outputs of a step, and its key as the last one of this label."""
        self._write(self._record_path(done.key), asdict(done))
        self.note(done, label)

    def note(self, done: Record, label: str) -> None:
        """Records that `label` last used this key (after a reuse too).

        A full disk does not end a run here: without the note, the next key is only compared with an earlier one.
        """
        try:
            if self._read(self._label_path(label)) != {"key": done.key}:
                self._write(self._label_path(label), {"key": done.key})
        except OSError as error:
            logging.getLogger("eclectus").warning("the last key of '%s' was not noted: %s", label, error)

    @contextlib.contextmanager
    def hold(self, key: str, when_waiting: Callable[[], None]) -> Iterator[None]:
        """Locks the key, so that two runs never make the same artifact at once; the system releases it if we die."""
        path = self.root / "held" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                when_waiting()
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def _artifact(self, name: str) -> Artifact:
        kind, _, digest = name.partition("-")
        return Artifact(kind, digest, str(self.store.root / kind / digest[:32]))

    def _reason(self, wanted: Record, label: str) -> str:
        before = self.last(label)
        if before is None:
            return "first time"
        # Records are written without secrets, so secrets are hidden before the comparison.
        wanted = Record(wanted.step, wanted.version, scrubbed(wanted.settings), scrubbed(wanted.inputs))
        return "; ".join(differences(before, wanted)) or "the record of it is gone"

    def _write(self, path: Path, value: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, scrubbed(value))
        if self.store.mirror:
            self.store.mirror.push(path)

    def _read(self, path: Path) -> Any:
        # A label's last key or an adoption may be newer on the object store; a record never changes.
        if self.store.mirror and (path.parent.name != RECORDS or not path.exists()):
            self.store.mirror.pull(path)
        try:
            value = json.loads(path.read_text())
        except (FileNotFoundError, ValueError):
            return None
        return Record(**value) if path.parent.name == RECORDS else value

    def _record_path(self, key: str) -> Path:
        return self.root / RECORDS / f"{key}.json"

    def _adoption_path(self, key: str) -> Path:
        return self.root / ADOPTED / f"{key}.json"

    def _label_path(self, label: str) -> Path:
        return self.root / "labels" / f"{hashlib.sha256(label.encode()).hexdigest()[:32]}.json"


def differences(before: Record, after: Record) -> list[str]:
    """Differences as text: `settings.neighbors 20 -> 32`, `input documents 1a2b -> 3c4d`, `version 1 -> 2`."""
    words = []
    if before.version != after.version:
        words.append(f"version {before.version} -> {after.version}")
    for name in sorted(before.settings.keys() | after.settings.keys()):
        old, new = before.settings.get(name), after.settings.get(name)
        if old != new:
            words.append(f"settings.{name} {_brief(old)} -> {_brief(new)}")
    for name in sorted(before.inputs.keys() | after.inputs.keys()):
        old, new = before.inputs.get(name), after.inputs.get(name)
        if old != new:
            words.append(f"input {name} {_brief_digest(old)} -> {_brief_digest(new)}")
    return words if len(words) <= SHOWN else [*words[:SHOWN], f"and {len(words) - SHOWN} more"]


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _brief_digest(name: str | None) -> str:
    if name is None:
        return "none"
    kind, _, digest = name.partition("-")
    return f"{kind}-{digest[:12]}" if digest else name[:60]
