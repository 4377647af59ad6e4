"""Near-duplicates that are dropped: pairs of the whole corpus that are alike in text and in embedding.

    pairs         those of the split (near_duplicates.parquet of the documents), of which the overlap is at least
                  `duplicate_overlap` and the cosine at least `duplicate_similarity`. Where the documents lack them, or
                  have those of a higher threshold, they are found by the same function
    survivors     held-out documents first, then the longest, then the lowest row: a document is dropped if it is near,
                  in cosine and in text, to one that stays: in a pair of its own, or one of the SURVIVORS first of its
                  cluster, or, in a cluster of more survivors, the original of one that it is near to

A cluster is what pairs connect. Its documents are compared with its first, those that are not near that with the first
of the rest, and so on: a cluster of many copies has few survivors, so a copy takes part in few comparisons.
Price: 30 microseconds per pair, nearly all of it for the cosine; 15 per document of a cluster of three or more, whose
text is read. Memory: 40 bytes per pair.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from eclectus.storage.artifact import Artifact
from eclectus.tasks.compiled import compiled
from eclectus.tasks.documents.digest_set import distinct, positions_of
from eclectus.tasks.documents.near_duplicates import LOWEST, read_pairs, threshold_of, write_near_duplicates
from eclectus.tasks.documents.near_duplicates.overlaps import TextOverlaps
from eclectus.tasks.documents.table import NEAR_DUPLICATES, ids_of, parts, read_part_table, read_rows
from eclectus.tasks.grouping.nearest import Matrix, unit

SURVIVORS = 16
HOPS = 8
PAIRS_AT_A_TIME, PAIRS_OF_A_PRODUCT = 32_768, 256
UNDECIDED, STAYS, DROPPED = range(3)


@dataclass(frozen=True)
class Duplicates:
    """Documents `rows`, ascending, that repeat documents `originals`, which stay; cosines and overlaps of the two."""

    rows: np.ndarray
    originals: np.ndarray
    similarities: np.ndarray
    overlaps: np.ndarray

    @classmethod
    def none(cls) -> Duplicates:
        return cls(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0))

    def __len__(self) -> int:
        return len(self.rows)

    def write(self, documents: Artifact, path: Path) -> None:
        """Writes a Parquet file: row, document, duplicate_of_row, duplicate_of, similarity, overlap."""
        ids = read_rows(documents, np.concatenate([self.rows, self.originals]), ["document"])["document"]
        columns = {
            "row": self.rows,
            "document": ids[: len(self)],
            "duplicate_of_row": self.originals,
            "duplicate_of": ids[len(self) :],
            "similarity": self.similarities.astype(np.float32),
            "overlap": self.overlaps.astype(np.float32),
        }
        pq.write_table(pa.table(columns), path, compression="zstd")


def near_duplicates(
    documents: Artifact,
    vectors: Matrix,
    train: np.ndarray,
    heldout: np.ndarray,
    sizes: np.ndarray,
    similarity: float,
    overlap: float,
    workers: int = 0,
) -> Duplicates:
    """The train documents to drop; each names a document that stays, to which it is near.

    vectors: [N, D]; documents without embedding are no duplicates. train, heldout: bool [N]; held-out ones are never
    dropped, and documents that are neither are ignored. sizes: bytes, int [N].
    similarity, overlap: thresholds of cosine and Jaccard similarity for a pair of duplicates.
    """
    overlap = max(overlap, LOWEST)
    comparison = _Comparison(documents, vectors, similarity, overlap, workers)
    with tempfile.TemporaryDirectory() as folder:
        pairs = documents.file(NEAR_DUPLICATES)
        if threshold_of(pairs) > overlap:
            pairs = Path(folder) / NEAR_DUPLICATES
            write_near_duplicates(documents, _ranks(documents, train | heldout), overlap, pairs, workers)
        for one, other, measured in read_pairs(pairs):
            here = (measured >= overlap) & (train[one] | train[other])
            here &= (train | heldout)[one] & (train | heldout)[other]
            # Much shorter documents are contained, not repeated. Not tighter than 0.5: texts may repeat themselves.
            short, long = np.minimum(sizes[one], sizes[other]), np.maximum(sizes[one], sizes[other])
            here &= short >= 0.5 * overlap * long
            comparison.add(one[here], other[here], measured[here])
    if not comparison.found:
        return Duplicates.none()
    return _Clusters(comparison, heldout, sizes).duplicates()


def _ranks(documents: Artifact, wanted: np.ndarray) -> np.ndarray:
    """An order of the wanted documents [N] by their ids, which are hashes; -1 for the others."""
    ids = np.concatenate([ids_of(read_part_table(path, ["document"])["document"]) for path in parts(documents)])
    rank = np.empty(len(ids), np.int64)
    rank[np.argsort(ids.view(">u8")[::2].astype(np.uint64), kind="stable")] = np.arange(len(ids))
    return np.where(wanted, rank, -1)


class _Comparison:
    """Pairs of rows that are alike in text, and which of them are near in cosine too."""

    def __init__(
        self,
        documents: Artifact,
        vectors: Matrix,
        similarity: float,
        overlap: float,
        workers: int,
    ) -> None:
        self._vectors, self._similarity, self._overlap = vectors, similarity, overlap
        self._texts = TextOverlaps(documents, workers)
        self.found: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, one: np.ndarray, other: np.ndarray, overlaps: np.ndarray) -> None:
        """Keeps those of these pairs [P] that are near in cosine."""
        cosines = self._cosines(one, other)
        here = cosines >= self._similarity
        if here.any():
            self.found.append((one[here], other[here], cosines[here], overlaps[here]))

    def read(self, rows: np.ndarray) -> None:
        """Reads the texts of the documents that `compare` will be asked about."""
        self._texts.read(rows)

    def compare(self, one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Which of these pairs of rows [P] are near, their cosines, and the overlaps of those near in cosine."""
        cosines, overlaps = self._cosines(one, other), np.zeros(len(one))
        near = cosines >= self._similarity
        overlaps[near] = self._texts.of(one[near], other[near])
        return near & (overlaps >= self._overlap), cosines, overlaps

    def forget(self) -> None:
        self._texts.forget()

    def _cosines(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        cosines = np.empty(len(one), np.float32)
        with np.errstate(invalid="ignore", divide="ignore"):
            for begin in range(0, len(one), PAIRS_AT_A_TIME):
                here = slice(begin, begin + PAIRS_AT_A_TIME)
                rows, place = np.unique(np.concatenate([one[here], other[here]]), return_inverse=True)
                # Read once, for a document may be in many pairs.
                vectors, (queries, others) = unit(self._vectors, rows), place.reshape(2, -1)
                for first in range(0, len(queries), PAIRS_OF_A_PRODUCT):
                    part = slice(first, first + PAIRS_OF_A_PRODUCT)
                    products = np.einsum("nd,nmd->nm", vectors[queries[part]], vectors[others[part]][:, None])[:, 0]
                    cosines[begin + first : begin + first + len(products)] = np.minimum(products, 1)
        return cosines


class _Clusters:
    """Documents in clusters, of which some stay. Documents are numbered by their place in the order of survivors.

    rows: int64 [n], first the held-out ones, then the longest, then the lowest. one, other: numbers of near pairs, the
    one before the other; near: how near. known: pairs that were compared, as codes, sorted.
    """

    def __init__(self, comparison: _Comparison, heldout: np.ndarray, sizes: np.ndarray) -> None:
        one, other, cosines, overlaps = (np.concatenate(each) for each in zip(*comparison.found, strict=True))
        rows = distinct(np.concatenate([one, other]))
        order = np.lexsort((rows, -sizes[rows].astype(np.int64), ~heldout[rows]))
        self.rows, self.comparison = rows[order], comparison
        self.count, self.held = len(rows), heldout[self.rows]
        number = np.empty(len(rows), np.int64)
        number[order] = np.arange(len(rows))
        ends = np.stack([number[np.searchsorted(rows, each)] for each in (one, other)], axis=1)
        ends.sort(axis=1)
        self.one, self.other = ends.T.copy()
        self.cosines, self.overlaps = cosines, overlaps
        self.known = np.sort(self.one * self.count + self.other)
        self.cluster = self._connected()
        self.state = np.where(self.held, STAYS, UNDECIDED).astype(np.int8)

    def duplicates(self) -> Duplicates:
        self._read_large()
        for number in range(SURVIVORS):
            if not (self.state == UNDECIDED).any():
                break
            self._compare_with_survivor(number)
        # In clusters of more survivors the rest is decided by pairs, and by the originals of what they are near to.
        undecided = self.state == UNDECIDED
        for _ in range(HOPS if undecided.any() else 0):
            self.state[undecided] = UNDECIDED
            _decide(self.state, *self._by_other())
            if not self._compare_with_originals(undecided):
                break
        if undecided.any():
            self.state[undecided] = UNDECIDED
            _decide(self.state, *self._by_other())
        self.comparison.forget()
        return self._named()

    def _connected(self) -> np.ndarray:
        """Cluster of every document [n]: equal for documents that pairs connect."""
        import scipy.sparse
        from scipy.sparse.csgraph import connected_components

        ones = np.ones(len(self.one), bool)
        graph = scipy.sparse.coo_matrix((ones, (self.one, self.other)), shape=(self.count, self.count))
        return connected_components(graph, directed=False)[1]

    def _read_large(self) -> None:
        """Reads the documents of clusters in which not every pair is known."""
        size = np.bincount(self.cluster)
        pairs = np.bincount(self.cluster[self.one], minlength=len(size))
        self.comparison.read(np.sort(self.rows[(pairs < size * (size - 1) // 2)[self.cluster]]))

    def _compare_with_survivor(self, number: int) -> None:
        """Drops what is near to this survivor of its cluster: the next held-out document, or the first undecided."""
        first = self._survivor(number)
        here = np.flatnonzero((self.state == UNDECIDED) & (first[self.cluster] >= 0))
        one = first[self.cluster[here]]
        self.state[one] = STAYS
        here, one = here[one < here], one[one < here]
        self._learn(one, here)
        near = self._near_codes()
        codes = one * self.count + here
        place = np.minimum(np.searchsorted(near, codes), len(near) - 1)
        self.state[here[near[place] == codes]] = DROPPED

    def _survivor(self, number: int) -> np.ndarray:
        """Of each cluster its survivor of this number in the order, or else its first undecided document; -1: none."""
        alive = np.flatnonzero(self.state != DROPPED)
        by_cluster = alive[np.argsort(self.cluster[alive], kind="stable")]
        begins = np.searchsorted(self.cluster[by_cluster], np.arange(self.cluster.max() + 2))
        place = begins[:-1] + number
        there = place < begins[1:]
        return np.where(there, by_cluster[np.minimum(place, len(by_cluster) - 1)], -1)

    def _compare_with_originals(self, undecided: np.ndarray) -> bool:
        """Compares those that stay by now with the originals of what they are near to; whether any pair was new."""
        original = np.full(self.count, -1)
        rows, originals = self._best()
        original[rows] = originals
        ends = [(self.one, self.other), (self.other, self.one)]
        one = np.concatenate([original[via] for via, _ in ends])
        other = np.concatenate([here for _, here in ends])
        wanted = (one >= 0) & (one < other) & undecided[other] & (self.state[other] == STAYS)
        return self._learn(one[wanted], other[wanted]) > 0

    def _learn(self, one: np.ndarray, other: np.ndarray) -> int:
        """Compares the pairs that are not known; returns their number."""
        codes = distinct(one * self.count + other)
        codes = codes[positions_of(codes, self.known, ascending=True) < 0]
        one, other = np.divmod(codes, self.count)
        near, cosines, overlaps = self.comparison.compare(self.rows[one], self.rows[other])
        self.known = np.sort(np.concatenate([self.known, codes]), kind="stable")
        self.one, self.other = np.append(self.one, one[near]), np.append(self.other, other[near])
        self.cosines, self.overlaps = np.append(self.cosines, cosines[near]), np.append(self.overlaps, overlaps[near])
        return len(codes)

    def _near_codes(self) -> np.ndarray:
        return np.sort(self.one * self.count + self.other)

    def _by_other(self) -> tuple[np.ndarray, np.ndarray]:
        """The near pairs in the order of their later documents."""
        order = np.argsort(self.other, kind="stable")
        return self.one[order], self.other[order]

    def _best(self) -> tuple[np.ndarray, np.ndarray]:
        """Each dropped document, and the survivor before it to which it is nearest: in text, then in cosine."""
        rows, pairs = self._best_pairs()
        return rows, self.one[pairs]

    def _best_pairs(self) -> tuple[np.ndarray, np.ndarray]:
        pairs = np.flatnonzero((self.state[self.other] == DROPPED) & (self.state[self.one] == STAYS))
        nearest = (-self.rows[self.one[pairs]], self.cosines[pairs], self.overlaps[pairs], self.other[pairs])
        pairs = pairs[np.lexsort(nearest)]
        rows = self.other[pairs]
        last = np.concatenate([rows[1:] != rows[:-1], [True]])[: len(rows)]
        return rows[last], pairs[last]

    def _named(self) -> Duplicates:
        numbers, pairs = self._best_pairs()
        order = np.argsort(self.rows[numbers])
        pairs = pairs[order]
        return Duplicates(
            self.rows[numbers[order]], self.rows[self.one[pairs]], self.cosines[pairs], self.overlaps[pairs]
        )


@compiled
def _decide(state: np.ndarray, one: np.ndarray, other: np.ndarray) -> None:
    """Drops undecided documents near to one before them that stays; the others stay. Pairs by their later document."""
    at = 0
    for document in range(len(state)):
        while at < len(other) and other[at] < document:
            at += 1
        if state[document] != 0:
            continue
        state[document] = 1
        while at < len(other) and other[at] == document:
            if state[one[at]] == 1:
                state[document] = 2
            at += 1
