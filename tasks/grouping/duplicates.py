"""Near-duplicates: pairs of neighbours with a high cosine, confirmed by the overlap of their whole texts.

    candidates    pairs in neighbour lists with cosine >= threshold
    overlap       Jaccard similarity of the sets of 5-character shingles, measured as in the split
                  (tasks/documents/shingles.py), for candidates only; overlaps measured earlier in this home are reused
                  by the two ids, so that a grown corpus measures new pairs only
    survivors     held-out documents first, then the longest, then the lowest row: a document is dropped if it is near,
                  in cosine and in text, to one that stays: a neighbour, the original of a dropped neighbour, or one of
                  the SURVIVORS longest of its cluster (more copies than a list has entries form a cluster)

Price: shingling about 10 MB of candidate text per second, and 10 microseconds per pair; documents without a close
neighbour cost nothing.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from eclectus.storage.artifact import Artifact, Draft
from eclectus.tasks.documents.digest_set import positions_of
from eclectus.tasks.documents.shingles import MEASURE, overlap, shingles
from eclectus.tasks.documents.text_reader import TextReader
from eclectus.tasks.grouping.nearest import Matrix, similarities_of, unit
from eclectus.tasks.reuse import earlier, is_whole

TEXTS_AT_A_TIME = 2_048
PAIRS_AT_A_TIME = 8_192
SURVIVORS = 16
OVERLAPS = "overlaps.parquet"


@dataclass(frozen=True)
class Duplicate:
    """Document `row` repeats document `duplicate_of`, which stays. similarity: cosine. overlap: Jaccard of shingles."""

    row: int
    duplicate_of: int
    similarity: float
    overlap: float


def candidate_pairs(rows: Matrix, similarities: Matrix, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Pairs int64 [P, 2] of neighbours at least this similar (lower row first, sorted, unique), and cosines [P]."""
    pairs, cosines = [np.empty((0, 2), np.int64)], [np.empty(0, np.float32)]
    for begin in range(0, len(rows), 2**16):
        part = similarities[begin : begin + 2**16]
        near, column = np.nonzero((part >= threshold) & (rows[begin : begin + 2**16] >= 0))
        other = rows[begin + near][np.arange(len(near)), column].astype(np.int64)
        pairs.append(np.sort(np.stack([begin + near, other], axis=1), axis=1))
        cosines.append(part[near, column])
    every, first = np.unique(np.concatenate(pairs), axis=0, return_index=True)
    return every, np.concatenate(cosines)[first]


class Overlaps:
    """Text overlap of pairs of documents: measured at the first request, reused from run to run."""

    def __init__(self, documents: Artifact, ids: np.ndarray) -> None:
        """ids: of all documents, bytes [N]."""
        self._ids = ids
        self._texts = TextReader(documents)
        self._shingles: dict[int, np.ndarray] = {}
        self._known: dict[tuple[int, int], float] = {}
        self.reused = 0

    def of(self, pairs: np.ndarray) -> np.ndarray:
        """Jaccard similarity float64 [P] of pairs of rows [P, 2], lower row first."""
        missing = [pair for pair in map(tuple, pairs.tolist()) if pair not in self._known]
        for begin in range(0, len(missing), PAIRS_AT_A_TIME):
            part = missing[begin : begin + PAIRS_AT_A_TIME]
            self._shingle(np.unique(np.array(part, np.int64)))
            for a, b in part:
                self._known[a, b] = overlap(self._shingles[a], self._shingles[b])
        return np.array([self._known[a, b] for a, b in pairs.tolist()], np.float64)

    def load_earlier(self, pairs: np.ndarray) -> None:
        """Loads overlaps of these pairs of rows [P, 2] from earlier groupings, after verifying their hashes."""
        keys = self._keys(pairs)
        for artifact in earlier("grouping", overlaps=MEASURE):
            missing = np.array([tuple(pair) not in self._known for pair in pairs.tolist()], bool)
            if not missing.any():
                return
            with contextlib.suppress(OSError, pa.ArrowException, KeyError):
                table = pq.read_table(artifact.file(OVERLAPS))
                first, second = (table[name].to_numpy().astype("S32") for name in ("document", "other"))
                position = positions_of(keys, np.char.add(first, second))
                hit = np.flatnonzero((position >= 0) & missing)
                if len(hit) and is_whole(artifact):
                    found = table["overlap"].to_numpy()[position[hit]].tolist()
                    self._known |= dict(zip(map(tuple, pairs[hit].tolist()), found, strict=True))
        self.reused = len(self._known)

    def write(self, out: Draft) -> None:
        """Writes all known overlaps for later runs: document, other (ids, the smaller first), overlap; sorted."""
        pairs = np.array(list(self._known), np.int64).reshape(-1, 2)
        keys = self._keys(pairs)
        order = np.argsort(keys, kind="stable")
        ids = keys[order].view("S32").reshape(-1, 2)
        columns = {
            "document": pa.array(ids[:, 0]).cast(pa.string()),
            "other": pa.array(ids[:, 1]).cast(pa.string()),
            "overlap": np.array(list(self._known.values()), np.float64)[order],
        }
        pq.write_table(pa.table(columns), out.file(OVERLAPS), compression="zstd")

    def _keys(self, pairs: np.ndarray) -> np.ndarray:
        """Both ids of each pair as one string, the smaller first: bytes [P]."""
        ids = np.sort(self._ids[pairs].reshape(-1, 2), axis=1)
        return np.char.add(ids[:, 0], ids[:, 1])

    def _shingle(self, rows: np.ndarray) -> None:
        rows = np.array([row for row in rows.tolist() if row not in self._shingles], np.int64)
        for begin in range(0, len(rows), TEXTS_AT_A_TIME):
            part = rows[begin : begin + TEXTS_AT_A_TIME]
            self._shingles |= dict(zip(part.tolist(), map(shingles, self._texts.read(part)), strict=True))


