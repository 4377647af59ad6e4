"""Reading sources record by record, in bounded memory; bad input gives a Fault, not an exception.

JSON lines are split and parsed here, not by `datasets`, which stops a whole file at its first bad line; a line longer
than `LONGEST_LINE` is skipped without being held in memory. A `.json` file may be one array of records, up to that
size. A truncated or damaged archive gives its whole lines and then one fault; a damaged Parquet row group gives one
fault, and the next group is read. Data set ids stream through `datasets`. Price: about 300 MB/s of JSON lines on one
core (orjson), about 150 with decompression.
"""

from __future__ import annotations

import io
import json
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from eclectus.storage.errors import EclectusError
from eclectus.tasks.documents.sources import Source, parse_dataset

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

LONGEST_LINE = 64 * 2**20
ROWS_PER_BATCH = 256
COMPRESSED_AT_ONCE = 32 * 2**10
START = 200

Record = dict[str, Any]


@dataclass(frozen=True)
class Fault:
    """Why some input is not a record. reason: category, to count by. detail: message. start: its first characters."""

    reason: str
    detail: str
    start: str = ""


Numbered = tuple[int | None, Record | Fault]
"""Line or row number from 1 (None for a whole file), and the record or fault."""


class Position:
    """How many bytes of the current file have been read."""

    def __init__(self) -> None:
        self.bytes = 0


def read_records(
    source: Source, text_field: str, columns: list[str], longest_text: int, position: Position
) -> Iterator[Numbered]:
    """Every record or fault of the source, with its line or row number.

    columns: the fields to read. longest_text: in characters; longer text files are not read to their end.
    Raises EclectusError when a data set on the hub breaks off, so that half of it is not taken for the whole.
    """
    if source.kind == "dataset":
        return _read_dataset(source, columns)
    if source.kind == "parquet":
        return _read_parquet(source, text_field, columns)
    read: Callable[[io.BufferedReader, str, int], Iterator[Numbered]] = _read_lines
    if source.kind == "text":
        read = _read_text
    elif Path(source.name.removesuffix(source.compression or "")).suffix == ".json":
        read = _read_json
    return _read_file(source, read, text_field, longest_text, position)


def start_of(content: bytes | str) -> str:
    """The first 200 characters of some input, as valid UTF-8."""
    text = content[: 4 * START].decode("utf-8", "replace") if isinstance(content, bytes) else content
    return text[:START].encode("utf-8", "replace").decode()


def _read_file(
    source: Source,
    read: Callable[[io.BufferedReader, str, int], Iterator[Numbered]],
    text_field: str,
    longest_text: int,
    position: Position,
) -> Iterator[Numbered]:
    line: int | None = 0
    try:
        with _opened(source.path) as file, _decompressed(file, source.compression) as handle:
            for line, record in read(handle, text_field, longest_text):
                if line is not None and line % 64 == 0:
                    position.bytes = file.tell()
                yield line, record
    except (EOFError, zlib.error, zstandard.ZstdError) as error:
        whole = f" after line {line}" if source.kind == "json lines" else ""
        state = "truncated" if isinstance(error, EOFError) else "damaged"
        yield (line or 0) + 1 if whole else None, Fault("damaged archive", f"the archive is {state}{whole} ({error})")
    except OSError as error:
        yield None, Fault("unreadable", f"cannot be read ({error.strerror or error})")


def _opened(path: str) -> io.BufferedReader:
    return io.BufferedReader(io.FileIO(path), 2**20)


def _decompressed(file: io.BufferedReader, compression: str | None) -> io.BufferedReader:
    if compression is None:
        return file
    return io.BufferedReader(_Decompressed(file, _gzip if compression == ".gz" else _zstandard), 2**20)


def _gzip() -> Any:
    return zlib.decompressobj(wbits=31)


def _zstandard() -> Any:
    return zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()


