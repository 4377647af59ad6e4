"""Documents for tests of ingestion: texts, files of records, and what became of them."""

from __future__ import annotations

import json

from eclectus.tasks.documents.ingest import IngestSettings, ingest, read_rejected
from eclectus.tasks.documents.table import read_table

GREEK = "Η Ελλάδα είναι χώρα της νοτιοανατολικής Ευρώπης."
TURKISH = "Türkiye'nin başkenti Ankara, en kalabalık şehri İstanbul'dur."
CHINESE = "中国是世界上历史最悠久的国家之一。"


def ingested(store, sources, **settings):
    """The artifact of `ingest`, as the plain function makes it."""
    with store.draft("documents") as out:
        ingest.function(settings=IngestSettings(sources=[str(each) for each in sources], **settings), out=out)
        return store.commit(out)


def lines(*records):
    return b"".join(json.dumps(each, ensure_ascii=False).encode() + b"\n" for each in records)


def rejected(documents):
    """(file, line, reason) of every rejected record."""
    return [(row["file"], row["line"], row["reason"]) for row in read_rejected(documents).to_pylist()]


def texts(documents):
    return read_table(documents)["text"].to_pylist()
