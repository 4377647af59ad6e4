"""One call of `ingest`: reads slices of sources into candidate documents, rejected records, keys and counts.

    piece-*.parquet    candidates, as rows of a documents part; where there is one piece, in that part's row groups
    keys-*.npy         uint64 [n, 3]: digest of the normalised text in two halves, row; sorted
    places-*.npy       int64 [n, 3]: number of the source in the call, line (-1 for none), bytes of text and labels
    ids-*.npy          V16 [n]: documents' ids
    rejected.parquet   rejected records, with their lines from the beginning of the slice

A piece ends when it holds `piece_bytes` of text and labels, so a slice that is larger than it looks, such as a
compressed file, gives many. Nothing here depends on other slices: exact duplicates are found later, among the keys of
all (tasks/documents/intake/exact_duplicates.py). Memory: the text of one row group. Price: 35 CPU seconds per million
documents of 450 characters.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from eclectus.tasks.documents.conversations import FIELDS, as_text
from eclectus.tasks.documents.fingerprints import is_same
from eclectus.tasks.documents.intake.tables import REJECTED, RowGroups
from eclectus.tasks.documents.normalise import id_of, label_of, normalised
from eclectus.tasks.documents.readers import Fault, Position, Record, Slice, brief, read_records, start_of
from eclectus.tasks.documents.sources import Source
from eclectus.tasks.documents.table import ROWS_PER_GROUP, SCHEMA, as_rows
from eclectus.tasks.documents.works import work_of_name

FLUSH_BYTES = 32 * 2**20
UNKNOWN = "unknown"
SHOWN_LABEL = 40
LABELS = ("id", "work", "language", "domain", "source")


@dataclass(frozen=True)
class Fields:
    """Settings of `ingest` that decide what a record becomes."""

    text_field: str
    id_field: str
    language_field: str
    domain_field: str
    source_field: str
    work_field: str
    minimum_characters: int
    maximum_characters: int
    conversations: bool = False

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys([*(getattr(self, f"{name}_field") for name in ("text", *LABELS)), *self.nested]))

    @property
    def nested(self) -> tuple[str, ...]:
        return FIELDS if self.conversations else ()


def read_slices(
    out: Path, sources: list[dict[str, Any]], slices: list[dict[str, Any]], fields: dict[str, Any], most: int,
    piece_bytes: int,
) -> dict[str, Any]:  # fmt: skip
    """Reads each slice of its source, [n] of both, as dictionaries; at most `most` records, all if that is 0.

    Returns the pieces' rows, bytes and last ids, and `changed`: the sources that held something else than their slices'
    digests; `shares`: how much of each slice was taken.
    """
    read_with = Fields(**fields)
    changed, shares, position = list[str](), list[float](), Position()
    with _Intake(read_with, out, piece_bytes) as intake:
        for number, (source, part) in enumerate(zip(map(_source, sources), map(_slice, slices), strict=True)):
            if most and intake.records >= most:
                shares.append(0.0)
                continue
            position = Position()
            columns, longest = read_with.columns, read_with.maximum_characters
            records = read_records(source, read_with.text_field, columns, longest, position, part, read_with.nested)
            with contextlib.closing(records):
                for line, record in records:
                    intake.take(source, number, line, record)
                    if most and intake.records >= most:
                        break
            shares.append(position.share if most else 1.0)
            if not is_same(position.digest, part.digest):
                changed.append(source.name)
    return {
        "pieces": intake.pieces,
        "records": intake.records,
        "lines": position.lines,
        "goes_on": position.goes_on,
        "shares": shares,
        "changed": changed,
        "rejected": intake.rejected.count,
        "reasons": list(intake.reasons.items()),
        "ignored": list(intake.ignored.items()),
    }


def _source(values: Mapping[str, Any]) -> Source:
    return Source(**values)


def _slice(values: Mapping[str, Any]) -> Slice:
    status = values["status"]
    return replace(Slice(**values), status=None if status is None else tuple(status))


@dataclass
class _Candidate:
    source: int
    line: int | None
    digest: bytes
    same: bytes
    weight: int
    row: Record


class _Intake:
    """Accepts records one by one and writes them as candidates or rejected records."""

    def __init__(self, fields: Fields, out: Path, piece_bytes: int) -> None:
        self._fields = fields
        self._pieces = _PieceWriter(out, piece_bytes)
        self._flush_at = min(FLUSH_BYTES, piece_bytes)
        self.rejected = RowGroups(out / "rejected.parquet", REJECTED)
        self._rejected_rows: list[Record] = []
        self._waiting: list[_Candidate] = []
        self._waiting_bytes = 0
        self.records = 0
        self.ignored: dict[str, dict[str, Any]] = {}
        self.reasons: Counter[str] = Counter()

    @property
    def pieces(self) -> list[dict[str, Any]]:
        return self._pieces.pieces

    def take(self, source: Source, number: int, line: int | None, record: Record | Fault) -> None:
        """number: of the source in the call."""
        self.records += 1
        if isinstance(record, Fault):
            self._reject(source, line, record)
            return
        text = as_text(record, self._fields.text_field) if self._fields.conversations else self._held(record)
        if isinstance(text, Fault):
            self._reject(source, line, text)
            return
        content = self._checked(text)
        if isinstance(content, Fault):
            self._reject(source, line, content)
            return
        labels = self._labels(source, line, record)
        digest = hashlib.sha256(content).digest()[:16]
        same = hashlib.sha256(normalised(text).encode()).digest()[:16]
        weight = len(content) + sum(len(label or "") for label in labels.values())
        row = {**labels, "text": text, "bytes": len(content)}
        self._waiting.append(_Candidate(number, line, digest, same, weight, row))
        self._waiting_bytes += weight
        if len(self._waiting) >= ROWS_PER_GROUP or self._waiting_bytes >= self._flush_at:
            self._flush()

    def _labels(self, source: Source, line: int | None, record: Record) -> dict[str, str | None]:
        """name, work, language, domain and source of a record; a label that is none counts as absent."""
        found: dict[str, str | None] = {}
        for label in LABELS:
            field = getattr(self._fields, f"{label}_field")
            try:
                read = id_of if label == "id" else label_of
                found[label] = read(record.get(field), numbers=label != "language")
            except ValueError as reason:
                found[label] = None
                first = [f"{reason}: {brief(record[field])[:SHOWN_LABEL]}", source.name, line]
                self.ignored.setdefault(field, {"records": 0, "first": first})["records"] += 1
        origin = found["source"] or label_of(source.name) or UNKNOWN
        return {
            "name": found["id"],
            "work": found["work"] or label_of(work_of_name(found["id"], origin)),
            "language": found["language"],
            "domain": found["domain"] or label_of(source.domain) or UNKNOWN,
            "source": origin,
        }

    def _held(self, record: Record) -> str | Fault:
        """The text in the record's field, or why there is none."""
        field = self._fields.text_field
        text = record.get(field)
        if not isinstance(text, str):
            if field not in record:
                there = ", ".join(list(map(str, record))[:20]) or "nothing"
                return Fault("no text", f"there is no field '{field}'; the record has {there}", brief(record))
            kind = type(text).__name__
            return Fault("wrong type", f"field '{field}' is of type {kind}; expected a string", brief(text))
        return text

    def _checked(self, text: str) -> bytes | Fault:
        """The text as UTF-8, or why it is rejected."""
        field, fields = self._fields.text_field, self._fields
        characters = len(text)
        if characters > fields.maximum_characters:
            limit = f"{characters:,} characters; at most {fields.maximum_characters:,} are allowed"
            return Fault("too long", limit, start_of(text))
        stripped = len(text.strip())
        if not stripped:
            return Fault("empty", f"field '{field}' holds no text", start_of(text))
        if stripped < fields.minimum_characters:
            limit = f"{stripped:,} characters; at least {fields.minimum_characters:,} are required"
            return Fault("too short", limit, start_of(text))
        try:
            return text.encode()
        except UnicodeEncodeError:
            return Fault("not UTF-8", "the text holds half of a surrogate pair", start_of(text))

    def _reject(self, source: Source, line: int | None, fault: Fault) -> None:
        self.reasons[fault.reason] += 1
        row = {"file": source.name, "line": line, "reason": fault.reason, "detail": start_of(fault.detail)}
        self._rejected_rows.append({**row, "start": fault.start})
        if len(self._rejected_rows) >= ROWS_PER_GROUP:
            self._flush_rejected()

    def _flush_rejected(self) -> None:
        rows, self._rejected_rows = self._rejected_rows, []
        self.rejected.write(pa.Table.from_pylist(rows, schema=REJECTED))

    def _flush(self) -> None:
        waiting, self._waiting, self._waiting_bytes = self._waiting, [], 0
        if not waiting:
            return
        columns: dict[str, list[Any]] = {"document": [each.digest.hex() for each in waiting]}
        for name in waiting[0].row:
            columns[name] = [each.row[name] for each in waiting]
        places = [[each.source, -1 if each.line is None else each.line, each.weight] for each in waiting]
        digests = [b"".join(each) for each in zip(*((one.same, one.digest) for one in waiting), strict=True)]
        self._pieces.write(pa.table(columns), np.array(places, np.int64), *digests)

    def __enter__(self) -> _Intake:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._flush()
            self._flush_rejected()
        for table in (self.rejected, self._pieces):
            # After an error such as a full disk, closing fails as well and would hide the first error.
            with contextlib.suppress(OSError) if kind else contextlib.nullcontext():
                table.close()


