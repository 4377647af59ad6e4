"""The overlaps of candidates, exactly: each document is read once, and its set of shingles lies on disk until all
pairs are compared.

    merge      the pairs of one part's documents with any later ones, of all bands; those of which the overlap is known
               are told from those to compare
    shingle    the documents of one part that stand in a pair to compare: values.npy uint32 and begins.npy int64 [n + 1]
    compare    the pairs of one part's documents, with one other part at a time

Price: 15 microseconds per document of 450 characters and 3 per pair. Memory: the pairs of one part.
"""

from __future__ import annotations

import hashlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from eclectus.storage.artifact import Artifact
from eclectus.tasks.disk_matrix import PartMatrix, mapped
from eclectus.tasks.documents.near_duplicates.candidates import PAIRS, far_apart
from eclectus.tasks.documents.near_duplicates.changed import ascending
from eclectus.tasks.documents.shingles import overlaps, shingle_sets
from eclectus.tasks.documents.table import first_rows, parts
from eclectus.tasks.over_parts import Done, Part, forget, key_of, over_parts

KNOWN, KNOWN_OVERLAPS, ROWS = "known.npy", "known_overlaps.npy", "rows.npy"
VALUES, BEGINS, OVERLAPS = "values.npy", "begins.npy", "overlaps.npy"
SECONDS_SHINGLE = 15e-6


