"""Parquet, row by row in batches; every fault of a file, a row group, a column or a value costs no more than itself.

Texts may be strings of any Arrow type (large, view, dictionary, run-end encoded, extension), or bytes that are UTF-8;
Parquet does not check that strings are UTF-8, so they are decoded here one by one. Labels may be of any type; one that
Python cannot hold, such as a date in the year 10000, and a column of labels that cannot be read count as absent. A
damaged row group is one fault, and the next one is read. Memory: a page per column and `ROWS_PER_BATCH` rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from eclectus.tasks.documents.readers.records import (
    Fault,
    Numbered,
    Position,
    Reading,
    Record,
    Slice,
    first_line,
    not_utf8,
)

ROWS_PER_BATCH = 256


def read_parquet(handle: BinaryIO, reading: Reading, part: Slice, position: Position) -> Iterator[Numbered]:
    """Every row or fault of these row groups, with its number in the file."""
    try:
        file = pq.ParquetFile(handle, buffer_size=2**20, pre_buffer=False)
        schema = file.schema_arrow
    # Arrow raises nearly any exception for a damaged or encrypted footer.
    except Exception as error:
        yield None, Fault("unreadable", f"cannot be read as Parquet ({first_line(error)})")
        return
    with file:
        text_field = reading.text_among(schema.names)
        if text_field is None:
            there = ", ".join(schema.names[:20])
            detail = f"there is no column '{reading.text_field}'; the columns are {there}"
            yield None, Fault("no text", detail)
            return
        # Lists and structs are no labels, as in JSON, and are not read.
        names = [
            field.name
            for field in schema
            if field.name in reading.columns
            and (field.name in (text_field, *reading.nested) or not pa.types.is_nested(field.type))
        ]
        done, groups = part.first_row, range(part.begin, file.num_row_groups if part.end is None else part.end)
        position.of = sum(file.metadata.row_group(group).num_rows for group in groups)
        for group in groups:
            rows = file.metadata.row_group(group).num_rows
            for row, record in _read_group(file, group, names, text_field, done, rows):
                position.passed = row - part.first_row
                yield row, record
            done += rows


def _read_group(
    file: pq.ParquetFile, group: int, names: list[str], text_field: str, done: int, rows: int
) -> Iterator[tuple[int, Record | Fault]]:
    """done: rows before this group. If it cannot be read with all columns, it is read without those at fault."""
    row, end = done, done + rows
    for attempt in (names, None):
        columns = _readable(file, group, names, text_field) if attempt is None else attempt
        try:
            place = done
            for batch in file.iter_batches(ROWS_PER_BATCH, row_groups=[group], columns=columns):
                for record in records(batch, text_field):
                    place += 1
                    if place > row:
                        row = place
                        yield row, record
            return
        except Exception as error:
            if attempt is None or len(names) == 1:
                yield row + 1, Fault("unreadable", f"rows {row + 1} to {end} are damaged ({first_line(error)})")
                return


def _readable(file: pq.ParquetFile, group: int, names: list[str], text_field: str) -> list[str]:
    """The text's column, and the labels' columns that can be read alone."""
    found = []
    for name in names:
        try:
            for _ in (
                file.iter_batches(ROWS_PER_BATCH, row_groups=[group], columns=[name]) if name != text_field else ()
            ):
                pass
            found.append(name)
        except Exception:
            continue
    return found


def records(batch: pa.RecordBatch, text_field: str) -> Iterator[Record | Fault]:
    """The rows of a batch, with their texts decoded."""
    names = batch.schema.names
    columns = [_values(column, name == text_field) for name, column in zip(names, batch.columns, strict=True)]
    for values in zip(*columns, strict=True):
        record = dict(zip(names, values, strict=True))
        text = record.get(text_field)
        if isinstance(text, bytes):
            try:
                record[text_field] = text.decode()
            except UnicodeDecodeError as fault:
                yield not_utf8("the row", fault)
                continue
        yield record


def _values(column: pa.Array, is_text: bool) -> list[Any]:
    """The values of a column. Texts and strings come as bytes from Arrow, since it cannot decode what is not UTF-8."""
    column = _plain(column)
    kind = column.type
    if _is_string(kind) or _is_bytes(kind):
        values = column.cast(pa.large_binary()).to_pylist()
        if is_text or _is_bytes(kind):
            return values
        return [each if each is None else each.decode("utf-8", "replace") for each in values]
    try:
        return column.to_pylist()
    # Dates out of range, unknown time zones, units that Python does not have: Arrow raises what it meets.
    except Exception:
        return [_value(each) for each in column]


def _plain(column: pa.Array) -> pa.Array:
    """The column without dictionary, run-end encoding and extension."""
    while True:
        if isinstance(column.type, pa.BaseExtensionType):
            column = column.storage
        elif pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        elif pa.types.is_run_end_encoded(column.type):
            column = pc.run_end_decode(column)
        else:
            return column


def _value(scalar: pa.Scalar) -> Any:
    """The value, or None if Python cannot hold it, such as a date in the year 10000."""
    try:
        return scalar.as_py()
    except Exception:
        return None


def _is_string(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return (
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_binary_view(kind)
        or pa.types.is_fixed_size_binary(kind)
    )