def near_duplicates(
    overlaps: Overlaps,
    vectors: Matrix,
    neighbors: Matrix,
    similarities: Matrix,
    train: np.ndarray,
    heldout: np.ndarray,
    sizes: np.ndarray,
    similarity: float,
    overlap: float,
) -> list[Duplicate]:
    """The train documents to drop, by row; each names a document that stays, to which it is near.

    vectors: [N, D]. neighbors, similarities: [N, k]. train, heldout: bool [N]; held-out ones are never dropped, and
    documents that are neither are ignored. sizes: bytes, int [N].
    similarity, overlap: thresholds of cosine and Jaccard similarity for a pair of duplicates.
    """
    pairs, _ = candidate_pairs(neighbors, similarities, similarity)
    pairs = pairs[(train | heldout)[pairs].all(axis=1) & train[pairs].any(axis=1)]
    # Much shorter documents share too few shingles. Not tighter than 0.5, because texts may repeat themselves.
    lengths = np.sort(sizes[pairs], axis=1)
    pairs = pairs[lengths[:, 0] >= 0.5 * overlap * lengths[:, 1]]
    if len(pairs) == 0:
        return []
    overlaps.load_earlier(pairs)
    comparison = _PairComparison(vectors, overlaps, similarity, overlap)
    comparison.compare(pairs)
    edges = pairs[comparison.confirmed(pairs)]
    near: dict[int, list[int]] = defaultdict(list)
    for a, b in edges.tolist():
        near[a].append(b)
        near[b].append(a)
    cluster = _clusters(edges, len(train))
    original: dict[int, int] = {}
    survivors: dict[int, list[int]] = defaultdict(list)
    for row in sorted(near, key=lambda row: (not heldout[row], -sizes[row], row)):
        others = survivors[int(cluster[row])]
        reached = {original[other] for other in near[row] if other in original} | set(others[:SURVIVORS])
        best = None if heldout[row] else _most_alike(row, sorted(reached), comparison)
        original[row] = row if best is None else best
        if best is None:
            others.append(row)
    return [
        Duplicate(row, kept, *comparison.known[_key(row, kept)])
        for row, kept in sorted(original.items())
        if row != kept
    ]


def _clusters(edges: np.ndarray, count: int) -> np.ndarray:
    """Cluster number of every document [N]: equal for documents that edges [E, 2] connect."""
    import scipy.sparse
    from scipy.sparse.csgraph import connected_components

    ones = np.ones(len(edges), bool)
    graph = scipy.sparse.coo_matrix((ones, (edges[:, 0], edges[:, 1])), shape=(count, count))
    return connected_components(graph, directed=False)[1]


def _most_alike(row: int, survivors: list[int], comparison: _PairComparison) -> int | None:
    """The survivor, among those near enough, whose text overlaps most with document `row`; None if there is none."""
    unknown = [_key(row, kept) for kept in survivors if _key(row, kept) not in comparison.known]
    comparison.compare(np.array(unknown, np.int64).reshape(-1, 2))
    near = [each for each in survivors if comparison.is_near(row, each)]
    return max(near, key=lambda each: (comparison.known[_key(row, each)][::-1], -each)) if near else None


class _PairComparison:
    """Cosine and overlap of pairs, cached."""

    def __init__(self, vectors: Matrix, overlaps: Overlaps, similarity: float, overlap: float) -> None:
        self._vectors, self._overlaps, self._similarity, self._overlap = vectors, overlaps, similarity, overlap
        self.known: dict[tuple[int, int], tuple[float, float]] = {}

    def compare(self, pairs: np.ndarray) -> None:
        """pairs: int [P, 2], lower row first."""
        if len(pairs) == 0:
            return
        cosines = np.concatenate(
            [
                similarities_of(self._vectors, unit(self._vectors, part[:, 0]), part[:, 1:])[:, 0]
                for part in np.array_split(pairs, 1 + len(pairs) // PAIRS_AT_A_TIME)
            ]
        )
        overlaps = self._overlaps.of(pairs)
        for pair, *measured in zip(pairs.tolist(), cosines.tolist(), overlaps.tolist(), strict=True):
            self.known[tuple(pair)] = measured[0], measured[1]

    def is_near(self, a: int, b: int) -> bool:
        cosine, overlap = self.known[_key(a, b)]
        return cosine >= self._similarity and overlap >= self._overlap

    def confirmed(self, pairs: np.ndarray) -> np.ndarray:
        return np.array([self.is_near(a, b) for a, b in pairs.tolist()], bool)


def _key(a: int, b: int) -> tuple[int, int]:
    return (a, b) if a < b else (b, a)


def as_columns(duplicates: list[Duplicate], ids: np.ndarray) -> dict[str, Any]:
    """The duplicates as columns, with the documents' ids [N]."""
    rows = np.array([each.row for each in duplicates], np.int64)
    kept = np.array([each.duplicate_of for each in duplicates], np.int64)
    return {
        "row": rows,
        "document": ids[rows].astype(str),
        "duplicate_of_row": kept,
        "duplicate_of": ids[kept].astype(str),
        "similarity": np.array([each.similarity for each in duplicates], np.float32),
        "overlap": np.array([each.overlap for each in duplicates], np.float32),
    }