class _PieceWriter:
    """Writes candidates into pieces of about `piece_bytes` of text; `pieces`: rows, bytes and last id of each."""

    def __init__(self, out: Path, piece_bytes: int) -> None:
        self._out = out
        self._most = piece_bytes
        self._weight = 0
        self._writer: pq.ParquetWriter | None = None
        self._places: list[np.ndarray] = []
        self._same: list[bytes] = []
        self._ids: list[bytes] = []
        self.pieces: list[dict[str, Any]] = []

    def write(self, table: pa.Table, places: np.ndarray, same: bytes, ids: bytes) -> None:
        """same, ids: 16 bytes of each row, one after another."""
        if self._writer is None or self._weight >= self._most:
            self.close()
            self._weight = 0
            self.pieces.append({"rows": 0, "bytes": 0, "last": ""})
            path = self._out / f"piece-{len(self.pieces) - 1:05d}.parquet"
            self._writer = pq.ParquetWriter(path, SCHEMA, compression="zstd")
        self._writer.write_table(as_rows(table), row_group_size=ROWS_PER_GROUP)
        self._places.append(places)
        self._same.append(same)
        self._ids.append(ids)
        self._weight += int(places[:, 2].sum())
        self.pieces[-1]["rows"] += len(table)
        self.pieces[-1]["last"] = ids[-16:].hex()
        self.pieces[-1]["bytes"] += sum(table["bytes"].to_pylist())

    def close(self) -> None:
        """Ends the present piece."""
        if self._writer is None:
            return
        self._writer.close()
        number = len(self.pieces) - 1
        halves = np.frombuffer(b"".join(self._same), ">u8").reshape(-1, 2).astype(np.uint64)
        order = np.lexsort((halves[:, 1], halves[:, 0]))
        np.save(self._out / f"keys-{number:05d}.npy", np.column_stack([halves[order], order.astype(np.uint64)]))
        np.save(self._out / f"places-{number:05d}.npy", np.concatenate(self._places))
        np.save(self._out / f"ids-{number:05d}.npy", np.frombuffer(b"".join(self._ids), "V16"))
        self._writer, self._places, self._same, self._ids = None, [], [], []
