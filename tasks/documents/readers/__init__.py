"""Reading sources record by record, in bounded memory; bad input gives a Fault, not an exception.

    json_records   JSON lines, arrays, objects over several lines       delimited   CSV and TSV with named columns
    parquet        every Arrow type                                     text        a file is a document
    dataset        data sets of the hub, local ones                     compression gzip, zstd, bzip2, xz

A truncated or damaged archive gives its whole lines and then one fault. What is read is hashed while it is read
(`Position.digest`), so that a step can tell whether it is what its key says. A file may be read in slices: JSON lines
from one line's beginning to another's, Parquet by row groups.
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
    digest_of_open_file,
    file_digest,
    hub_commit_of,
    unreadable_digest,
)
from eclectus.tasks.documents.readers.compression import BUFFER, DamagedArchive, HashedFile, decompressed
from eclectus.tasks.documents.readers.dataset import read_dataset
from eclectus.tasks.documents.readers.delimited import read_csv, read_tsv
from eclectus.tasks.documents.readers.json_records import read_json, read_lines
from eclectus.tasks.documents.readers.parquet import read_parquet
from eclectus.tasks.documents.readers.records import Fault, Numbered, Position, Reading, Record, Slice, brief, start_of
from eclectus.tasks.documents.readers.text import read_text
from eclectus.tasks.documents.sources import Source
from eclectus.tasks.step import CHANGED

__all__ = ["Fault", "Numbered", "Position", "Reading", "Record", "Slice", "brief", "read_records", "start_of"]

LONGEST_LINE = 64 * 2**20
WHOLE = Slice()
_READERS: dict[str, Callable[[io.BufferedReader, Reading], Iterator[Numbered]]] = {
    "text": read_text,
    "csv": read_csv,
    "tsv": read_tsv,
}


def read_records(
    source: Source,
    text_field: str,
    columns: list[str],
    longest_text: int,
    position: Position,
    part: Slice = WHOLE,
    nested: tuple[str, ...] = (),
) -> Generator[Numbered, None, None]:
    """Every record or fault of the source, or of a part of it, with its line from the part's beginning, or row number.

    columns: the fields to read. longest_text: in characters; longer text files are not read to their end. position:
    gets the digest when the iterator ends or is closed. nested: as in `Reading`.
    Raises EclectusError when a data set on the hub breaks off, so that half of it is not taken for the whole.
    """
    reading = Reading(text_field, columns, longest_text, LONGEST_LINE, nested)
    if source.kind == "dataset":
        return _read_dataset(source, reading, position, part)
    return (_read_parquet if source.kind == "parquet" else _read_file)(source, reading, position, part)


def _read_file(source: Source, reading: Reading, position: Position, part: Slice) -> Generator[Numbered, None, None]:
    line: int | None = 0
    try:
        with HashedFile(open_allowed(source.path, f"source '{source.name}'"), part.begin, part.end) as file:
            try:
                # Held until all is hashed: a stream that nobody holds closes the file.
                content: io.BufferedReader = io.BufferedReader(file, BUFFER)
                content = content if part.begin else decompressed(content, source.compression)
                for line, record in _records(content, source, reading, position, part):
                    yield line, record
            except DamagedArchive as error:
                whole = f" after line {line}" if source.kind != "text" else ""
                detail = f"the archive is {error.state}{whole} ({error})"
                yield (line or 0) + 1 if whole else None, Fault("damaged archive", detail)
            finally:
                position.share = _share(file, content, position, part)
                position.digest = file_digest(file.digest)
    except OSError as error:
        position.digest = unreadable_digest(error)
        yield None, Fault("unreadable", f"cannot be read ({error.strerror or error})")


def _share(file: HashedFile, content: io.BufferedReader, position: Position, part: Slice) -> float:
    """How much of a slice was taken, by the bytes that were read of the file and, where they are known, of its lines:
    a buffer holds more than was taken."""
    size = (part.end or 0) - part.begin
    unpacked = getattr(content.raw, "unpacked", file.bytes)
    taken = min(1.0, position.passed / unpacked) if position.passed and unpacked else 1.0
    return min(1.0, file.bytes / size * taken) if size > 0 else 1.0


def _records(
    content: io.BufferedReader, source: Source, reading: Reading, position: Position, part: Slice
) -> Iterator[Numbered]:
    if source.kind == "json lines":
        return (read_lines if part.begin else read_json)(content, reading, position)
    return _READERS[source.kind](content, reading)


def _read_parquet(source: Source, reading: Reading, position: Position, part: Slice) -> Generator[Numbered, None, None]:
    """Parquet is not read in order, so the file is hashed after it, and before it as well if it was just written.

    Of a part whose file's digest and status are known, only the status is compared.
    """
    try:
        with open_allowed(source.path, f"source '{source.name}'") as file:
            status = os.fstat(file.fileno())
            before = part.digest if part.digest or is_settled(status) else digest_of_open_file(file)
            file.seek(0)
            # Arrow closes what it reads from.
            shared = os.fdopen(os.dup(file.fileno()), "rb", buffering=0)
            try:
                yield from read_parquet(shared, reading, part, position)
            finally:
                position.share = position.passed / position.of if position.of else 1.0
                with contextlib.suppress(OSError):
                    shared.close()
                after = os.fstat(file.fileno())
                if part.status is not None and part.status == status_of(after):
                    position.digest = part.digest
                else:
                    position.digest = file_digest(lambda: digest_of_open_file(file))
                kept = (status.st_size, status.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
                if not kept or (before and before != position.digest):
                    position.digest = CHANGED
    except OSError as error:
        position.digest = unreadable_digest(error)
        yield None, Fault("unreadable", f"cannot be read ({error.strerror or error})")


def status_of(file: os.stat_result) -> tuple[int, ...]:
    """What changes with a file's content."""
    return file.st_size, file.st_mtime_ns, file.st_ctime_ns


def _read_dataset(source: Source, reading: Reading, position: Position, part: Slice) -> Generator[Numbered, None, None]:
    """Local data sets are hashed before and after they are read; those of the hub are read at one commit."""
    commit = part.commit if part.digest else hub_commit_of(source)
    before = part.digest or dataset_digest(source, commit)
    try:
        yield from read_dataset(source, reading, commit)
    finally:
        position.digest = before if commit or dataset_digest(source, None) == before else CHANGED
