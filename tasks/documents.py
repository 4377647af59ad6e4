"""The `documents` artifact: a folder of Parquet parts, one row a document, written and read in bounded memory.

Columns: document (id: the first 32 hex digits of the SHA-256 of the text's UTF-8 bytes), name (what its owner calls it: the
record's own id, or null), text, language, language_confidence, domain, source, bytes
(UTF-8 length), group (original, expanded, other), split (train, heldout, apart: in neither). A step adds columns by writing all parts again:
text compresses to a third, and no reader ever needs a join. Row order is the order of ingestion throughout.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from storage.artifact import Artifact, Draft

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


def read_batches(
    documents: Artifact, columns: list[str] | None = None, where: pc.Expression | None = None, rows: int = ROWS_A_GROUP
) -> Iterator[pa.RecordBatch]:
    """The documents in order, a batch at a time. where: for example `pc.field("split") == "train"`."""
    source = ds.dataset([str(path) for path in parts(documents)], schema=SCHEMA, format="parquet")
    yield from source.to_batches(
        columns=columns, filter=where, batch_size=rows, batch_readahead=2, fragment_readahead=1
    )


def read_table(documents: Artifact, columns: list[str] | None = None, where: pc.Expression | None = None) -> pa.Table:
    """The documents in order as one table: choose columns, text is large."""
    source = ds.dataset([str(path) for path in parts(documents)], schema=SCHEMA, format="parquet")
    return source.to_table(columns=columns, filter=where)
