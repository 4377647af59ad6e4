"""Near-duplicates: pairs of neighbours with a high cosine, confirmed by the overlap of their whole texts.

    candidates    neighbour lists, cosine >= threshold
    overlap       Jaccard similarity of the sets of 5-character shingles (scikit-learn's HashingVectorizer), candidates only
    survivors     held-out documents first, then the longest, then the lowest row: a document is dropped if it is near, in
                  cosine and in text, to one that stays: a neighbour, the original of a dropped neighbour, or one of the
                  SURVIVORS longest of its cluster (more copies than a list has places form a cluster)

Price: about 1 MB of candidate text a second to shingle, and one sparse product row a pair; documents without a close
neighbour cost nothing.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np

from storage.artifact import Artifact
from tasks.nearest import similarities_of, unit
from tasks.texts import TextReader

SHINGLE = 5
FEATURES = 2**24
TEXTS_AT_A_TIME = 2_048
PAIRS_AT_A_TIME = 8_192
SURVIVORS = 16


@dataclass(frozen=True)
class Duplicate:
    """Document `row` repeats document `duplicate_of`, which stays. similarity: cosine. overlap: Jaccard of shingles."""

    row: int
    duplicate_of: int
    similarity: float
    overlap: float


def candidate_pairs(rows: np.ndarray, similarities: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Pairs int64 [P, 2] (lower row first, sorted, each once) of neighbours at least this similar, and their cosines [P]."""
    pairs, cosines = [np.empty((0, 2), np.int64)], [np.empty(0, np.float32)]
    for begin in range(0, len(rows), 2**16):
        part = similarities[begin : begin + 2**16]
        near, column = np.nonzero((part >= threshold) & (rows[begin : begin + 2**16] >= 0))
        other = rows[begin + near, column].astype(np.int64)
        pairs.append(np.sort(np.stack([begin + near, other], axis=1), axis=1))
        cosines.append(part[near, column])
    every, first = np.unique(np.concatenate(pairs), axis=0, return_index=True)
    return every, np.concatenate(cosines)[first]


class Shingles:
    """The shingle sets of some documents, as sparse binary rows."""

    def __init__(self, documents: Artifact, rows: np.ndarray) -> None:
        """rows: int64, the documents that will be compared."""
        import scipy.sparse
        from sklearn.feature_extraction.text import HashingVectorizer

        vectorizer = HashingVectorizer(
            analyzer="char",
            ngram_range=(SHINGLE, SHINGLE),
            n_features=FEATURES,
            binary=True,
            norm=None,
            alternate_sign=False,
            dtype=np.float32,
        )
        texts = TextReader(documents)
        self._place = {int(row): place for place, row in enumerate(rows)}
        blocks = [
            vectorizer.transform(texts.read(rows[begin : begin + TEXTS_AT_A_TIME]))
            for begin in range(0, len(rows), TEXTS_AT_A_TIME)
        ]
        self._sets = scipy.sparse.vstack(blocks, format="csr") if blocks else None
        self._sizes = np.diff(self._sets.indptr) if blocks else np.empty(0, np.int64)

    def overlaps(self, pairs: np.ndarray) -> np.ndarray:
        """Jaccard similarity float64 [P] of pairs of rows [P, 2]; two documents without any shingle do not overlap."""
        overlaps = np.zeros(len(pairs))
        for begin in range(0, len(pairs), PAIRS_AT_A_TIME):
            part = pairs[begin : begin + PAIRS_AT_A_TIME]
            a = np.array([self._place[int(row)] for row in part[:, 0]])
            b = np.array([self._place[int(row)] for row in part[:, 1]])
            common = np.asarray(self._sets[a].multiply(self._sets[b]).sum(axis=1)).ravel()
            union = self._sizes[a] + self._sizes[b] - common
            overlaps[begin : begin + len(part)] = np.divide(common, union, out=np.zeros(len(part)), where=union > 0)
        return overlaps


def near_duplicates(
    documents: Artifact,
    vectors: np.ndarray,
    neighbors: np.ndarray,
    similarities: np.ndarray,
    train: np.ndarray,
    heldout: np.ndarray,
    sizes: np.ndarray,
    similarity: float,
    overlap: float,
) -> list[Duplicate]:
    """The train documents to drop, by row; each names a document that stays, to which it is near itself.

    vectors: [N, D]. neighbors, similarities: [N, k]. train, heldout: bool [N]; held-out ones are never dropped, and
    documents that are neither play no part. sizes: bytes, int [N].
    similarity, overlap: what a pair must reach in cosine and in Jaccard similarity to be duplicates.
    """
    pairs, _ = candidate_pairs(neighbors, similarities, similarity)
    pairs = pairs[(train | heldout)[pairs].all(axis=1) & train[pairs].any(axis=1)]
    # Much shorter documents share too few shingles; texts that repeat themselves are why this is no tighter.
    lengths = np.sort(sizes[pairs], axis=1)
    pairs = pairs[lengths[:, 0] >= 0.5 * overlap * lengths[:, 1]]
    if len(pairs) == 0:
        return []
    judge = _Judge(vectors, Shingles(documents, np.unique(pairs)), similarity, overlap)
    judge.compare(pairs)
    edges = pairs[judge.confirmed(pairs)]
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
        best = None if heldout[row] else _most_alike(row, sorted(reached), judge)
        original[row] = row if best is None else best
        if best is None:
            others.append(row)
    return [
        Duplicate(row, kept, *judge.known[_key(row, kept)]) for row, kept in sorted(original.items()) if row != kept
    ]


def _clusters(edges: np.ndarray, count: int) -> np.ndarray:
    """A number for every document [N]: equal for those that edges [E, 2] connect."""
    import scipy.sparse
    from scipy.sparse.csgraph import connected_components

    ones = np.ones(len(edges), bool)
    graph = scipy.sparse.coo_matrix((ones, (edges[:, 0], edges[:, 1])), shape=(count, count))
    return connected_components(graph, directed=False)[1]


def _most_alike(row: int, survivors: list[int], judge: _Judge) -> int | None:
    """The survivor whose text overlaps most with the document `row`, of those near enough; None if none is."""
    unknown = [_key(row, kept) for kept in survivors if _key(row, kept) not in judge.known]
    judge.compare(np.array(unknown, np.int64).reshape(-1, 2))
    near = [each for each in survivors if judge.is_near(row, each)]
    return max(near, key=lambda each: (judge.known[_key(row, each)][::-1], -each)) if near else None


class _Judge:
    """Cosine and overlap of pairs, remembered."""

    def __init__(self, vectors: np.ndarray, shingles: Shingles, similarity: float, overlap: float) -> None:
        self._vectors, self._shingles, self._similarity, self._overlap = vectors, shingles, similarity, overlap
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
        overlaps = self._shingles.overlaps(pairs)
        for pair, cosine, overlap in zip(pairs.tolist(), cosines.tolist(), overlaps.tolist(), strict=True):
            self.known[tuple(pair)] = cosine, overlap

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
