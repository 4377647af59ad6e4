"""Writes the documents, the rejected records and the exact duplicates of everything that was read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from eclectus.storage.artifact import Draft
from eclectus.tasks.disk_matrix import mapped
from eclectus.tasks.documents.intake.documents_parts import assembled, packed, write_part
from eclectus.tasks.documents.intake.exact_duplicates import exact_duplicates
from eclectus.tasks.documents.intake.reading import Read
from eclectus.tasks.documents.intake.settings import IngestSettings
from eclectus.tasks.documents.intake.tables import DUPLICATES, REJECTED, RowGroups
from eclectus.tasks.over_parts import Part, key_of, link_or_copy, over_parts

WRITING_VERSION = "documents part 1"
SECONDS_PER_DOCUMENT = 8e-6


@dataclass
class Written:
    """What became documents. domains, lengths: documents by domain, and by the bit length of their size in bytes;
    of_entry: by the index of the entry of `sources`."""

    documents: int = 0
    duplicates: int = 0
    bytes: int = 0
    domains: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    of_entry: Counter[int] = field(default_factory=Counter)


@dataclass(frozen=True)
class _Piece:
    """Candidates of one call. begin: the number of the first one among all. bytes: of their texts. last: last id."""

    read: Read
    number: int
    begin: int
    rows: int
    bytes: int
    last: str

    def file(self, name: str, suffix: str) -> Path:
        return self.read.done.file(f"{name}-{self.number:05d}.{suffix}")


def write_documents(read: Sequence[Read], settings: IngestSettings, out: Draft) -> Written:
    """Fills the draft. Its documents are those of all candidates without exact duplicates, in order."""
    pieces = _pieces(read)
    _write_rejected(read, out)
    dropped, firsts = exact_duplicates([each.file("keys", "npy") for each in pieces], [each.rows for each in pieces])
    begins = [each.begin for each in pieces]
    # Where in `dropped` the rows of each piece begin; the last entry is its end.
    places = np.searchsorted(dropped, [*begins, np.iinfo(np.int64).max]).tolist()
    rows = [dropped[places[i] : places[i + 1]] - each.begin for i, each in enumerate(pieces)]
    _write_duplicates(pieces, rows, [firsts[places[i] : places[i + 1]] for i in range(len(pieces))], out)
    written = Written(duplicates=len(dropped))
    for piece, gone in zip(pieces, rows, strict=True):
        written.of_entry[piece.read.batch.origin] += piece.rows - len(gone)
    _write_parts(pieces, rows, settings, out, written)
    return written


def _pieces(read: Sequence[Read]) -> list[_Piece]:
    pieces, begin = list[_Piece](), 0
    for each in read:
        for number, piece in enumerate(each.about["pieces"]):
            pieces.append(_Piece(each, number, begin, piece["rows"], piece["bytes"], piece["last"]))
            begin += piece["rows"]
    return pieces


def _write_rejected(read: Sequence[Read], out: Draft) -> None:
    table = RowGroups(out.file("rejected.parquet"), REJECTED)
    for each in read:
        if not each.about["rejected"]:
            continue
        with pq.ParquetFile(each.done.file("rejected.parquet")) as file:
            for number in range(file.num_row_groups):
                rows = file.read_row_group(number)
                line = pc.add(rows["line"], each.lines_before)
                table.write(rows.set_column(REJECTED.names.index("line"), REJECTED.field("line"), line))
    table.close()


def _write_duplicates(pieces: list[_Piece], rows: list[np.ndarray], firsts: list[np.ndarray], out: Draft) -> None:
    """rows: dropped ones of each piece. firsts: the numbers of the candidates that they equal."""
    table = RowGroups(out.file("duplicates.parquet"), DUPLICATES)
    begins = np.array([each.begin for each in pieces])
    for piece, here, kept in zip(pieces, rows, firsts, strict=True):
        if not len(here):
            continue
        places = np.load(piece.file("places", "npy"), allow_pickle=False)[here]
        files = pa.array([source.name for source, _ in piece.read.batch.reads], pa.string())
        line = pa.array(places[:, 1] + piece.read.lines_before, mask=places[:, 1] < 0)
        names = pq.read_table(piece.file("piece", "parquet"), columns=["name"])["name"]
        columns = [files.take(pa.array(places[:, 0])), line, names.take(pa.array(here)), _ids(pieces, begins, kept)]
        table.write(pa.table(columns, schema=DUPLICATES))
    table.close()


def _ids(pieces: list[_Piece], begins: np.ndarray, candidates: np.ndarray) -> pa.Array:
    """Ids of these candidates [n]."""
    owners = np.searchsorted(begins, candidates, side="right") - 1
    ids = np.empty(len(candidates), "V16")
    for owner in np.unique(owners).tolist():
        of_piece = mapped(pieces[owner].file("ids", "npy"))
        ids[owners == owner] = of_piece[candidates[owners == owner] - pieces[owner].begin]
    return pa.array([each.tobytes().hex() for each in ids], pa.string())


def _write_parts(
    pieces: list[_Piece], rows: list[np.ndarray], settings: IngestSettings, out: Draft, written: Written
) -> None:
    names = [key_of("piece", each.read.key, each.number) for each in pieces]
    # Bytes of what is kept, so that duplicates make no small parts.
    sizes = [each.bytes * (each.rows - len(gone)) // each.rows for each, gone in zip(pieces, rows, strict=True)]
    parts = list[Part]()
    for numbers in assembled([each.last for each in pieces], sizes, settings.part_bytes):
        arguments = {
            "pieces": [pieces[i].file("piece", "parquet") for i in numbers],
            "places": [pieces[i].file("places", "npy") for i in numbers],
            "dropped": [packed(rows[i]) for i in numbers],
        }
        key = key_of(WRITING_VERSION, [[names[i], packed(rows[i]).hex()] for i in numbers])
        parts.append(Part(key, arguments, sum(pieces[i].rows for i in numbers), f"documents part {len(parts)}"))
    done = over_parts(write_part, parts, "writing", "documents", SECONDS_PER_DOCUMENT, settings.curation_workers)
    number = 0
    for each in done:
        for file in range(len(each.about["rows"])):
            link_or_copy(each.file(f"part-{file:05d}.parquet"), out.file(f"documents/part-{number:05d}.parquet"))
            number += 1
        written.documents += sum(each.about["rows"])
        written.bytes += each.about["bytes"]
        written.domains.update(dict(each.about["domains"]))
        written.lengths.update(dict(each.about["lengths"]))
