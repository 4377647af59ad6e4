"""The `documents` artifact: a folder of Parquet parts, one row per document, written and read in bounded memory.

Columns: document (id: the first 32 hex digits of the SHA-256 of the text's UTF-8 bytes), name (the record's own id,
or null), work (of which the document is a piece; its own id where it is a whole work: tasks/documents/works.py), text,
language, language_confidence, domain, source, bytes (UTF-8 length), group (original, expanded, other), split (train,
heldout, or apart: in neither). Row order is the order of ingestion.

    documents/part-*.parquet    all columns, as ingested
    labels/part-*.parquet       the columns in LABELS, row by row, as a later step set them; they override the former
    near_duplicates.parquet     pairs of rows and their overlaps, from the split on (tasks/documents/near_duplicates)

A step that only sets labels hard-links the document parts instead of writing the text again: 20 bytes per document.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from eclectus.storage.artifact import Artifact, Draft
from eclectus.tasks.documents.works import works_of
from eclectus.tasks.over_parts import link_or_copy

ROWS_PER_PART = 200_000
ROWS_PER_GROUP = 2_000
SCHEMA = pa.schema(
    [
        ("document", pa.string()),
        ("name", pa.string()),
        ("work", pa.string()),
        ("text", pa.string()),
        ("language", pa.string()),
        ("language_confidence", pa.float32()),
        ("domain", pa.string()),
        ("source", pa.string()),
        ("bytes", pa.int64()),
        ("group", pa.string()),
        ("split", pa.string()),
    ]
)
NEAR_DUPLICATES = "near_duplicates.parquet"
LABELS = ("language", "language_confidence", "group", "split")

Where = Sequence[tuple[str, str, Any]]
"""Conditions that must all hold, as `filters` in pyarrow: (column, "==", value), (column, "in", list), ..."""

TRAINING: Where = (("split", "==", "train"), ("group", "!=", "other"))


class DocumentsWriter:
    """Writes tables of documents into a draft, part by part; `close` leaves at least one part, perhaps an empty one."""

    def __init__(self, out: Draft) -> None:
        self._out = out
        self._writer: pq.ParquetWriter | None = None
        self._rows_in_part = 0
        self.parts = 0
        self.rows = 0

    def write(self, table: pa.Table) -> None:
        """table: any subset of the columns of SCHEMA; the missing ones become null."""
        writer = self._writer
        if writer is None or self._rows_in_part >= ROWS_PER_PART:
            writer = self._next_part()
        writer.write_table(as_rows(table), row_group_size=ROWS_PER_GROUP)
        self._rows_in_part += len(table)
        self.rows += len(table)

    def close(self) -> None:
        writer = self._writer or self._next_part()
        writer.close()
        self._out.rows = self.rows

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _next_part(self) -> pq.ParquetWriter:
        if self._writer is not None:
            self._writer.close()
        path = self._out.file(f"documents/part-{self.parts:05d}.parquet")
        self._writer = pq.ParquetWriter(path, SCHEMA, compression="zstd")
        self.parts += 1
        self._rows_in_part = 0
        return self._writer


def as_rows(table: pa.Table) -> pa.Table:
    """The rows of a part, from any subset of the columns of SCHEMA; the missing ones become null."""
    columns = [
        table[field.name].cast(field.type) if field.name in table.column_names else pa.nulls(len(table), field.type)
        for field in SCHEMA
    ]
    work, document = SCHEMA.names.index("work"), SCHEMA.names.index("document")
    own = pc.fill_null(pc.equal(columns[work], columns[document]), False)
    columns[work] = pc.if_else(own, pa.scalar(None, pa.string()), columns[work])
    return pa.table(columns, schema=SCHEMA)


def parts(documents: Artifact) -> list[Path]:
    return sorted(Path(documents.path).glob("documents/part-*.parquet"))


def first_rows(documents: Artifact) -> np.ndarray:
    """The first row of each part, and the number of all rows: int64 [parts + 1]."""
    counts = [pq.read_metadata(path).num_rows for path in parts(documents)]
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


Labels = Callable[[Path, int, int], dict[str, pa.Array | pa.ChunkedArray]]
"""The new labels of a part, the documents [begin, end): {column of LABELS: values}."""


def relabel(documents: Artifact, labels: dict[str, pa.Array | pa.ChunkedArray] | Labels, out: Draft) -> None:
    """Writes the same documents with other labels: {column of LABELS: values [N]}, or a function that gives those of a
    part; other columns keep their values."""
    schema = pa.schema([SCHEMA.field(name) for name in LABELS])
    begin = 0
    for path in parts(documents):
        link_or_copy(path, out.file(f"documents/{path.name}"))
        end = begin + pq.read_metadata(path).num_rows
        given = (
            labels(path, begin, end) if callable(labels) else {n: labels[n].slice(begin, end - begin) for n in labels}
        )
        unchanged = [name for name in LABELS if name not in given]
        table = read_part_table(path, unchanged) if unchanged else pa.table({})
        columns = [(given if name in given else table)[name].cast(schema.field(name).type) for name in LABELS]
        table = pa.table(columns, schema=schema).combine_chunks()
        pq.write_table(table, out.file(f"labels/{path.name}"), compression="zstd")
        begin = end
    pairs = out.file(NEAR_DUPLICATES)
    if documents.file(NEAR_DUPLICATES).is_file() and not pairs.exists():
        link_or_copy(documents.file(NEAR_DUPLICATES), pairs)
    out.rows = begin


def read_batches(
    documents: Artifact, columns: list[str] | None = None, where: Where = (), rows: int = ROWS_PER_GROUP
) -> Iterator[pa.RecordBatch]:
    """The documents in order, at most `rows` per batch. where: which documents; all by default.

    Row groups without a matching document are not read. Memory: the text of one row group, the other columns of a part.
    """
    for path in parts(documents):
        yield from read_part(path, columns, where, rows)


def read_part(
    path: Path,
    columns: list[str] | None = None,
    where: Where = (),
    rows: int = ROWS_PER_GROUP,
    chosen: np.ndarray | None = None,
    dictionary: Sequence[str] = (),
) -> Iterator[pa.RecordBatch]:
    """`read_batches` of one part. path: of `parts`; its labels are read from the folder beside it.

    chosen: bool [rows of the part], the documents to read. dictionary: columns to give as dictionaries.
    """
    names = columns or SCHEMA.names
    with pq.ParquetFile(path, read_dictionary=list(dictionary)) as file:
        short = _matching_rows(file, path, names, where, dictionary)
        if chosen is not None:
            short = short.filter(pa.array(chosen))
        if "text" not in names:
            yield from short.select(names).combine_chunks().to_batches(rows)
            return
        begin = 0
        for group in range(file.num_row_groups):
            end = begin + file.metadata.row_group(group).num_rows
            first, last = np.searchsorted(short["row"].to_numpy(), (begin, end))
            if last > first:
                part = short.slice(first, last - first)
                texts = file.read_row_group(group, columns=["text"])["text"]
                if len(part) < len(texts):
                    texts = texts.take(pc.subtract(part["row"], begin))
                yield from part.append_column("text", texts).select(names).combine_chunks().to_batches(rows)
            begin = end


def labels_of(path: Path) -> Path | None:
    """The file of labels of a part of documents, if it has one."""
    labels = path.parent.parent / "labels" / path.name
    return labels if labels.is_file() else None


def read_table(documents: Artifact, columns: list[str] | None = None, where: Where = ()) -> pa.Table:
    """The documents in order as one table. Choose the columns: text is large."""
    names = columns or SCHEMA.names
    schema = pa.schema([SCHEMA.field(name) for name in names])
    return pa.Table.from_batches(read_batches(documents, names, where, ROWS_PER_PART), schema)


def read_codes(documents: Artifact, column: str, missing: str = "") -> tuple[np.ndarray, list[str]]:
    """The labels of one column as codes, int64 [N], and the names, sorted, that they index. missing: for null.

    No label is held once per document: a label may be long, and NumPy's strings take 4 bytes per character of the
    longest one for every document.
    """
    parts_of_codes, numbers = [np.empty(0, np.int64)], dict[str, int]()
    for path in parts(documents):
        codes, names = codes_of(read_part_table(path, [column], [column])[column], missing)
        here = [numbers.setdefault(name, len(numbers)) for name in names]
        parts_of_codes.append(np.array(here, np.int64)[codes])
    codes, every = np.concatenate(parts_of_codes), list(numbers)
    used = np.flatnonzero(np.bincount(codes, minlength=len(every))).tolist()
    order = sorted(used, key=every.__getitem__)
    rank = np.zeros(len(every), np.int64)
    rank[order] = np.arange(len(order))
    return rank[codes], [every[number] for number in order]


def codes_of(labels: pa.ChunkedArray, missing: str = "") -> tuple[np.ndarray, list[str]]:
    """Labels as codes, int64 [n], and the names that they index, some of which may not occur. missing: for null."""
    codes, numbers = [np.empty(0, np.int64)], dict[str, int]()
    for chunk in labels.chunks:
        chunk = chunk if pa.types.is_dictionary(chunk.type) else chunk.dictionary_encode()
        names = [*chunk.dictionary.to_pylist(), None]
        here = [numbers.setdefault(missing if name is None else name, len(numbers)) for name in names]
        indices = chunk.indices.fill_null(len(names) - 1).to_numpy(zero_copy_only=False)
        codes.append(np.array(here, np.int64)[indices])
    return np.concatenate(codes), list(numbers)


def read_rows(documents: Artifact, rows: np.ndarray, columns: list[str]) -> pa.Table:
    """These rows, int64 [n] in any order, repeats allowed, without text; a part is read where it has one of them."""
    firsts = first_rows(documents)
    order = np.argsort(rows, kind="stable")
    ends = np.searchsorted(rows[order], firsts)
    found = [pa.schema([SCHEMA.field(name) for name in columns]).empty_table()]
    for number, path in enumerate(parts(documents)):
        here = rows[order[ends[number] : ends[number + 1]]] - firsts[number]
        if len(here):
            found.append(read_part_table(path, columns).take(pa.array(here)))
    places = np.empty(len(order), np.int64)
    places[order] = np.arange(len(order))
    return pa.concat_tables(found).combine_chunks().take(pa.array(places))


def read_ids(documents: Artifact) -> np.ndarray:
    """Ids of all documents in order, bytes [N]."""
    return np.array(read_table(documents, ["document"])["document"].to_pylist(), dtype="S32")


def read_part_table(path: Path, columns: list[str], dictionary: Sequence[str] = (), where: Where = ()) -> pa.Table:
    """These columns of one part of the documents, in order, without text; `row` is the number within the part.

    dictionary: columns to give as codes. where: which documents; all by default.
    """
    with pq.ParquetFile(path, read_dictionary=[name for name in dictionary if name != "work"]) as file:
        return _matching_rows(file, path, columns, where, dictionary).select(columns)


def ids_of(column: pa.ChunkedArray) -> np.ndarray:
    """The documents' ids as 16 bytes each, S16 [n]: those of 32 hexadecimal digits as they are, others hashed."""
    ids = column.cast(pa.binary())
    usual = pc.fill_null(pc.match_substring_regex(column, "^[0-9a-f]{32}$"), False).combine_chunks()
    if usual.false_count:
        pairs = zip(ids.to_pylist(), usual.to_pylist(), strict=True)
        made = [bytes.fromhex(each.decode()) if ok else hashlib.sha256(each or b"").digest()[:16] for each, ok in pairs]
        return np.frombuffer(b"".join(made), "S16")
    chunks = [np.frombuffer(b"".join(chunk.to_pylist()), np.uint8) for chunk in ids.chunks]
    digits = np.concatenate([np.empty(0, np.uint8), *chunks])
    halves = np.where(digits > ord("9"), digits - (ord("a") - 10), digits - ord("0")).astype(np.uint8)
    return ((halves[::2] << 4) | halves[1::2]).view("S16")