def merge(
    out: Path,
    candidates: list[Path],
    known: Path | None,
    sketches: list[Path],
    threshold: float,
    begin: int,
    end: int,
    count: int,
) -> dict[str, Any]:
    """Pairs whose lower row is one of [begin, end): pairs.npy to compare, known.npy with known_overlaps.npy, and
    rows.npy, the documents of the former.

    candidates: files of pairs as `lower * count + higher`, sorted; those that their sketches (of each part) show to be
    far apart are left out. known: folder of pairs and overlaps.
    """
    here = [_between(mapped(path), begin * count, end * count) for path in candidates]
    found = ascending(here)
    del here
    there = np.zeros(len(found), bool)
    measured = np.empty(0)
    if known is not None:
        pairs, values = (mapped(known / name) for name in (PAIRS, OVERLAPS))
        first, last = np.searchsorted(pairs, (begin * count, end * count))
        pairs, values = np.asarray(pairs[first:last]), np.asarray(values[first:last])
        position = np.minimum(np.searchsorted(pairs, found), max(len(pairs) - 1, 0))
        there = pairs[position] == found if len(pairs) else there
        measured = values[position[there]] if len(pairs) else measured
    missing = found[~there]
    missing = missing[~far_apart(missing, PartMatrix(sketches), threshold)]
    rows = ascending([missing // count, missing % count]) if len(missing) else missing
    for name, each in ((PAIRS, missing), (KNOWN, found[there]), (KNOWN_OVERLAPS, measured), (ROWS, rows)):
        np.save(out / name, each)
    return {"pairs": len(missing), "known": int(there.sum())}


def shingle(out: Path, part: Path, wanted: list[Path], begin: int) -> dict[str, Any]:
    """The shingles of the documents of one part that stand in `wanted`, files of ascending rows. begin: the part's
    first row."""
    with pq.ParquetFile(part) as file:
        total = file.metadata.num_rows
        needed = np.zeros(total, bool)
        for path in wanted:
            needed[_between(mapped(path), begin, begin + total) - begin] = True
        values, sizes, last = [np.empty(0, np.uint32)], [np.zeros(1, np.int64)], 0
        for group in range(file.num_row_groups):
            first, last = last, last + file.metadata.row_group(group).num_rows
            here = np.flatnonzero(needed[first:last])
            if len(here):
                texts = file.read_row_group(group, columns=["text"])["text"]
                sets, begins = shingle_sets(texts.take(here).to_pylist())
                values.append(sets)
                sizes.append(np.diff(begins))
    np.save(out / ROWS, begin + np.flatnonzero(needed))
    np.save(out / VALUES, np.concatenate(values))
    np.save(out / BEGINS, np.cumsum(np.concatenate(sizes)))
    return {"documents": int(needed.sum())}


def compare(out: Path, pairs: Path, shingled: list[Path], firsts: list[int], number: int) -> dict[str, Any]:
    """overlaps.npy, float64 [P] of the pairs in `pairs`, whose lower rows are documents of part `number`.

    shingled: folder of each part. firsts: the first row of each part, and the number of all rows.
    """
    codes = np.load(pairs)
    lower, higher = codes // firsts[-1], codes % firsts[-1]
    values = np.empty(len(codes))
    part_of = np.searchsorted(firsts, higher, side="right") - 1
    ours = _sets(shingled[number])
    by_part = np.argsort(part_of, kind="stable")
    ends = np.searchsorted(part_of[by_part], np.arange(len(shingled) + 1))
    for other, (begin, end) in enumerate(pairwise(ends.tolist())):
        if end > begin:
            here = by_part[begin:end]
            values[here] = _overlaps_of(ours, _sets(shingled[other]), lower[here], higher[here])
    np.save(out / OVERLAPS, values)
    return {"pairs": len(codes)}


class TextOverlaps:
    """Overlaps of any pairs of documents, whose texts are read once."""

    def __init__(self, documents: Artifact, workers: int) -> None:
        self._documents, self._workers = documents, workers
        self._firsts = first_rows(documents)
        self._read: list[Done] = []

    def read(self, rows: np.ndarray) -> None:
        """Reads the texts of these rows, ascending, part by part."""
        digests, work = self._documents.digests(), []
        key = key_of("rows", hashlib.sha256(rows.tobytes()).hexdigest())
        (saved,) = over_parts(save_rows, [Part(key, {"rows": rows})], "ordering documents", workers=1)
        for path, (begin, end) in zip(parts(self._documents), pairwise(self._firsts.tolist()), strict=True):
            work.append(
                Part(
                    key_of("shingle", digests[f"documents/{path.name}"], begin, key),
                    {"part": path, "wanted": [saved.file(ROWS)], "begin": begin},
                    int(np.diff(np.searchsorted(rows, (begin, end)))[0]),
                    f"shingles of {path.name}",
                )
            )
        self._read = over_parts(
            shingle, work, "reading near-duplicates", seconds=SECONDS_SHINGLE, workers=self._workers
        )
        forget([saved])

    def of(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Overlaps float64 [P] of pairs of rows that were read."""
        lower, higher = np.minimum(one, other), np.maximum(one, other)
        values = np.empty(len(one))
        count = len(self._read)
        pair_of_parts = (np.searchsorted(self._firsts, lower, side="right") - 1) * count
        pair_of_parts += np.searchsorted(self._firsts, higher, side="right") - 1
        order = np.argsort(pair_of_parts, kind="stable")
        for each in np.unique(pair_of_parts).tolist():
            first, last = np.searchsorted(pair_of_parts[order], (each, each + 1))
            here = order[first:last]
            ours, theirs = (_sets(self._read[number].folder) for number in divmod(each, count))
            values[here] = _overlaps_of(ours, theirs, lower[here], higher[here])
        return values

    def forget(self) -> None:
        """Removes what was read."""
        forget(self._read)


def save_rows(out: Path, rows: np.ndarray) -> dict[str, Any]:
    """Writes row numbers for the calls that need some of them."""
    np.save(out / ROWS, rows)
    return {}


Sets = tuple[np.ndarray, np.ndarray, np.ndarray]


def _overlaps_of(ours: Sets, theirs: Sets, lower: np.ndarray, higher: np.ndarray) -> np.ndarray:
    """Overlaps float64 [P] of pairs of rows, the lower of `ours`, the higher of `theirs`."""
    positions = [np.searchsorted(sets[2], rows) for sets, rows in ((ours, lower), (theirs, higher))]
    return overlaps(ours[:2], theirs[:2], np.stack(positions, axis=1))


def _sets(folder: Path) -> Sets:
    """Shingles, where those of each document begin, and the documents' rows."""
    values = np.asarray(mapped(folder / VALUES))
    return values, np.load(folder / BEGINS), np.load(folder / ROWS)


def _between(values: np.ndarray, begin: int, end: int) -> np.ndarray:
    """Those of ascending values in [begin, end)."""
    first, last = np.searchsorted(values, (begin, end))
    return np.asarray(values[first:last])