class _Decompressed(io.RawIOBase):
    """A stream of concatenated gzip members or zstd frames.

    Python's gzip discards what it has unpacked of a truncated file, and zstandard's reader does not notice that
    it is truncated; this one gives every whole byte and then raises EOFError.
    """

    def __init__(self, file: BinaryIO, begin: Callable[[], Any]) -> None:
        """begin: creates a decompressor with `decompress`, `eof` and `unused_data`."""
        self._file = file
        self._begin = begin
        self._member: Any = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        target = memoryview(buffer).cast("B")
        while not self._ready:
            compressed = b""
            if self._member is not None and self._member.eof:
                # Zeros after a member pad it to a block, as on tapes.
                compressed, self._member = self._member.unused_data.lstrip(b"\0"), None
            compressed = compressed or self._file.read(COMPRESSED_AT_ONCE)
            if not compressed:
                if self._member is not None:
                    raise EOFError("it ends in the middle of compressed data")
                return 0
            self._member = self._member or self._begin()
            self._ready = memoryview(self._member.decompress(compressed))
        size = min(len(target), len(self._ready))
        target[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size


def _read_lines(handle: BinaryIO, text_field: str, longest_text: int) -> Iterator[Numbered]:
    number = 0
    while line := handle.readline(LONGEST_LINE):
        number += 1
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
            start = start_of(line)
            while line and not line.endswith(b"\n"):
                line = handle.readline(LONGEST_LINE)
            yield number, Fault("too long", f"the line is longer than {LONGEST_LINE:,} bytes", start)
            continue
        try:
            record = orjson.loads(line)
        except ValueError as error:
            if not line.strip():
                continue
            record = _parse_again(line, error)
        if not isinstance(record, dict | Fault):
            record = Fault(
                "not a record", f"the line is a JSON {_json_type(record)}; expected an object", start_of(line)
            )
        yield number, record


def _read_json(handle: io.BufferedReader, text_field: str, longest_text: int) -> Iterator[Numbered]:
    """A `.json` file: an array of records if it begins like one and is not too large to hold, else JSON lines."""
    if not handle.peek(1).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        yield from _read_lines(handle, text_field, longest_text)
        return
    content = handle.read(LONGEST_LINE)
    if handle.peek(1):
        detail = (
            f"a JSON array of more than {LONGEST_LINE:,} bytes is not read; write one record per line (jq -c '.[]')"
        )
        yield 1, Fault("too long", detail, start_of(content))
        return
    try:
        items = orjson.loads(content.removeprefix(b"\xef\xbb\xbf"))
    except ValueError:
        yield from _read_lines(io.BytesIO(content), text_field, longest_text)
        return
    for number, record in enumerate(items, 1):
        if not isinstance(record, dict):
            detail = f"item {number} of the array is a JSON {_json_type(record)}; expected an object"
            record = Fault("not a record", detail, start_of(str(record)))
        yield number, record


def _parse_again(line: bytes, error: ValueError) -> Any:
    """A line that orjson refused: some writers put NaN into JSON, which Python's own parser accepts."""
    try:
        text = line.decode()
    except UnicodeDecodeError as fault:
        where = f"byte {line[fault.start]:#04x} at {fault.start}"
        return Fault("not UTF-8", f"the line is not UTF-8 ({where})", start_of(line))
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return Fault("not JSON", f"the line is not JSON ({error})", start_of(line))


def _read_text(handle: BinaryIO, text_field: str, longest_text: int) -> Iterator[Numbered]:
    content = handle.read(4 * longest_text + 4)
    if len(content) > 4 * longest_text + 3:
        yield None, Fault("too long", f"the text is longer than {longest_text:,} characters", start_of(content))
        return
    try:
        yield None, {text_field: content.decode("utf-8-sig")}
    except UnicodeDecodeError as fault:
        where = f"byte {content[fault.start]:#04x} at {fault.start}"
        yield None, Fault("not UTF-8", f"the file is not UTF-8 ({where})", start_of(content))


def _read_parquet(source: Source, text_field: str, columns: list[str]) -> Iterator[Numbered]:
    try:
        file = pq.ParquetFile(source.path, buffer_size=2**20, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        yield None, Fault("unreadable", f"cannot be read as Parquet ({_first_line(error)})")
        return
    with file:
        names = [name for name in columns if name in file.schema_arrow.names]
        if text_field not in names:
            there = ", ".join(file.schema_arrow.names[:20])
            yield None, Fault("no text", f"there is no column '{text_field}'; the columns are {there}")
            return
        done = 0
        for group in range(file.num_row_groups):
            row, end = done, done + file.metadata.row_group(group).num_rows
            try:
                for batch in file.iter_batches(ROWS_PER_BATCH, row_groups=[group], columns=names):
                    for record in _rows(batch):
                        row += 1
                        yield row, record
            except (pa.ArrowException, OSError) as error:
                yield row + 1, Fault("unreadable", f"rows {row + 1} to {end} are damaged ({_first_line(error)})")
            done = end


def _rows(batch: pa.RecordBatch) -> Iterator[Record | Fault]:
    """Rows as records. Parquet does not check that strings are UTF-8, so they are decoded here one by one."""
    columns = []
    for column in batch.columns:
        text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
        columns.append(column.cast(pa.large_binary()).to_pylist() if text else column.to_pylist())
    for values in zip(*columns, strict=True):
        try:
            yield {
                name: value.decode() if isinstance(value, bytes) else value
                for name, value in zip(batch.schema.names, values, strict=True)
            }
        except UnicodeDecodeError as fault:
            where = f"byte {fault.object[fault.start]:#04x} at {fault.start}"
            yield Fault("not UTF-8", f"the row is not UTF-8 ({where})", start_of(fault.object))


def _read_dataset(source: Source, columns: list[str]) -> Iterator[Numbered]:
    row = 0
    try:
        for row, record in enumerate(_open_dataset(source, columns), 1):
            yield row, record
    except EclectusError:
        raise
    except Exception as error:
        name = parse_dataset(source.path)[0]
        # `datasets` and its file systems raise any exception; only a damaged local folder is no reason to stop.
        if not os.path.isdir(name):
            raise EclectusError(
                f"data set '{name}' broke off after {row:,} records ({_first_line(error)}); "
                "run again, or download it first"
            ) from error
        yield row + 1, Fault("unreadable", f"the data set breaks off after record {row} ({_first_line(error)})")


def _open_dataset(source: Source, columns: list[str]) -> Any:
    """A stream of records with these columns only."""
    import datasets

    name, revision, config, split = parse_dataset(source.path)
    folder = Path(name).expanduser()
    if any((folder / file).is_file() for file in ("dataset_dict.json", "state.json")):
        saved = datasets.load_from_disk(str(folder))
        if isinstance(saved, datasets.DatasetDict):
            if split not in saved:
                raise EclectusError(f"data set '{name}' has no split '{split}'; it has {', '.join(saved)}")
            saved = saved[split]
        stream = saved.to_iterable_dataset()
    else:
        try:
            stream = datasets.load_dataset(name, config, split=split, revision=revision, streaming=True)
        except Exception as error:
            raise EclectusError(f"data set '{name}' cannot be opened: {_first_line(error)}") from error
    names = [column for column in columns if column in (stream.column_names or columns)]
    return stream.select_columns(names) if stream.column_names and names else stream


def _json_type(value: Any) -> str:
    return {list: "array", str: "string", bool: "boolean", type(None): "null"}.get(type(value), "number")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
