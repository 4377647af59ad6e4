"""Ingest: any sources in, one `documents` artifact out; every document is kept, rejected or a duplicate, and counted.

A document's id is the first 32 hex digits of the SHA-256 of its exact text: equal id, equal text. A text that is equal
to an earlier one when both are normalised (tasks/documents/normalise.py: NFC and NFD, case, white space) is an exact
duplicate and is dropped, whatever file it is in; the text that stays is kept as it came. Bad input goes to
`rejected.parquet` with file, line, reason and first characters; `duplicates.parquet` names the document that each
duplicate equals. No bad record is fatal, but to keep no document is an error. Memory: the text of one row group, and 32
bytes per document (tasks/documents/digest_set.py).

A document's domain is its record's field; else it is taken from the file's name (`en.code.jsonl.gz` -> code; shard
numbers and words like `train` are ignored), for text files from the folder's name; else it is "unknown". Its work is
its record's field or follows from its id (tasks/documents/works.py). Price: one core reads, normalises, hashes and
writes about 20 MB of gzipped JSON lines in many languages per second, and more of ASCII.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, field_validator

from eclectus.storage.artifact import Artifact, Draft
from eclectus.storage.errors import EclectusError
from eclectus.tasks.documents.digest_set import DigestMap
from eclectus.tasks.documents.fingerprints import fingerprints, named
from eclectus.tasks.documents.folders import readable
from eclectus.tasks.documents.normalise import id_of, label_of, normalised
from eclectus.tasks.documents.readers import Fault, Position, Record, brief, read_records, start_of
from eclectus.tasks.documents.sources import Found, Source, find_sources, split_entries
from eclectus.tasks.documents.table import ROWS_PER_GROUP, DocumentsWriter
from eclectus.tasks.documents.works import work_of_name
from eclectus.tasks.run import metric, notify, progress
from eclectus.tasks.settings import BASIC, RuntimeSetting, Settings
from eclectus.tasks.step import step

FLUSH_BYTES = 32 * 2**20
UNKNOWN = "unknown"
MOST_DOMAINS = 100
MOST_PASSED_OVER = 100
SHOWN_LABEL = 40

REJECTED = pa.schema(
    [
        ("file", pa.string()),
        ("line", pa.int64()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("start", pa.string()),
    ]
)
DUPLICATES = pa.schema([("file", pa.string()), ("line", pa.int64()), ("name", pa.string()), ("document", pa.string())])


class IngestSettings(Settings):
    """Which documents are read, and from which fields."""

    sources: list[str] = RuntimeSetting(
        [],
        "Files, folders (read recursively), globs, or dataset:OWNER/NAME[@REVISION][:CONFIG[:SPLIT]]; JSON, Parquet, "
        "CSV with named columns or text, also compressed (.gz, .zst, .bz2, .xz).",
        basic=True,
    )
    text_field: str = Field(
        "text", description="Field or column that holds a document's text.", json_schema_extra=BASIC
    )
    id_field: str = Field("id", description="Field that holds a document's own name, kept for tracing; may be absent.")
    language_field: str = Field("language", description="Field that holds a document's language; may be absent.")
    domain_field: str = Field("domain", description="Field that holds a document's domain; may be absent.")
    source_field: str = Field("source", description="Field that gives a document's source; else the file's name.")
    work_field: str = Field(
        "work",
        description="Field that names the work (book, page, file) of which a document is a piece; pieces of one work "
        "are held out together. If absent, the id up to a final # and number; else each document is a work.",
    )
    text_suffixes: list[str] = Field(
        [".txt", ".md", ".rst"], description="Suffixes of files that are one document each, as plain text."
    )
    minimum_characters: int = Field(1, ge=1, description="Shorter documents are rejected (characters, ends stripped).")
    maximum_characters: int = Field(5_000_000, ge=1, description="Longer documents are rejected (characters).")
    documents_limit: int = Field(
        0, ge=0, description="At most this many documents of each source; 0 takes all.", json_schema_extra=BASIC
    )

    @field_validator("sources", mode="before")
    @classmethod
    def _take_text(cls, value: Any) -> Any:
        """One text is a list separated by commas, as on the command line."""
        entries = split_entries(value) if isinstance(value, str) else value
        for entry in entries if isinstance(entries, list) else ():
            if isinstance(entry, str) and not entry.isascii() and readable(entry) != entry:
                raise ValueError("a name that is not UTF-8 cannot be written down; give its folder or a glob")
        return entries

    def check_together(self) -> None:
        super().check_together()
        check_sources(self)


def check_sources(settings: IngestSettings) -> Found:
    """The files and data sets that the settings name. Raises EclectusError with the fix, before any long work."""
    return find_sources(settings.sources, settings.text_suffixes)


def fingerprint(settings: IngestSettings) -> dict[str, str]:
    """Digests of everything that is read, so that changed files change the key. Every run reports what is not read."""
    found = check_sources(settings)
    if found.passed_over:
        notify("files that are not read", _first_passed_over(found))
    return fingerprints(found.sources)


@step(makes="documents", version=4, fingerprint=fingerprint)
def ingest(settings: IngestSettings, out: Draft) -> None:
    """Reads the sources into documents. Raises EclectusError if no document is kept."""
    found = check_sources(settings)
    with _Intake(settings, out) as intake:
        digests = _read_all(found.sources, settings, intake)
    out.read = named(found.sources, digests)
    if not intake.documents:
        raise EclectusError(_nothing_kept(settings, found, intake))
    out.statistics = {
        "documents": intake.documents,
        "rejected": intake.rejected.count,
        "duplicates": intake.duplicates.count,
        "bytes": intake.bytes,
        "sources": len(found.sources),
        "ignored_files": found.ignored,
        "passed_over": passed_over(found.passed_over),
        "rejected_by_reason": dict(intake.reasons.most_common()),
        "labels_ignored": intake.ignored,
        "domains": dict(intake.domains.most_common(MOST_DOMAINS)),
        "lengths": histogram(intake.lengths),
    }
    if intake.ignored:
        notify("labels", _labels_ignored(intake.ignored))
    for name in ("documents", "rejected", "duplicates", "bytes"):
        metric(f"ingest_{name}", out.statistics[name])


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


def _read_all(sources: list[Source], settings: IngestSettings, intake: _Intake) -> list[str]:
    """Takes in every record. Returns the digests of what was read."""
    fields = ("text", "id", "language", "domain", "source", "work")
    columns = list(dict.fromkeys(getattr(settings, f"{name}_field") for name in fields))
    report_progress, done = progress(sum(source.size for source in sources) or None, "reading", "bytes"), 0
    digests = []
    for source in sources:
        position = Position()
        before = intake.of_origin[source.origin]
        records = read_records(source, settings.text_field, columns, settings.maximum_characters, position)
        with contextlib.closing(records):
            for number, (line, record) in enumerate(records, before + 1):
                if settings.documents_limit and number > settings.documents_limit:
                    break
                intake.of_origin[source.origin] = number
                intake.take(source, line, record)
                if intake.pending == 0:
                    report_progress(done + position.bytes)
        digests.append(position.digest)
        done += source.size
        report_progress(done)
    return digests


@dataclass
class _Candidate:
    file: str
    line: int | None
    digest: bytes
    same: bytes
    row: Record


class _Table:
    """A Parquet file of small rows, written 5,000 at a time."""

    def __init__(self, out: Draft, name: str, schema: pa.Schema) -> None:
        self._writer = pq.ParquetWriter(out.file(name), schema, compression="zstd")
        self._schema = schema
        self._rows: list[Record] = []
        self.count = 0
        self.first: Record | None = None

    def add(self, row: Record) -> None:
        self.first = self.first or row
        self.count += 1
        self._rows.append(row)
        if len(self._rows) >= 5_000:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
            self._rows = []


class _Intake:
    """Accepts records one by one and writes them as documents, rejected records or duplicates."""

    def __init__(self, settings: IngestSettings, out: Draft) -> None:
        self._settings = settings
        self._documents = DocumentsWriter(out)
        self.rejected = _Table(out, "rejected.parquet", REJECTED)
        self.duplicates = _Table(out, "duplicates.parquet", DUPLICATES)
        self._seen = DigestMap()
        self._waiting: list[_Candidate] = []
        self._waiting_bytes = 0
        self.bytes = 0
        self.of_origin: Counter[int] = Counter()
        self.ignored: dict[str, dict[str, Any]] = {}
        self.reasons: Counter[str] = Counter()
        self.domains: Counter[str] = Counter()
        self.lengths: Counter[int] = Counter()

    @property
    def documents(self) -> int:
        return self._documents.rows

    @property
    def pending(self) -> int:
        return len(self._waiting)

    def take(self, source: Source, line: int | None, record: Record | Fault) -> None:
        if isinstance(record, Fault):
            self._reject(source, line, record)
            return
        content = self._text(record)
        if isinstance(content, Fault):
            self._reject(source, line, content)
            return
        labels = self._labels(source, line, record)
        self._waiting.append(
            _Candidate(
                source.name,
                line,
                hashlib.sha256(content).digest()[:16],
                hashlib.sha256(normalised(record[self._settings.text_field]).encode()).digest()[:16],
                {**labels, "text": record[self._settings.text_field], "bytes": len(content)},
            )
        )
        self._waiting_bytes += len(content) + sum(len(label or "") for label in labels.values())
        if len(self._waiting) >= ROWS_PER_GROUP or self._waiting_bytes >= FLUSH_BYTES:
            self._flush()

    def _labels(self, source: Source, line: int | None, record: Record) -> dict[str, str | None]:
        """name, work, language, domain and source of a record; a label that is none counts as absent."""
        found: dict[str, str | None] = {}
        for label in ("id", "work", "language", "domain", "source"):
            field = getattr(self._settings, f"{label}_field")
            try:
                read = id_of if label == "id" else label_of
                found[label] = read(record.get(field), numbers=label != "language")
            except ValueError as reason:
                found[label] = None
                where = f"{source.name}, line {line}" if line else source.name
                first = f"{reason}: {brief(record[field])[:SHOWN_LABEL]} ({where})"
                self.ignored.setdefault(field, {"records": 0, "first": first})["records"] += 1
        origin = found["source"] or label_of(source.name) or UNKNOWN
        return {
            "name": found["id"],
            "work": found["work"] or label_of(work_of_name(found["id"], origin)),
            "language": found["language"],
            "domain": found["domain"] or label_of(source.domain) or UNKNOWN,
            "source": origin,
        }

    def _text(self, record: Record) -> bytes | Fault:
        """The record's text as UTF-8, or why it is rejected."""
        field = self._settings.text_field
        text = record.get(field)
        if not isinstance(text, str):
            if field not in record:
                there = ", ".join(list(map(str, record))[:20]) or "nothing"
                return Fault("no text", f"there is no field '{field}'; the record has {there}", brief(record))
            kind = type(text).__name__
            return Fault("wrong type", f"field '{field}' is of type {kind}; expected a string", brief(text))
        characters = len(text)
        if characters > self._settings.maximum_characters:
            limit = f"{characters:,} characters; at most {self._settings.maximum_characters:,} are allowed"
            return Fault("too long", limit, start_of(text))
        stripped = len(text.strip())
        if not stripped:
            return Fault("empty", f"field '{field}' holds no text", start_of(text))
        if stripped < self._settings.minimum_characters:
            limit = f"{stripped:,} characters; at least {self._settings.minimum_characters:,} are required"
            return Fault("too short", limit, start_of(text))
        try:
            return text.encode()
        except UnicodeEncodeError:
            return Fault("not UTF-8", "the text holds half of a surrogate pair", start_of(text))

    def _reject(self, source: Source, line: int | None, fault: Fault) -> None:
        self.reasons[fault.reason] += 1
        self.rejected.add(
            {
                "file": source.name,
                "line": line,
                "reason": fault.reason,
                "detail": start_of(fault.detail),
                "start": fault.start,
            }
        )

    def _flush(self) -> None:
        waiting, self._waiting, self._waiting_bytes = self._waiting, [], 0
        columns: dict[str, list[Any]] = {"document": []}
        earlier = self._seen.add([each.same for each in waiting], [each.digest for each in waiting])
        for each, kept in zip(waiting, earlier, strict=True):
            if kept is not None:
                name = each.row["name"]
                self.duplicates.add({"file": each.file, "line": each.line, "name": name, "document": kept.hex()})
                continue
            columns["document"].append(each.digest.hex())
            for key, value in each.row.items():
                columns.setdefault(key, []).append(value)
        if columns["document"]:
            self.bytes += sum(columns["bytes"])
            self.domains.update(columns["domain"])
            self.lengths.update(size.bit_length() for size in columns["bytes"])
            self._documents.write(pa.table(columns))

    def __enter__(self) -> _Intake:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._flush()
        for table in (self.rejected, self.duplicates, self._documents):
            # After an error such as a full disk, closing fails as well and would hide the first error.
            with contextlib.suppress(OSError) if kind else contextlib.nullcontext():
                table.close()


def _labels_ignored(ignored: dict[str, dict[str, Any]]) -> str:
    each = [f"'{field}' of {about['records']:,} records (first {about['first']})" for field, about in ignored.items()]
    return f"Labels that are neither text nor a number count as absent: {'; '.join(each)}."


def _nothing_kept(settings: IngestSettings, found: Found, intake: _Intake) -> str:
    where = ", ".join(settings.sources[:3]) + (" ..." if len(settings.sources) > 3 else "")
    first = intake.rejected.first
    if first is None:
        return f"no document could be read from {where}: {len(found.sources)} files hold no record"
    line = f", line {first['line']}" if first["line"] else ""
    hint = "; set 'text_field'" if first["reason"] == "no text" else ""
    return (
        f"no document could be read from {where}; {intake.rejected.count} rejected, the first because "
        f"{first['detail']} ({first['file']}{line}){hint}"
    )
