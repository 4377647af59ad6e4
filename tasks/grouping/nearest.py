"""Nearest neighbours by cosine within one partition, exactly, with faiss: a blocked matrix product, shard by shard.

The similarities of the pairs found are recomputed, always in the same way, so that they do not depend on blocks or
threads; ties go to the lower row. Large partitions are searched by cells (`eclectus.tasks.grouping.cells`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import Field

from eclectus.storage.artifact import Draft
from eclectus.tasks.disk_matrix import PartMatrix, create_matrix
from eclectus.tasks.settings import SEED, CurationWorkerSettings, RuntimeSetting

Matrix = np.ndarray | PartMatrix
"""Embeddings [N, D], of which rows are read by their numbers."""

SLACK = 4
BLOCK = 4_096
EXACT_ROWS = 200_000


class NeighborSettings(CurationWorkerSettings):
    """How neighbours are searched."""

    neighbors_k: int = Field(20, ge=1, description="Neighbours kept for each document.")
    neighbors_partition: Literal["language", "language+domain", "none"] = Field(
        "language",
        description="Scope of the neighbour search: a language, a domain of a language, or everything.",
    )
    neighbors_exact_below: int = Field(
        20_000, ge=0, description="Partitions with fewer documents are searched exactly, larger ones by cells."
    )
    neighbors_recall_target: float = Field(
        0.98,
        gt=0,
        le=1,
        description="Share of the true neighbours that the search by cells must find, measured on a sample.",
    )
    neighbors_shard_rows: int = Field(
        2_000_000,
        ge=1_000,
        description="Documents that an exact search holds in memory at a time; larger partitions are searched in "
        "shards.",
    )
    neighbors_growth: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Earlier lists are updated while at most this share of a partition is new; 0 always searches.",
    )
    neighbors_device: Literal["cpu", "cuda"] = RuntimeSetting(
        "cpu", "Where cells are searched; cuda takes one GPU per block of cells."
    )
    neighbors_threads: int = RuntimeSetting(
        0, "CPU threads of an exact search, workers of a search by cells; 0 takes all.", ge=0
    )
    seed: int = SEED


@dataclass(frozen=True)
class Rows:
    """Some rows of a matrix, read by their numbers among them."""

    matrix: PartMatrix
    rows: np.ndarray

    def __getitem__(self, numbers: np.ndarray) -> np.ndarray:
        return self.matrix[self.rows[numbers]]


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


def search(
    vectors: Matrix, partition: Partition, lists: Lists, settings: NeighborSettings, lines: np.ndarray | None = None
) -> dict[str, Any]:
    """Fills the lists of one partition and describes them. lines: of its documents in `lists`; their rows by
    default."""
    rows, k = partition.rows, settings.neighbors_k
    lines = rows if lines is None else lines
    for first in range(0, len(rows), settings.neighbors_shard_rows):
        shard = rows[first : first + settings.neighbors_shard_rows]
        index = unit(vectors, shard)
        for begin in range(0, len(rows), BLOCK):
            queries = rows[begin : begin + BLOCK]
            sample = unit(vectors, queries)
            found = shard[_nearest(sample, index, k + 1 + SLACK)]
            found[found == queries[:, None]] = -1
            lists.merge(lines[begin : begin + BLOCK], found, similarities_of(vectors, sample, found))
    return {"method": "exact", "recall": 1.0}


def unit(vectors: Matrix | Rows, rows: np.ndarray) -> np.ndarray:
    """These rows in memory, as unit vectors in float32 (embeddings may be stored in half precision)."""
    block = np.asarray(vectors[rows], np.float32)
    # In place and in pieces that fit into the processor's cache: rows that were picked are a copy.
    for begin in range(0, len(block), BLOCK):
        part = block[begin : begin + BLOCK]
        part /= np.sqrt((part * part).sum(axis=1, keepdims=True))
    return block


def exact_neighbors(vectors: Matrix, queries: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of `rows` for each of `queries` (row numbers): rows int64 [n, k], -1 is padding, and cosines."""
    lists = Lists(np.full((len(queries), k), -1), np.full((len(queries), k), np.nan, np.float32))
    sample = unit(vectors, queries)
    for begin in range(0, len(rows), EXACT_ROWS):
        shard = rows[begin : begin + EXACT_ROWS]
        found = shard[_nearest(sample, unit(vectors, shard), k + 1 + SLACK)]
        found[found == queries[:, None]] = -1
        lists.merge(np.arange(len(queries)), found, similarities_of(vectors, sample, found))
    return lists.rows, lists.similarities


def _nearest(queries: np.ndarray, vectors: np.ndarray, k: int) -> np.ndarray:
    """Positions int64 [n, k or fewer] of the most similar of `vectors`."""
    import faiss

    return faiss.knn(queries, vectors, min(k, len(vectors)), metric=faiss.METRIC_INNER_PRODUCT)[1]


def similarities_of(vectors: Matrix | Rows, queries: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Cosines float32 [n, m] of queries [n, D] with the rows found [n, m], NaN for -1; one dot product at a time."""
    similarities = np.full(found.shape, np.nan, np.float32)
    for begin in range(0, len(found), 256):
        rows = found[begin : begin + 256]
        block = unit(vectors, np.maximum(rows, 0).ravel()).reshape(*rows.shape, -1)
        cosines = np.einsum("nd,nmd->nm", queries[begin : begin + 256], block)
        similarities[begin : begin + 256] = np.where(rows < 0, np.nan, np.minimum(cosines, 1))
    return similarities
