"""How sources are cut into slices, which are hashed and read apart: every byte is in one slice, and read by one call.

    JSON lines    at line ends, about every `slice_bytes`, where the line before and the line after are objects
    Parquet       between row groups
    others        one slice each (compressed, CSV, text, an array or objects over several lines, data sets)

A cut is only right where reading from there gives what reading from the file's beginning would give. An object that
began before it could go on after it: then the slice says so when it has been read (`Position.goes_on`), and is read
again with the next one (`rejoined`).

Small sources that follow each other are read by one call (`Batch`). Where a batch ends depends on the names of its
sources, and a file is cut at multiples of `slice_bytes`, so what is added to sources or to the end of a file leaves the
other slices as they were. Price: one read of all local bytes by all cores (SHA-256, 1 to 2 GB/s each); a file that is
left alone is hashed once per process.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise

import orjson
import pyarrow.parquet as pq

from eclectus.storage.artifact import is_settled
from eclectus.tasks.allowed_paths import open_allowed
from eclectus.tasks.documents.fingerprints import (
    dataset_digest,
    digest_of_pieces,
    hub_commit_of,
    pieces_of,
    unreadable_digest,
)
from eclectus.tasks.documents.readers import status_of
from eclectus.tasks.documents.readers.compression import BUFFER, compression_of
from eclectus.tasks.documents.readers.json_array import AT_ONCE
from eclectus.tasks.documents.readers.json_records import begins_an_array
from eclectus.tasks.documents.readers.records import Slice, encoding_of
from eclectus.tasks.documents.sources import Source

MOST_IN_BATCH = 1_000
# One in so many sources may end a batch that is a quarter full.
ENDS_BATCH = 4
# Bytes before and after a place at which lines are looked at, more where they are longer; and how many lines.
REACHES = (2**14, 2**20, 2**24)
LINES_TRIED = 64


@dataclass(frozen=True)
class Surveyed:
    """A source, its digest, and the slices that it is read in."""

    source: Source
    digest: str
    slices: tuple[Slice, ...]


@dataclass(frozen=True)
class Batch:
    """What one call reads: slices of one source, or whole small sources of one entry, one after another."""

    reads: tuple[tuple[Source, Slice], ...]
    size: int

    @property
    def origin(self) -> int:
        return self.reads[0][0].origin


def survey(sources: Sequence[Source], slice_bytes: int, text_field: str) -> list[Surveyed]:
    """The sources with their digests, cut into slices of about `slice_bytes`.

    Raises EclectusError when a data set on the hub cannot be reached.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # The pieces of a file are hashed side by side, so files are taken one by one: no task waits for another.
        outlines = list(pool.map(lambda source: _outline(source, slice_bytes, text_field), sources))
        pieces = [[_hash_later(pool, outline, part) for part in outline.parts] for outline in outlines]
        return [_surveyed(outline, parts) for outline, parts in zip(outlines, pieces, strict=True)]


@dataclass(frozen=True)
class _Outline:
    """parts: the byte ranges that are hashed. groups: the slices of row groups of a Parquet file that is cut."""

    source: Source
    digest: str = ""
    parts: tuple[Slice, ...] = ()
    groups: tuple[Slice, ...] = ()
    status: tuple[int, ...] | None = None
    identity: tuple[int, ...] | None = None


def _outline(source: Source, slice_bytes: int, text_field: str) -> _Outline:
    if source.kind == "dataset":
        commit = hub_commit_of(source)
        digest = dataset_digest(source, commit)
        return _Outline(source, digest, groups=(Slice(digest=digest, commit=commit),))
    try:
        with open_allowed(source.path, f"source '{source.name}'") as file:
            found = os.fstat(file.fileno())
            size, groups, cuts = found.st_size, tuple[Slice, ...](), [0, found.st_size]
            if size > slice_bytes and source.kind == "json lines":
                cuts = _cuts(file, size, slice_bytes, source.compression)
            elif size > slice_bytes and source.kind == "parquet":
                groups = _row_groups(file, slice_bytes, text_field)
            status = status_of(found) if is_settled(found) else None
            identity = (found.st_dev, found.st_ino, *status) if status else None
            parts = tuple(Slice(begin, end) for begin, end in pairwise(cuts))
            return _Outline(source, "", parts, groups, status, identity)
    except OSError as error:
        digest = unreadable_digest(error)
        return _Outline(source, digest, groups=(Slice(end=0, digest=digest),))


def _cuts(file: io.FileIO, size: int, slice_bytes: int, compression: str | None) -> list[int]:
    """Where slices begin, and the size: [0, ..., size]; [0, size] for what is not lines of objects from its start."""
    start = file.read(AT_ONCE) or b""
    if begins_an_array(start) or encoding_of(start) or compression_of(start[:10], compression):
        return [0, size]
    cuts = [0]
    for place in range(slice_bytes, size, slice_bytes):
        if place > cuts[-1] and cuts[-1] < (cut := _cut_after(file, size, place)) < size:
            cuts.append(cut)
    return [*cuts, size]


def _cut_after(file: io.FileIO, size: int, place: int) -> int:
    """The first line end at or after `place - 1` with an object on both sides, among the next lines; 0 if none is."""
    for reach in REACHES:
        begin = max(0, place - reach)
        file.seek(begin)
        window = _read(file, place + reach - begin)
        end = window.find(b"\n", place - 1 - begin)
        for _ in range(LINES_TRIED):
            following = window.find(b"\n", end + 1) if end >= 0 else -1
            ends_file = begin + len(window) >= size
            if end < 0 or (following < 0 and not ends_file):
                break
            before = window[window.rfind(b"\n", 0, end) + 1 : end]
            after = window[end + 1 : following if following >= 0 else len(window)]
            if _is_object(before) and _is_object(after):
                return begin + end + 1
            end = following
        else:
            return 0
    return 0


