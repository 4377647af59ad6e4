"""The home's list of forgotten documents, which no later run trains on.

The list is one JSON file, {document: {since, by, reason}}; the journal has an event for every addition. A run leaves
forgotten documents out where instances are packed (`pack_left_out`): their tokens become padding, and every other token
stays where it was, so that what they did not touch is reused as it is.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Collection
from pathlib import Path

from eclectus.storage.artifact import Artifact, write_json
from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.storage.journal import Journal, now
from eclectus.tasks.documents.table import TRAINING, parts, read_part

GROUPS = {"all": ("original", "expanded"), "original": ("original",), "expanded": ("expanded",)}


def forgotten(home: Home) -> dict[str, dict[str, str]]:
    """{document: since, by, reason} of every forgotten document. Raises EclectusError for a list that is damaged."""
    path = _path(home)
    if home.mirror:
        home.mirror.pull(path)
    try:
        found: dict[str, dict[str, str]] = json.loads(path.read_text())
        return found
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise EclectusError(
            f"the list of forgotten documents {path} cannot be read ({error}); put it back from a copy: without it, "
            "runs would train on them again"
        ) from error


def remember_forgotten(home: Home, documents: Collection[str], reason: str, by: str) -> None:
    """Adds documents to the list, and to the journal."""
    known, since = forgotten(home), now()
    added = {each: {"since": since, "by": by, "reason": reason} for each in documents if each not in known}
    with Journal(home.journal, f"forgotten-{uuid.uuid4().hex[:8]}", home.mirror) as journal:
        for each in added:
            journal.event("forgotten", sync=False, name=each, by=by, reason=reason)
    write_json(_path(home), known | added)
    if home.mirror:
        home.mirror.push(_path(home))


def left_out(wanted: Collection[str], documents: Artifact, group: str) -> list[str]:
    """Which of these documents would be packed from an artifact of documents, sorted. group: as in `pack_group`."""
    if not wanted:
        return []
    here = {
        document
        for path in parts(documents)
        for batch in read_part(path, ["document"], (*TRAINING, ("group", "in", list(GROUPS[group]))))
        for document in batch["document"].to_pylist()
    }
    return sorted(here & set(wanted))


def _path(home: Home) -> Path:
    return home.keys / "forgotten.json"
