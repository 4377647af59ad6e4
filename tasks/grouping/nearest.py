"""Nearest neighbours by cosine within one partition, with faiss: exact, or an inverted index whose recall is measured.

    exact     a blocked matrix product
    IVF       k-means centroids of a sample; `nprobe` is doubled until the recall of a sample of queries, against exact
              search, reaches the target
    shards    of a very large partition: one shard is in memory at a time, lists are merged shard by shard

The similarities of the pairs found are recomputed, always in the same way, so that they do not depend on blocks or
threads; ties go to the lower row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import Field

from eclectus.storage.artifact import Draft
from eclectus.tasks.disk_matrix import create_matrix
from eclectus.tasks.settings import SEED, RuntimeSetting, Settings

SLACK = 4
BLOCK = 4_096
EXACT_ROWS = 200_000
SAMPLE = 256
POINTS_PER_CENTROID = 64
ITERATIONS = 10


class NeighborSettings(Settings):
    """How neighbours are searched."""

    neighbors_k: int = Field(20, ge=1, description="Neighbours kept for each document.")
    neighbors_partition: Literal["language", "language+domain", "none"] = Field(
        "language",
        description="Scope of the neighbour search: a language, a domain of a language, or everything.",
    )
    neighbors_exact_below: int = Field(
        20_000, ge=0, description="Partitions with fewer documents are searched exactly, larger ones by an IVF index."
    )
    neighbors_recall_target: float = Field(
        0.95,
        gt=0,
        le=1,
        description="Share of the true neighbours that the IVF search must find, measured on a sample.",
    )
    neighbors_shard_rows: int = Field(
        2_000_000,
        ge=1_000,
        description="Documents whose index is held in memory at a time; larger partitions are searched in shards.",
    )
    neighbors_growth: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Earlier lists are updated while at most this share of a partition is new; 0 always searches.",
    )
    neighbors_threads: int = RuntimeSetting(0, "CPU threads for the search; 0 takes all.", ge=0)
    seed: int = SEED


@dataclass(frozen=True)
class Partition:
    """Documents that are searched together: `rows` int64, ascending."""

    name: str
    rows: np.ndarray


@dataclass
class Lists:
    """The neighbour lists of all documents, on disk: `rows` int [N, k], `similarities` float32 [N, k]."""

    rows: np.ndarray
    similarities: np.ndarray

    @classmethod
    def create(cls, out: Draft, count: int, k: int) -> Lists:
        kind = np.int32 if count < 2**31 else np.int64
        rows = create_matrix(out.file("neighbors.npy"), kind, (count, k))
        similarities = create_matrix(out.file("similarities.npy"), np.float32, (count, k))
        for begin in range(0, count, 2**16):
            rows[begin : begin + 2**16] = -1
            similarities[begin : begin + 2**16] = np.nan
        return cls(rows, similarities)

    def merge(self, rows: np.ndarray, found: np.ndarray, similarities: np.ndarray) -> None:
        """Merges candidates [n, m] for these documents [n] into their lists: best first, ties to the lower row."""
        k = self.rows.shape[1]
        found = np.concatenate([self.rows[rows], found], axis=1)
        similarities = np.concatenate([self.similarities[rows], similarities], axis=1)
        key = np.where(found < 0, -np.inf, similarities)
        best = np.lexsort((found, -key), axis=1)[:, :k]
        self.rows[rows] = np.take_along_axis(found, best, axis=1)
        self.similarities[rows] = np.take_along_axis(similarities, best, axis=1)

    def clear(self, rows: np.ndarray) -> None:
        """Empties the lists of these documents."""
        self.rows[rows] = -1
        self.similarities[rows] = np.nan

    def flush(self) -> None:
        for matrix in (self.rows, self.similarities):
            if isinstance(matrix, np.memmap):
                matrix.flush()


def search(vectors: np.ndarray, partition: Partition, lists: Lists, settings: NeighborSettings) -> dict[str, Any]:
    """Fills the lists of one partition; returns method, recall and, for an index, its parameters."""
    rows = partition.rows
    if len(rows) < settings.neighbors_exact_below or len(rows) <= settings.neighbors_k:
        for shard in _shards(rows, settings):
            _search_shard(vectors, rows, shard, _Exact(unit(vectors, shard)), lists, settings.neighbors_k)
        return {"method": "exact", "recall": 1.0}
    random = np.random.default_rng([settings.seed, len(rows)])
    centroids = train_centroids(vectors, rows, random, settings)
    queries, nprobe = recall_sample(rows, settings), 0
    for shard in _shards(rows, settings):
        index = _Inverted(unit(vectors, shard), centroids)
        nprobe = nprobe or _tune(index, unit(vectors, queries), settings)
        index.probe(nprobe)
        _search_shard(vectors, rows, shard, index, lists, settings.neighbors_k)
    return {
        "method": "ivf",
        "recall": round(measured_recall(vectors, rows, queries, lists, settings), 4),
        "centroids": len(centroids),
        "nprobe": nprobe,
        "shards": len(list(_shards(rows, settings))),
    }


def unit(vectors: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """These rows in memory, as unit vectors in float32 (embeddings may be stored in half precision)."""
    block = np.asarray(vectors[rows], np.float32)
    return block / np.sqrt((block * block).sum(axis=1, keepdims=True))


class _Exact:
    """Exact search over all vectors of a shard."""

    def __init__(self, vectors: np.ndarray) -> None:
        self.vectors = vectors

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        import faiss

        return faiss.knn(queries, self.vectors, min(k, len(self.vectors)), metric=faiss.METRIC_INNER_PRODUCT)[1]


class _Inverted(_Exact):
    """The vectors of a shard by nearest centroid; a search scans the `nprobe` nearest cells."""

    def __init__(self, vectors: np.ndarray, centroids: np.ndarray) -> None:
        import faiss

        super().__init__(vectors)
        quantizer = faiss.IndexFlatIP(vectors.shape[1])
        quantizer.add(centroids)
        self._index = faiss.IndexIVFFlat(quantizer, vectors.shape[1], len(centroids), faiss.METRIC_INNER_PRODUCT)
        self._index.add(vectors)

    def probe(self, nprobe: int) -> None:
        self._index.nprobe = nprobe

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        return self._index.search(queries, min(k, len(self.vectors)))[1]

    def exact(self, queries: np.ndarray, k: int) -> np.ndarray:
        return super().search(queries, k)


def train_centroids(
    vectors: np.ndarray, rows: np.ndarray, random: np.random.Generator, settings: NeighborSettings
) -> np.ndarray:
    """Centroids float32 [C, D] of a sample of the rows, C = 4 sqrt(rows)."""
    import faiss

    count = int(min(65_536, max(1, 4 * np.sqrt(len(rows))), len(rows)))
    sample = np.sort(random.choice(rows, min(len(rows), POINTS_PER_CENTROID * count), replace=False))
    kmeans = faiss.Kmeans(
        vectors.shape[1],
        count,
        niter=ITERATIONS,
        seed=settings.seed % 2**31,
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=POINTS_PER_CENTROID,
    )
    kmeans.train(unit(vectors, sample))
    if kmeans.centroids is None:
        raise RuntimeError("faiss trained no centroids")
    return kmeans.centroids


def _tune(index: _Inverted, queries: np.ndarray, settings: NeighborSettings) -> int:
    """The smallest power of two, or the number of cells, at which the sample's recall in this shard is high enough."""
    k = settings.neighbors_k + 1
    wanted = index.exact(queries, k)
    cells, nprobe = index._index.nlist, 1
    while True:
        index.probe(nprobe)
        if _share_found(index.search(queries, k), wanted) >= settings.neighbors_recall_target or nprobe >= cells:
            return nprobe
        nprobe = min(2 * nprobe, cells)


