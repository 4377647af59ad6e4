"""The tables of `ingest` besides its documents: rejected records and exact duplicates."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROWS_AT_ONCE = 5_000
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


class RowGroups:
    """A Parquet file of small rows in row groups of 5,000, however many come at once."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._writer = pq.ParquetWriter(path, schema, compression="zstd")
        self._waiting = schema.empty_table()
        self.count = 0

    def write(self, rows: pa.Table) -> None:
        self.count += len(rows)
        waiting = pa.concat_tables([self._waiting, rows])
        whole = len(waiting) - len(waiting) % ROWS_AT_ONCE
        for begin in range(0, whole, ROWS_AT_ONCE):
            self._writer.write_table(waiting.slice(begin, ROWS_AT_ONCE).combine_chunks())
        # A copy, which does not hold what was written.
        self._waiting = waiting.slice(whole).combine_chunks()

    def close(self) -> None:
        if len(self._waiting):
            self._writer.write_table(self._waiting.combine_chunks())
        self._writer.close()