def _matching_rows(
    file: pq.ParquetFile, path: Path, names: list[str], where: Where, dictionary: Sequence[str] = ()
) -> pa.Table:
    """`row`, and the columns of one part that are read or tested, without text, of the documents that match.

    dictionary: columns to give as dictionaries where they are labels of a later step.
    """
    tested = {column for column, _, _ in where}
    columns = [name for name in SCHEMA.names if name in {*names, *tested} and name != "text"]
    labels = labels_of(path)
    labelled = [name for name in columns if name in LABELS] if labels else []
    original = [name for name in columns if name not in labelled]
    table = pa.table({"row": np.arange(file.metadata.num_rows)})
    if original:
        table = _with_columns(table, _with_works(file, original) if "work" in original else file.read(original))
    if labels and labelled:
        table = _with_columns(table, pq.read_table(labels, columns=labelled, read_dictionary=list(dictionary)))
    return table.filter(pq.filters_to_expression(list(where))) if where else table


def _with_works(file: pq.ParquetFile, names: list[str]) -> pa.Table:
    """These columns of one part, `work` among them; artifacts made before it have names and sources to tell it by."""
    told_by = ["work"] if "work" in file.schema_arrow.names else ["name", "source"]
    others = [name for name in names if name != "work"]
    table = file.read(list(dict.fromkeys([*others, "document", *told_by])))
    return table.select(others).append_column("work", works_of(table))


def _with_columns(table: pa.Table, more: pa.Table) -> pa.Table:
    for name in more.column_names:
        table = table.append_column(name, more[name])
    return table
