"""Near-duplicates of a whole corpus by their texts alone, found before anything is trained.

    sketches      256 bytes of each document, part by part (sketches.py)
    candidates    documents that agree in all bytes of one of many bands; within a group of such documents each with
                  its neighbours in the order of the following bytes, and with the group's first: linear in its size;
                  pairs far below the threshold by the share of equal bytes (standard deviation 0.03) are dropped
                  (candidates.py)
    overlaps      of the candidates, exact (overlaps.py)

A band is as wide as it can be while a pair at the threshold agrees in one of them with a probability of 0.995. So of a
cluster of many copies not every pair is found, but each copy with the first of them.

All of it works part by part, and band by band (tasks/over_parts.py). A corpus that has grown reads its new documents
only, forms only the groups again in which a document is new or gone (changed.py), and compares only pairs of which the
overlap was not measured before (earlier.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from eclectus.storage.artifact import Artifact
from eclectus.tasks.disk_matrix import mapped
from eclectus.tasks.documents.near_duplicates.candidates import PAIRS, band_pairs, bands_of
from eclectus.tasks.documents.near_duplicates.changed import read_band_pairs, write_band_pairs
from eclectus.tasks.documents.near_duplicates.earlier import RANK, RECORDED, carry_over, earlier_comparison
from eclectus.tasks.documents.near_duplicates.overlaps import (
    KNOWN,
    KNOWN_OVERLAPS,
    OVERLAPS,
    ROWS,
    SECONDS_SHINGLE,
    compare,
    merge,
    shingle,
)
from eclectus.tasks.documents.near_duplicates.sketches import ROWS as SKETCHES
from eclectus.tasks.documents.near_duplicates.sketches import sketch_key, sketched_parts
from eclectus.tasks.documents.shingles import MEASURE
from eclectus.tasks.documents.table import first_rows, parts
from eclectus.tasks.over_parts import Done, Part, find, forget, key_of, link_or_copy, over_parts

LOWEST = 0.5
ROWS_AT_A_TIME = 2**18
DOCUMENTS_PER_RANGE = 20_000_000
DOCUMENTS_PER_CALL = 2_000_000
SECONDS_BAND, SECONDS_CHANGED, SECONDS_PAIR = 8e-8, 5e-9, 5e-6
MOST_BAND_PAIRS = 64
"""Pairs of bands per document that are kept for a later corpus; with more, it sorts all bands again."""
SCHEMA = pa.schema([("row", pa.int64()), ("other", pa.int64()), ("overlap", pa.float64())])


def write_near_duplicates(
    documents: Artifact, rank: np.ndarray, threshold: float, target: Path, workers: int = 0
) -> dict[str, str]:
    """Writes a Parquet file of the near-duplicates: row, other (lower row first, sorted), overlap >= `threshold`.

    rank: int [N], distinct, order in which documents of a group go first, the highest first; below 0 are documents that
    are not compared. threshold: from LOWEST on, under which no band would find most of the pairs.
    Returns statistics by which a later corpus finds what was compared.
    """
    threshold = max(threshold, LOWEST)
    before = earlier_comparison()
    sketched = sketched_parts(documents, before.about["sketches"] if before else [], workers)
    work = _Comparison(documents, sketched, rank, threshold, workers)
    compared = find(work.key) or work.compared(rank, before)
    writer = pq.ParquetWriter(target, SCHEMA.with_metadata({"threshold": repr(threshold), "measure": MEASURE}))
    with writer:
        codes, overlaps = (mapped(compared.file(name)) for name in (PAIRS, OVERLAPS))
        for begin in range(0, len(codes), ROWS_AT_A_TIME):
            measured = np.asarray(overlaps[begin : begin + ROWS_AT_A_TIME])
            near = measured >= threshold
            columns = np.divmod(codes[begin : begin + ROWS_AT_A_TIME][near], work.count)
            writer.write_table(pa.table([*columns, measured[near]], schema=SCHEMA))
    return {"compared_by": RECORDED, "compared": work.key}


def read_pairs(path: Path) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The pairs of such a file, block by block: lower rows, higher rows, overlaps."""
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(ROWS_AT_A_TIME):
            yield batch["row"].to_numpy(), batch["other"].to_numpy(), batch["overlap"].to_numpy()


