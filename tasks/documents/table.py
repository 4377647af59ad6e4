"""The `documents` artifact: a folder of Parquet parts, one row a document, written and read in bounded memory.

Columns: document (id: the first 32 hex digits of the SHA-256 of the text's UTF-8 bytes), name (what its owner calls it: the
record's own id, or null), text, language, language_confidence, domain, source, bytes
(UTF-8 length), group (original, expanded, other), split (train, heldout, apart: in neither). Row order is the order of
ingestion throughout.

    documents/part-*.parquet    everything, as written first
    labels/part-*.parquet       row by row beside it, the columns in LABELS as a later step judged them; they win

A step that only labels documents links the parts instead of writing text again, so that it costs 20 bytes a document.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from eclectus.storage.artifact import Artifact, Draft

ROWS_A_PART = 200_000
ROWS_A_GROUP = 2_000
SCHEMA = pa.schema(
    [
        ("document", pa.string()),
        ("name", pa.string()),
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
LABELS = ("language", "language_confidence", "group", "split")


class DocumentsWriter:
    """Writes tables of documents into a draft, part by part; `close` leaves at least one (perhaps empty) part."""

    def __init__(self, out: Draft) -> None:
        self._out = out
        self._writer: pq.ParquetWriter | None = None
        self._rows_in_part = 0
        self.parts = 0
        self.rows = 0

    def write(self, table: pa.Table) -> None:
        """table: any subset of the columns of SCHEMA; the missing ones become null."""
        if self._writer is None or self._rows_in_part >= ROWS_A_PART:
            self._next_part()
        columns = [
            table[field.name].cast(field.type) if field.name in table.column_names else pa.nulls(len(table), field.type)
            for field in SCHEMA
        ]
        self._writer.write_table(pa.table(columns, schema=SCHEMA), row_group_size=ROWS_A_GROUP)
        self._rows_in_part += len(table)
        self.rows += len(table)

    def close(self) -> None:
        if self._writer is None:
            self._next_part()
        self._writer.close()
        self._out.rows = self.rows

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _next_part(self) -> None:
        if self._writer is not None:
            self._writer.close()
        path = self._out.file(f"documents/part-{self.parts:05d}.parquet")
        self._writer = pq.ParquetWriter(path, SCHEMA, compression="zstd")
        self.parts += 1
        self._rows_in_part = 0


def parts(documents: Artifact) -> list[Path]:
    return sorted(Path(documents.path).glob("documents/part-*.parquet"))


def relabel(documents: Artifact, labels: dict[str, pa.Array | pa.ChunkedArray], out: Draft) -> None:
    """Writes the same documents with other labels: {column of LABELS: values [N]}; the columns not named stay as they are."""
    unchanged = [name for name in LABELS if name not in labels]
    table = read_table(documents, unchanged) if unchanged else pa.table({})
    row = 0
    for path in parts(documents):
        target = out.file(f"documents/{path.name}")
        try:
            os.link(path, target)
        except OSError:
            shutil.copyfile(path, target)
        count = pq.read_metadata(path).num_rows
        columns = {name: (labels if name in labels else table)[name].slice(row, count) for name in LABELS}
        schema = pa.schema([SCHEMA.field(name) for name in LABELS])
        cast = [column.cast(SCHEMA.field(name).type) for name, column in columns.items()]
        pq.write_table(pa.table(cast, schema=schema), out.file(f"labels/{path.name}"), compression="zstd")
        row += count
    out.rows = row


def read_batches(
    documents: Artifact, columns: list[str] | None = None, where: pc.Expression | None = None, rows: int = ROWS_A_GROUP
) -> Iterator[pa.RecordBatch]:
    """The documents in order, a batch at a time. where: for example `pc.field("split") == "train"`.

    Row groups without a document that is wanted are not read. Memory: a row group's text, and a part's other columns.
    """
    names = columns or SCHEMA.names
    for path in parts(documents):
        with pq.ParquetFile(path) as file:
            short = _short_columns(file, path, names, where)
            if "text" not in names:
                yield from short.select(names).combine_chunks().to_batches(rows)
                continue
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


def read_table(documents: Artifact, columns: list[str] | None = None, where: pc.Expression | None = None) -> pa.Table:
    """The documents in order as one table: choose columns, text is large."""
    names = columns or SCHEMA.names
    schema = pa.schema([SCHEMA.field(name) for name in names])
    return pa.Table.from_batches(read_batches(documents, names, where, ROWS_A_PART), schema)


def read_ids(documents: Artifact) -> np.ndarray:
    """Ids of all documents in their order, bytes [N]."""
    return np.array(read_table(documents, ["document"])["document"].to_pylist(), dtype="S32")


def places_of(wanted: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Where each of the ids `wanted` [n] stands in `among` [m], int64 [n]; -1 where it does not. Price: a sort of `among`."""
    if not len(among):
        return np.full(len(wanted), -1)
    order = np.argsort(among, kind="stable")
    place = order[np.minimum(np.searchsorted(among, wanted, sorter=order), len(among) - 1)]
    return np.where(among[place] == wanted, place, -1)


def _short_columns(file: pq.ParquetFile, path: Path, names: list[str], where: pc.Expression | None) -> pa.Table:
    """The columns of one part that are wanted or asked about, but for the text, with `row`, of the documents that are wanted."""
    asked = (
        names if where is None else {*names, *(name for name in SCHEMA.names if re.search(rf"\b{name}\b", str(where)))}
    )
    asked = [name for name in SCHEMA.names if name in asked and name != "text"]
    labels = path.parent.parent / "labels" / path.name
    judged = [name for name in asked if name in LABELS] if labels.is_file() else []
    own = [name for name in asked if name not in judged]
    table = pa.table({"row": np.arange(file.metadata.num_rows)})
    for source, chosen in ((file, own), (labels, judged)):
        if chosen:
            read = source.read(chosen) if source is file else pq.read_table(source, columns=chosen)
            for name in chosen:
                table = table.append_column(SCHEMA.field(name), read[name])
    return table if where is None else table.filter(where)
