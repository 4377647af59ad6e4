"""Proofs that a document is, or is not, among those that a checkpoint was trained on.

The set: the documents of all instances upstream of the checkpoint, in this home, by their ids (the first 32 hex digits
of the SHA-256 of the text). Of a base that was fetched nothing more is known than its files. The root of the set's tree
stands in the model card, so that a proof can be checked by whoever has the card (verify_proof.py).
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from eclectus.storage.artifact import Artifact
from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.storage.lineage.connection import connect
from eclectus.tasks.rights.merkle import neighbours, root_and_paths

_DOCUMENTS = """
    select distinct document from documents
    where instances in (select artifact from upstream($1) where kind = 'instances') order by document"""


def training_documents(home: Home, checkpoint: str) -> list[str]:
    """The ids of the documents that a checkpoint was trained on, sorted; none where it was trained elsewhere.

    checkpoint: its digest.
    """
    with connect(home) as connection:
        rows = connection.execute(_DOCUMENTS, [f"checkpoint-{checkpoint}"]).fetchall()
    return [document for (document,) in rows]


def root_of_training(documents: list[str]) -> str | None:
    """The root of the tree of these documents, hex; None without any."""
    return root_and_paths([each.encode() for each in documents])[0].hex() if documents else None


def prove(home: Home, checkpoint: Artifact, named: str) -> dict[str, Any]:
    """A proof for a document, JSON-ready. named: a file with its text, or its id.

    A file whose bytes are no document is looked for once more without the line break at its end, which editors add.
    Raises EclectusError for a checkpoint of whose training documents nothing is known, and for a file that is not
    there.
    """
    if checkpoint.kind != "checkpoint":
        raise EclectusError(f"{checkpoint.name} is no checkpoint; it is of kind {checkpoint.kind}")
    ids = _ids_of(named)
    documents = training_documents(home, checkpoint.digest)
    if not documents:
        raise EclectusError(
            f"nothing is known of the documents that {checkpoint.name} was trained on: no instances of this home are "
            "upstream of it"
        )
    known = set(documents)
    document = next((each for each in ids if each in known), ids[0])
    leaves, leaf = [each.encode() for each in documents], document.encode()
    root, paths = root_and_paths(leaves, neighbours(leaves, leaf))
    return {
        "checkpoint": f"checkpoint-{checkpoint.digest}",
        "document": document,
        "member": leaves[paths[0].index] == leaf,
        "root": root.hex(),
        "leaves": len(leaves),
        "paths": [
            {"leaf": documents[path.index], "index": path.index, "siblings": [each.hex() for each in path.siblings]}
            for path in paths
        ],
    }


def _ids_of(named: str) -> list[str]:
    if re.fullmatch("[0-9a-fA-F]{32}|[0-9a-fA-F]{64}", named) and not Path(named).exists():
        return [named.lower()[:32]]
    try:
        content = Path(named).read_bytes()
        return [hashlib.sha256(each).hexdigest()[:32] for each in (content, content.rstrip(b"\r\n"))]
    except OSError as error:
        raise EclectusError(
            f"{named} cannot be read ({error.strerror}); give a file with the document's text, or its id"
        ) from error