def recall_sample(rows: np.ndarray, settings: NeighborSettings) -> np.ndarray:
    """The rows, ascending, on which recall is measured."""
    random = np.random.default_rng([settings.seed, len(rows), 1])
    return np.sort(random.choice(rows, min(SAMPLE, len(rows)), replace=False))


def measured_recall(
    vectors: np.ndarray, rows: np.ndarray, queries: np.ndarray, lists: Lists, settings: NeighborSettings
) -> float:
    """Share of the exact neighbours of the queries (rows) that are in their lists."""
    exact = exact_neighbors(vectors, queries, rows, settings.neighbors_k)[0]
    return _share_found(lists.rows[queries], exact)


def exact_neighbors(
    vectors: np.ndarray, queries: np.ndarray, rows: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of `rows` for each of `queries` (row numbers): rows int64 [n, k], -1 is padding, and cosines."""
    lists = Lists(np.full((len(queries), k), -1), np.full((len(queries), k), np.nan, np.float32))
    sample = unit(vectors, queries)
    for begin in range(0, len(rows), EXACT_ROWS):
        shard = rows[begin : begin + EXACT_ROWS]
        found = shard[_Exact(unit(vectors, shard)).search(sample, k + 1 + SLACK)]
        found[found == queries[:, None]] = -1
        lists.merge(np.arange(len(queries)), found, similarities_of(vectors, sample, found))
    return lists.rows, lists.similarities


def _share_found(found: np.ndarray, wanted: np.ndarray) -> float:
    hits = sum(len(np.intersect1d(a[a >= 0], b[b >= 0])) for a, b in zip(found, wanted, strict=True))
    return hits / max(1, int((wanted >= 0).sum()))


def _shards(rows: np.ndarray, settings: NeighborSettings) -> Iterator[np.ndarray]:
    for begin in range(0, len(rows), settings.neighbors_shard_rows):
        yield rows[begin : begin + settings.neighbors_shard_rows]


def _search_shard(
    vectors: np.ndarray, queries: np.ndarray, shard: np.ndarray, index: _Exact, lists: Lists, k: int
) -> None:
    """Merges the best of `shard` (rows, searched by `index`) into the lists of `queries` (rows)."""
    for begin in range(0, len(queries), BLOCK):
        block = queries[begin : begin + BLOCK]
        sample = unit(vectors, block)
        positions = index.search(sample, k + 1 + SLACK)
        found = np.where(positions < 0, -1, shard[positions])
        found[found == block[:, None]] = -1
        lists.merge(block, found, similarities_of(vectors, sample, found))


def similarities_of(vectors: np.ndarray, queries: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Cosines float32 [n, m] of queries [n, D] with the rows found [n, m], NaN for -1; one dot product at a time."""
    similarities = np.full(found.shape, np.nan, np.float32)
    for begin in range(0, len(found), 256):
        rows = found[begin : begin + 256]
        block = unit(vectors, np.maximum(rows, 0).ravel()).reshape(*rows.shape, -1)
        cosines = np.einsum("nd,nmd->nm", queries[begin : begin + 256], block)
        similarities[begin : begin + 256] = np.where(rows < 0, np.nan, np.minimum(cosines, 1))
    return similarities
