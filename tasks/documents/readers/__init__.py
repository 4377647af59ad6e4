"""Reading sources record by record, in bounded memory; bad input gives a Fault, not an exception.

    json_records   JSON lines, arrays, objects over several lines       delimited   CSV and TSV with named columns
    parquet        every Arrow type                                     text        a file is a document
    dataset        data sets of the hub, local ones                     compression gzip, zstd, bzip2, xz

A truncated or damaged archive gives its whole lines and then one fault. What is read is hashed while it is read
(`Position.digest`), so that a step can tell whether it is what its key says.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Generator, Iterator

from eclectus.storage.artifact import is_settled
from eclectus.tasks.allowed_paths import open_allowed
from eclectus.tasks.documents.fingerprints import (
    dataset_digest,
    file_digest,
    hash_open_file,
    hub_commit_of,
    unreadable_digest,
)
from eclectus.tasks.documents.readers.compression import DamagedArchive, HashedFile, decompressed
from eclectus.tasks.documents.readers.dataset import read_dataset
from eclectus.tasks.documents.readers.delimited import read_csv, read_tsv
from eclectus.tasks.documents.readers.json_records import read_json
from eclectus.tasks.documents.readers.parquet import read_parquet
from eclectus.tasks.documents.readers.records import Fault, Numbered, Position, Reading, Record, brief, start_of
from eclectus.tasks.documents.readers.text import read_text
from eclectus.tasks.documents.sources import Source
from eclectus.tasks.step import CHANGED

__all__ = ["Fault", "Numbered", "Position", "Reading", "Record", "brief", "read_records", "start_of"]

LONGEST_LINE = 64 * 2**20
_READERS: dict[str, Callable[[io.BufferedReader, Reading], Iterator[Numbered]]] = {
    "json lines": read_json,
    "text": read_text,
    "csv": read_csv,
    "tsv": read_tsv,
}


def read_records(
    source: Source, text_field: str, columns: list[str], longest_text: int, position: Position
) -> Generator[Numbered, None, None]:
    """Every record or fault of the source, with its line or row number.

    columns: the fields to read. longest_text: in characters; longer text files are not read to their end. position:
    gets the digest when the iterator ends or is closed.
    Raises EclectusError when a data set on the hub breaks off, so that half of it is not taken for the whole.
    """
    reading = Reading(text_field, columns, longest_text, LONGEST_LINE)
    if source.kind == "dataset":
        return _read_dataset(source, reading, position)
    return (_read_parquet if source.kind == "parquet" else _read_file)(source, reading, position)


def _read_file(source: Source, reading: Reading, position: Position) -> Generator[Numbered, None, None]:
    line: int | None = 0
    try:
        with HashedFile(open_allowed(source.path, f"source '{source.name}'")) as file:
            try:
                content = decompressed(file, source.compression)
                for line, record in _READERS[source.kind](content, reading):
                    if line is not None and line % 64 == 0:
                        position.bytes = file.bytes
                    yield line, record
            except DamagedArchive as error:
                whole = f" after line {line}" if source.kind != "text" else ""
                detail = f"the archive is {error.state}{whole} ({error})"
                yield (line or 0) + 1 if whole else None, Fault("damaged archive", detail)
            finally:
                position.digest = file_digest(file.digest)
    except OSError as error:
        position.digest = unreadable_digest(error)
        yield None, Fault("unreadable", f"cannot be read ({error.strerror or error})")


def _read_parquet(source: Source, reading: Reading, position: Position) -> Generator[Numbered, None, None]:
    """Parquet is not read in order, so the file is hashed after it, and before it as well if it was just written."""
    try:
        with open_allowed(source.path, f"source '{source.name}'") as file:
            status = os.fstat(file.fileno())
            before = None if is_settled(status) else hash_open_file(file)
            file.seek(0)
            # Arrow closes what it reads from.
            shared = os.fdopen(os.dup(file.fileno()), "rb", buffering=0)
            try:
                yield from read_parquet(shared, reading)
            finally:
                with contextlib.suppress(OSError):
                    shared.close()
                position.digest = file_digest(lambda: hash_open_file(file))
                after = os.fstat(file.fileno())
                kept = (status.st_size, status.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
                if not kept or (before and file_digest(lambda: before) != position.digest):
                    position.digest = CHANGED
    except OSError as error:
        position.digest = unreadable_digest(error)
        yield None, Fault("unreadable", f"cannot be read ({error.strerror or error})")


def _read_dataset(source: Source, reading: Reading, position: Position) -> Generator[Numbered, None, None]:
    """Local data sets are hashed before and after they are read; those of the hub are read at one commit."""
    commit = hub_commit_of(source)
    before = dataset_digest(source, commit)
    try:
        yield from read_dataset(source, reading, commit)
    finally:
        position.digest = before if commit or dataset_digest(source, None) == before else CHANGED