def threshold_of(path: Path) -> float:
    """The overlap from which such a file lists pairs; infinity where there is none, or it was measured otherwise."""
    if not path.is_file():
        return np.inf
    metadata = pq.read_schema(path).metadata or {}
    return float(metadata[b"threshold"]) if metadata.get(b"measure") == MEASURE.encode() else np.inf


class _Comparison:
    """One corpus at one threshold. firsts: first row of each part, and the number of all rows."""

    def __init__(
        self, documents: Artifact, sketched: list[Done], rank: np.ndarray, threshold: float, workers: int
    ) -> None:
        self.paths, self.threshold, self.workers = parts(documents), threshold, workers
        self.firsts = first_rows(documents).tolist()
        self.count = max(self.firsts[-1], 1)
        self.sketched = [each.folder for each in sketched]
        digests = documents.digests()
        self.sketch_keys = [sketch_key(digests[f"documents/{path.name}"]) for path in self.paths]
        self.rank_key = key_of("rank", hashlib.sha256(np.ascontiguousarray(rank).data).hexdigest(), str(rank.dtype))
        self.key = key_of(RECORDED, self.sketch_keys, self.rank_key, threshold)

    def compared(self, rank: np.ndarray, before: Done | None) -> Done:
        """All candidates with their overlaps. before: the same of an earlier corpus."""
        (saved,) = over_parts(save_rank, [Part(self.rank_key, {"rank": rank})], "ordering documents", workers=1)
        carried = self._carried(before, saved) if before else None
        banded = carried if carried and carried.about["banded"] else None
        ranges = 1 if banded else -(-self.count // DOCUMENTS_PER_RANGE)
        bands = self._candidates(saved, ranges, banded)
        merged = self._merged(bands, carried)
        gathered = self._overlaps(merged, bands, ranges, saved)
        forget([saved, *bands, *merged, *([carried] if carried else [])])
        return gathered

    def _candidates(self, saved: Done, ranges: int, banded: Done | None) -> list[Done]:
        """Files of candidates, of some bands each. banded: what `Changed` reads."""
        bands, seconds = bands_of(self.threshold), SECONDS_CHANGED if banded else SECONDS_BAND
        together = max(1, min(len(bands), int(DOCUMENTS_PER_CALL * SECONDS_BAND / seconds) // self.count))
        work = []
        for begin in range(0, len(bands), together):
            for number in range(ranges):
                arguments = {
                    "sketches": self.sketched,
                    "rank": saved.file(RANK),
                    "bands": bands[begin : begin + together],
                    "threshold": self.threshold,
                    "share": (number, ranges),
                    "before": banded.folder if banded else None,
                }
                band_key = key_of("band 3", self.key, begin, together, number, ranges)
                size = len(bands[begin : begin + together]) * self.count // ranges
                work.append(Part(band_key, arguments, size, f"bands from byte {bands[begin]}"))
        return over_parts(band_pairs, work, "looking for candidates", "sketches", seconds=seconds, workers=self.workers)

    def _overlaps(self, merged: list[Done], bands: list[Done], ranges: int, saved: Done) -> Done:
        """The overlaps of all candidates, with the pairs of each band, in `ranges`, and the order by rank."""
        wanted = [each.file(ROWS) for each in merged]
        work = [
            Part(
                key_of("shingle", self.key, number, begin),
                {"part": path, "wanted": wanted, "begin": begin},
                end - begin,
                f"shingles of {path.name}",
            )
            for number, (path, (begin, end)) in enumerate(zip(self.paths, pairwise(self.firsts), strict=True))
        ]
        shingled = over_parts(shingle, work, "reading near-duplicates", seconds=SECONDS_SHINGLE, workers=self.workers)
        work = [
            Part(
                key_of("compare", self.key, number),
                {
                    "pairs": each.file(PAIRS),
                    "shingled": [other.folder for other in shingled],
                    "firsts": self.firsts,
                    "number": number,
                },
                each.about["pairs"],
                f"near-duplicates of {path.name}",
            )
            for number, (path, each) in enumerate(zip(self.paths, merged, strict=True))
        ]
        compared = over_parts(
            compare, work, "comparing near-duplicates", "pairs", seconds=SECONDS_PAIR, workers=self.workers
        )
        arguments = {
            "merged": [each.folder for each in merged],
            "compared": [each.folder for each in compared],
            "bands": [each.folder for each in bands],
            "ranges": ranges,
            "rank": saved.file(RANK),
            "about": {"sketches": self.sketch_keys, "key": self.key, "threshold": self.threshold},
        }
        (gathered,) = over_parts(gather, [Part(self.key, arguments)], "near-duplicates", "files", workers=1)
        forget([*shingled, *compared])
        return gathered

    def _merged(self, bands: list[Done], carried: Done | None) -> list[Done]:
        """The candidates by part, those of which the overlap is known apart."""
        known = carried.folder if carried else None
        work = [
            Part(
                key_of("merge 2", self.key, number),
                {
                    "candidates": [each.file(PAIRS) for each in bands],
                    "known": known,
                    "sketches": [folder / SKETCHES for folder in self.sketched],
                    "threshold": self.threshold,
                    "begin": begin,
                    "end": end,
                    "count": self.count,
                },
                end - begin,
                f"candidates of {path.name}",
            )
            for number, (path, (begin, end)) in enumerate(zip(self.paths, pairwise(self.firsts), strict=True))
        ]
        return over_parts(merge, work, "sorting candidates", seconds=SECONDS_BAND, workers=self.workers)

    def _carried(self, before: Done, saved: Done) -> Done | None:
        """The known overlaps of pairs of an earlier corpus, and its pairs of bands."""
        theirs = [find(key) for key in before.about["sketches"]]
        folders = [each.folder for each in theirs if each]
        if len(folders) < len(theirs):
            return None
        numbers = {key: number for number, key in enumerate(self.sketch_keys)}
        same = [numbers.get(key, -1) for key in before.about["sketches"]]
        arguments = {"compared": before.folder, "theirs": folders, "ours": self.sketched, "same": same}
        arguments |= {"rank": saved.file(RANK), "banded": before.about.get("threshold") == self.threshold}
        key = key_of("carry over 2", self.key, before.about["key"])
        return over_parts(carry_over, [Part(key, arguments)], "earlier near-duplicates", "files", workers=1)[0]


def save_rank(out: Path, rank: np.ndarray) -> dict[str, Any]:
    """Writes the order in which documents of a group go first."""
    np.save(out / RANK, rank)
    return {}


def gather(
    out: Path,
    merged: list[Path],
    compared: list[Path],
    bands: list[Path],
    ranges: int,
    rank: Path,
    about: dict[str, Any],
) -> dict[str, Any]:
    """All pairs in order, with their overlaps: pairs.npy and overlaps.npy; the pairs of each band, unless these are
    very many, and rank.npy. bands: folders of `band_pairs`, `ranges` for each of its bands."""
    total = sum(len(mapped(folder / name)) for folder in merged for name in (PAIRS, KNOWN))
    pairs = np.lib.format.open_memmap(out / PAIRS, "w+", np.int64, (total,))
    overlaps = np.lib.format.open_memmap(out / OVERLAPS, "w+", np.float64, (total,))
    done = 0
    for ours, theirs in zip(merged, compared, strict=True):
        codes = np.concatenate([np.load(ours / PAIRS), np.load(ours / KNOWN)])
        measured = np.concatenate([np.load(theirs / OVERLAPS), np.load(ours / KNOWN_OVERLAPS)])
        order = np.argsort(codes)
        pairs[done : done + len(codes)] = codes[order]
        overlaps[done : done + len(codes)] = measured[order]
        done += len(codes)
    link_or_copy(rank, out / RANK)
    by_call = [read_band_pairs(folder) for folder in bands]
    if sum(each.size for call in by_call for each in call) <= MOST_BAND_PAIRS * len(mapped(rank)):
        write_band_pairs(out, _bands(by_call, ranges))
    return {**about, "pairs": total}


def _bands(by_call: list[list[np.ndarray]], ranges: int) -> Iterator[np.ndarray]:
    """The pairs of each band, sorted. by_call: of each call the pairs of its bands, `ranges` calls for each of them."""
    for begin in range(0, len(by_call), ranges):
        for of_ranges in zip(*by_call[begin : begin + ranges], strict=True):
            yield of_ranges[0] if ranges == 1 else np.sort(np.concatenate(of_ranges))
