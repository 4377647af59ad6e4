"""Ingest: any sources in, one `documents` artifact out; every document is kept, rejected or a duplicate, and counted.

A document's id is the first 32 hex digits of the SHA-256 of its exact text: equal id, equal text. A text that is equal
to an earlier one when both are normalised (tasks/documents/normalise.py: NFC and NFD, case, white space) is an exact
duplicate and is dropped, whatever file it is in; the text that stays is kept as it came. Bad input goes to
`rejected.parquet` with file, line, reason and first characters; `duplicates.parquet` names the document that each
duplicate equals. No bad record is fatal, but to keep no document is an error.

    survey      every source is hashed and cut into slices         tasks/documents/intake/slices.py
    read        slices to candidates, rejected records, keys       read_slices.py, over parts
    compare     keys of all slices to exact duplicates             exact_duplicates.py
    write       candidates to documents parts                      documents_parts.py, over parts

What an earlier run read of a slice is found again, so a corpus that grows costs what is new in it.

A document's domain is its record's field; else it is taken from the file's name (`en.code.jsonl.gz` -> code; shard
numbers and words like `train` are ignored), for text files from the folder's name; else it is "unknown". Its work is
its record's field or follows from its id (tasks/documents/works.py). Memory: a row group's text in each process, and in
this one 16 bytes per duplicate and the keys of a block. Price: 45 CPU seconds per million documents of 450 characters.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from eclectus.storage.artifact import Artifact, Draft
from eclectus.storage.errors import EclectusError
from eclectus.tasks.documents.fingerprints import named
from eclectus.tasks.documents.intake.reading import Read, read_all
from eclectus.tasks.documents.intake.settings import IngestSettings, check_sources
from eclectus.tasks.documents.intake.slices import survey
from eclectus.tasks.documents.intake.writing import Written, write_documents
from eclectus.tasks.documents.sources import Found
from eclectus.tasks.run import metric, notify
from eclectus.tasks.step import CHANGED, step

__all__ = ["IngestSettings", "check_sources", "fingerprint", "ingest", "read_duplicates", "read_rejected"]

MOST_DOMAINS = 100
MOST_PASSED_OVER = 100


def fingerprint(settings: IngestSettings) -> dict[str, str]:
    """Digests of everything that is read, so that changed files change the key. Every run reports what is not read."""
    found = check_sources(settings)
    if found.passed_over:
        notify("files that are not read", _first_passed_over(found))
    surveyed = survey(found.sources, settings.slice_bytes, settings.text_field)
    return named(found.sources, [each.digest for each in surveyed])


@step(makes="documents", version=5, fingerprint=fingerprint)
def ingest(settings: IngestSettings, out: Draft) -> None:
    """Reads the sources into documents. Raises EclectusError if no document is kept."""
    found = check_sources(settings)
    surveyed = survey(found.sources, settings.slice_bytes, settings.text_field)
    read, changed = read_all(surveyed, settings)
    digests = [CHANGED if each.source.name in changed else each.digest for each in surveyed]
    out.read = named(found.sources, digests)
    if changed:
        # The step reads again, or says what does not keep still.
        return
    written = write_documents(read, settings, out)
    if not written.documents:
        raise EclectusError(_nothing_kept(settings, found, out))
    out.rows = written.documents
    out.statistics = _statistics(found, read, written)
    if settings.documents_limit and (expected := _expected(found, read, written)):
        out.statistics["expected_documents"] = expected
    if ignored := out.statistics["labels_ignored"]:
        notify("labels", _labels_ignored(ignored))
    for name in ("documents", "rejected", "duplicates", "bytes"):
        metric(f"ingest_{name}", out.statistics[name])


def _statistics(found: Found, read: list[Read], written: Written) -> dict[str, Any]:
    reasons, ignored = Counter[str](), dict[str, dict[str, Any]]()
    for each in read:
        reasons.update(dict(each.about["reasons"]))
        for field, about in each.about["ignored"]:
            where = ignored.setdefault(field, {"records": 0, "first": each.first_ignored(*about["first"])})
            where["records"] += about["records"]
    return {
        "documents": written.documents,
        "rejected": sum(each.about["rejected"] for each in read),
        "duplicates": written.duplicates,
        "bytes": written.bytes,
        "sources": len(found.sources),
        "ignored_files": found.ignored,
        "passed_over": passed_over(found.passed_over),
        "rejected_by_reason": dict(reasons.most_common()),
        "labels_ignored": ignored,
        "domains": dict(written.domains.most_common(MOST_DOMAINS)),
        "lengths": histogram(written.lengths),
    }


def _expected(found: Found, read: list[Read], written: Written) -> int | None:
    """How many documents all sources would give, from the share of their bytes that was taken.

    None if all was, and for data sets, of which no size is known.
    """
    size, taken = Counter[int](), dict[int, float]()
    for source in found.sources:
        size[source.origin] += source.size
        taken[source.origin] = 0.0
    for each in read:
        taken[each.batch.origin] += each.bytes
    if any(source.kind == "dataset" for source in found.sources) or all(taken[i] >= size[i] for i in size):
        return None
    return round(sum(kept * max(1, size[i] / taken[i]) for i, kept in written.of_entry.items() if taken[i]))


def read_rejected(documents: Artifact) -> pa.Table:
    """The records that `ingest` rejected: file, line, reason, detail, start."""
    return pq.read_table(documents.file("rejected.parquet"))


def read_duplicates(documents: Artifact) -> pa.Table:
    """The exact duplicates that `ingest` dropped: file, line, name, document (the one that was kept)."""
    return pq.read_table(documents.file("duplicates.parquet"))


def histogram(lengths: Counter[int]) -> list[list[int]]:
    """[shortest length in bytes, documents] by power of two: [[256, 12], [512, 30], ...]. lengths: by bit length."""
    return [[2**bits >> 1, lengths[bits]] for bits in sorted(lengths)]


def passed_over(files: dict[str, str]) -> dict[str, Any]:
    """{"counts": {why: files}, "files": {name: why}} of the files that are not read; at most 100 names."""
    counts = dict(Counter(files.values()).most_common())
    return {"counts": counts, "files": dict(list(files.items())[:MOST_PASSED_OVER])}


def _first_passed_over(found: Found) -> str:
    counts = Counter(found.passed_over.values()).most_common(3)
    first = [next(name for name, why in found.passed_over.items() if why == reason) for reason, _ in counts]
    reasons = [f"{number} {why} ('{name}')" for (why, number), name in zip(counts, first, strict=True)]
    more = " ..." if len(set(found.passed_over.values())) > len(counts) else ""
    return f"{len(found.passed_over)} of the sources' files are not read: {'; '.join(reasons)}{more}"


def _labels_ignored(ignored: dict[str, dict[str, Any]]) -> str:
    each = [f"'{field}' of {about['records']:,} records (first {about['first']})" for field, about in ignored.items()]
    return f"Labels that are neither text nor a number count as absent: {'; '.join(each)}."


def _nothing_kept(settings: IngestSettings, found: Found, out: Draft) -> str:
    where = ", ".join(settings.sources[:3]) + (" ..." if len(settings.sources) > 3 else "")
    rejected = pq.read_table(out.file("rejected.parquet"))
    if not len(rejected):
        return f"no document could be read from {where}: {len(found.sources)} files hold no record"
    first = rejected.slice(0, 1).to_pylist()[0]
    line = f", line {first['line']}" if first["line"] else ""
    hint = "; set 'text_field'" if first["reason"] == "no text" else ""
    return (
        f"no document could be read from {where}; {len(rejected)} rejected, the first because "
        f"{first['detail']} ({first['file']}{line}){hint}"
    )
