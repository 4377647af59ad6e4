"""Reads all batches over parts, and notices cuts that were wrong and files that changed meanwhile.

Workers of a cluster whose home is on an object store share no disk with this process, so that they may not see the
sources: then all are read here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count, groupby, pairwise
from pathlib import Path
from typing import Any

from eclectus.tasks.documents import normalise
from eclectus.tasks.documents.intake.read_slices import Fields, read_slices
from eclectus.tasks.documents.intake.settings import IngestSettings
from eclectus.tasks.documents.intake.slices import Batch, Surveyed, batches, rejoined
from eclectus.tasks.documents.sources import parse_dataset
from eclectus.tasks.over_parts import Done, Part, forget, key_of, over_parts
from eclectus.tasks.ray_cluster import workers_see_files

READING_VERSION = f"read slices 2, {normalise.VERSION}"
SECONDS_PER_BYTE = 7e-8


@dataclass(frozen=True)
class Read:
    """What a call read. key: of its part. lines_before: of the slice's file, before it."""

    batch: Batch
    key: str
    done: Done
    lines_before: int = 0

    @property
    def about(self) -> dict[str, Any]:
        return self.done.about

    @property
    def bytes(self) -> float:
        """How much of the sources was taken, in bytes."""
        reads, shares = self.batch.reads, self.about["shares"]
        sizes = [self.batch.size] if len(reads) == 1 else [source.size for source, _ in reads]
        return sum(share * size for share, size in zip(shares, sizes, strict=True))

    def first_ignored(self, what: str, name: str, line: int | None) -> str:
        where = f"{name}, line {line + self.lines_before}" if line else name
        return f"{what} ({where})"


def read_all(surveyed: Sequence[Surveyed], settings: IngestSettings) -> tuple[list[Read], set[str]]:
    """What was read of all slices, in order, and the names of sources that changed meanwhile.

    Of these nothing is kept, since what was read is not what the key says.
    """
    every = batches(surveyed, settings.slice_bytes)
    read = list[Read]()
    if settings.documents_limit:
        for _, of_entry in groupby(every, key=lambda batch: batch.origin):
            read += _first_records(list(of_entry), settings)
    else:
        read = _whole(every, settings)
    changed = {name for each in read for name in each.about["changed"]}
    forget([each.done for each in read if each.about["changed"]])
    return _with_lines(read), changed


def _whole(every: list[Batch], settings: IngestSettings) -> list[Read]:
    """All records of the batches; slices after which an object goes on are read with what follows."""
    for rounds in count():
        read = _read(every, settings)
        open_files = {one.batch.reads[0][0].name for one, other in pairwise(read) if _goes_on(one, other.batch)}
        if not open_files:
            break
        # Where one cut after another turns out to be wrong, the file is read as a whole.
        goes_on = [
            _goes_on(one, other.batch)
            or (rounds > 1 and _follows(one.batch, other.batch) and one.batch.reads[0][0].name in open_files)
            for one, other in pairwise(read)
        ]
        joined = [every[0]]
        for batch, with_last in zip(every[1:], goes_on, strict=True):
            if with_last:
                joined[-1] = rejoined(joined[-1], batch)
            else:
                joined.append(batch)
        every = joined
    return read


def _goes_on(one: Read, following: Batch) -> bool:
    """Whether an object of one slice goes on in the next."""
    return one.about["goes_on"] and _follows(one.batch, following) and not one.about["changed"]


def _first_records(every: list[Batch], settings: IngestSettings) -> list[Read]:
    """The first `documents_limit` records of the batches, one after another."""
    read, left = list[Read](), settings.documents_limit
    while every and left > 0:
        (one,) = _read(every[:1], settings, left)
        if len(every) > 1 and _goes_on(one, every[1]):
            every = [rejoined(every[0], every[1]), *every[2:]]
            continue
        read.append(one)
        left -= one.about["records"]
        every = every[1:]
    return read


def _read(every: list[Batch], settings: IngestSettings, most: int = 0) -> list[Read]:
    # Without conversations the keys are those of before there were any.
    known = set(Fields.__dataclass_fields__) - (set() if settings.conversations else {"conversations"})
    fields = settings.model_dump(include=known)
    pieces = settings.slice_bytes
    parts = []
    for batch in every:
        sources = [asdict(source) | {"origin": 0} for source, _ in batch.reads]
        slices = [asdict(part) for _, part in batch.reads]
        content = [
            [{**source, "path": ""}, {**part, "status": None}] for source, part in zip(sources, slices, strict=True)
        ]
        arguments = {
            "sources": [source | {"path": _absolute(source["path"], source["kind"])} for source in sources],
            "slices": slices, "fields": fields, "most": most, "piece_bytes": pieces,
        }  # fmt: skip
        key = key_of(READING_VERSION, content, fields, most, pieces)
        parts.append(Part(key, arguments, batch.size, f"reading {sources[0]['name']}"))
    workers = settings.curation_workers if workers_see_files() else 1
    done = over_parts(read_slices, parts, "reading", "bytes", SECONDS_PER_BYTE, workers)
    return [Read(batch, part.key, each) for batch, part, each in zip(every, parts, done, strict=True)]


def _absolute(path: str, kind: str) -> str:
    """The path as a worker with another working folder finds it."""
    if kind != "dataset":
        return os.path.abspath(path)
    name = parse_dataset(path)[0]
    return path.replace(name, os.path.abspath(name), 1) if Path(name).is_dir() else path


def _follows(one: Batch, other: Batch) -> bool:
    """Whether the other begins where one slice of JSON lines ends."""
    (source, before), (following, after) = one.reads[-1], other.reads[0]
    return source == following and source.kind == "json lines" and before.end == after.begin


def _with_lines(read: list[Read]) -> list[Read]:
    counted = list[Read]()
    for each in read:
        before = counted[-1] if counted and _follows(counted[-1].batch, each.batch) else None
        lines = before.lines_before + before.about["lines"] if before else 0
        counted.append(replace(each, lines_before=lines))
    return counted