def _read(file: io.FileIO, size: int) -> bytes:
    parts = list[bytes]()
    while size > 0 and (more := file.read(size)):
        parts.append(more)
        size -= len(more)
    return b"".join(parts)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(orjson.loads(line), dict)
    except ValueError:
        return False


def _row_groups(file: io.FileIO, slice_bytes: int, text_field: str) -> tuple[Slice, ...]:
    """Slices of row groups, by the bytes of their texts; none for a file that is not cut."""
    try:
        with pq.ParquetFile(os.fdopen(os.dup(file.fileno()), "rb")) as parquet:
            metadata, slices = parquet.metadata, list[Slice]()
            if text_field not in parquet.schema_arrow.names:
                return ()
            begin, first, rows, held = 0, 0, 0, 0
            for group in range(metadata.num_row_groups):
                about = metadata.row_group(group)
                columns = [about.column(number) for number in range(about.num_columns)]
                held += sum(each.total_uncompressed_size for each in columns if each.path_in_schema == text_field)
                rows += about.num_rows
                if held >= slice_bytes or group == metadata.num_row_groups - 1:
                    slices.append(Slice(begin, group + 1, first))
                    begin, first, held = group + 1, rows, 0
            return tuple(slices)
    # Arrow raises nearly any exception for a damaged or encrypted footer; the reader will name it.
    except Exception:
        return ()


def _hash_later(pool: ThreadPoolExecutor, outline: _Outline, part: Slice) -> list[Future[str]]:
    path, identity = outline.source.path, outline.identity
    what = f"source '{outline.source.name}'"
    return [
        pool.submit(_hash_settled if identity else _hash, path, what, begin, end, identity)
        for begin, end in pieces_of(part.begin, part.end or 0)
    ]


def _surveyed(outline: _Outline, pieces: list[list[Future[str]]]) -> Surveyed:
    if outline.digest:
        return Surveyed(outline.source, outline.digest, outline.groups)
    try:
        digests = [digest_of_pieces([each.result() for each in part]) for part in pieces]
    except OSError as error:
        digest = unreadable_digest(error)
        return Surveyed(outline.source, digest, (Slice(end=0, digest=digest),))
    if outline.source.kind == "parquet":
        groups = outline.groups or (Slice(),)
        return Surveyed(
            outline.source,
            digests[0],
            tuple(replace(each, digest=digests[0], status=outline.status) for each in groups),
        )
    slices = tuple(replace(part, digest=digest) for part, digest in zip(outline.parts, digests, strict=True))
    return Surveyed(outline.source, digests[0] if len(digests) == 1 else _of_slices(slices), slices)


def _of_slices(slices: tuple[Slice, ...]) -> str:
    listing = [[each.begin, each.end, each.digest] for each in slices]
    return f"slices-{hashlib.sha256(json.dumps(listing).encode()).hexdigest()}"


def _hash(path: str, what: str, begin: int, end: int, _: tuple[int, ...] | None = None) -> str:
    """Hex SHA-256 of a file's bytes [begin, end)."""
    digest, space = hashlib.sha256(), memoryview(bytearray(min(BUFFER, max(1, end - begin))))
    with open_allowed(path, what) as file:
        file.seek(begin)
        left = end - begin
        while left > 0 and (size := file.readinto(space[:left])):
            digest.update(space[:size])
            left -= size
    return digest.hexdigest()


_hash_settled = functools.lru_cache(maxsize=100_000)(_hash)


def batches(surveyed: Sequence[Surveyed], slice_bytes: int) -> list[Batch]:
    """All slices in order, those of small sources of one entry together."""
    return list(_batches(surveyed, slice_bytes))


def _batches(surveyed: Sequence[Surveyed], slice_bytes: int) -> Iterator[Batch]:
    held, size = list[tuple[Source, Slice]](), 0
    for each in surveyed:
        source, own = each.source, each.source.size
        small = len(each.slices) == 1 and source.kind != "dataset" and own <= slice_bytes // 2
        full = not small or size + own > slice_bytes or len(held) >= MOST_IN_BATCH
        if held and (full or held[0][0].origin != source.origin):
            yield Batch(tuple(held), size)
            held, size = [], 0
        if small:
            held.append((source, each.slices[0]))
            size += own
            if size >= slice_bytes // 4 and hashlib.sha256(source.name.encode()).digest()[0] % ENDS_BATCH == 0:
                yield Batch(tuple(held), size)
                held, size = [], 0
            continue
        for part in each.slices:
            bytes_read = own // len(each.slices) if source.kind == "parquet" else (part.end or own) - part.begin
            yield Batch(((source, part),), bytes_read)
    if held:
        yield Batch(tuple(held), size)


def rejoined(first: Batch, second: Batch) -> Batch:
    """One slice of JSON lines of two that follow each other."""
    (source, begins), (_, ends) = first.reads[0], second.reads[0]
    digest = digest_of_pieces(
        [_hash(source.path, f"source '{source.name}'", *piece) for piece in pieces_of(begins.begin, ends.end or 0)]
    )
    return Batch(((source, Slice(begins.begin, ends.end, digest=digest)),), first.size + second.size)
