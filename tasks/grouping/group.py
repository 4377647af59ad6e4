"""Grouping: an order of the training documents in which adjacent documents are similar (docs/methods.md 1.6).

    1. near-duplicates are dropped (`eclectus.tasks.grouping.duplicates`), train copies of held-out documents among them
    2. each partition's neighbour graph is chained (`eclectus.tasks.grouping.chain`), partitions in parallel
    3. the partitions are joined: the next one is that whose first document is most similar to the last one so far
    4. the order and the instances that it will give are measured (`eclectus.tasks.grouping.quality`)

`random` and `domain` are the baselines: the same documents without the neighbours. Held-out documents are never in the
order. Price: linear in the edges of the graph.
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from eclectus.storage.artifact import Artifact, Draft
from eclectus.storage.errors import EclectusError
from eclectus.tasks.disk_matrix import PartMatrix, open_embeddings, open_matrix, usable_rows
from eclectus.tasks.documents.split import DuplicateSettings
from eclectus.tasks.documents.table import read_codes, read_table
from eclectus.tasks.grouping.duplicates import Duplicates, near_duplicates
from eclectus.tasks.grouping.instance_layout import plan
from eclectus.tasks.grouping.nearest import Matrix, exact_neighbors
from eclectus.tasks.grouping.neighbors import largest, rows_by_label
from eclectus.tasks.grouping.quality import draw, instance_quality, mean, order_quality, pair_similarities
from eclectus.tasks.run import metric
from eclectus.tasks.settings import BASIC, SEED, RuntimeSetting
from eclectus.tasks.step import step

JOINED = 1000
"""Partitions whose first documents are compared with the last document of the order."""


class GroupSettings(DuplicateSettings):
    """How the order of the documents is found."""

    grouping: Literal["similarity", "random", "domain"] = Field(
        "similarity",
        description="Order of the documents: chains of similar ones, random, or random within each domain.",
        json_schema_extra=BASIC,
    )
    duplicate_drop: bool = Field(
        True, description="Drop near-duplicates before grouping; they are listed with their original."
    )
    duplicate_similarity: float = Field(
        0.9, ge=-1, le=1, description="Cosine similarity from which two documents may be near-duplicates."
    )
    group_instance_bytes: int = Field(
        2048,
        ge=64,
        description="Assumed bytes of text per instance in the quality numbers of the grouping, which are computed "
        "before tokens are counted.",
    )
    group_threads: int = RuntimeSetting(0, "Partitions chained at the same time; 0 takes all CPUs.", ge=0)
    seed: int = SEED


@step(makes="grouping", version=3)
def group(documents: Artifact, embeddings: Artifact, neighbors: Artifact, settings: GroupSettings, out: Draft) -> None:
    """Writes order.parquet (row, document, chain, partition, similarity to the previous document), duplicates.parquet
    and quality.png. Rows of the artifact: documents in the order.
    """
    corpus = _Corpus.read(documents, embeddings, neighbors)
    kept, dropped = corpus.split == "train", Duplicates.none()
    if settings.duplicate_drop:
        dropped = near_duplicates(
            documents,
            corpus.vectors,
            kept,
            corpus.split == "heldout",
            corpus.sizes,
            settings.duplicate_similarity,
            settings.duplicate_overlap,
            settings.curation_workers,
        )
    kept[dropped.rows] = False
    partitions = _chain_partitions(corpus, kept, settings)
    order, restarts = _ordered(corpus, partitions, kept, settings)
    numbers, samples = _quality(corpus, order, restarts, partitions, settings)
    numbers |= _planned_instances(corpus, order, settings)
    numbers |= _counts(corpus, order, restarts, dropped)
    columns = {
        "row": order,
        "document": corpus.ids[order].astype(str),
        "chain": np.cumsum(restarts) - 1,
        "partition": np.array(corpus.names, object)[corpus.labels[order]] if corpus.names else np.empty(0, object),
        "similarity": np.concatenate([[np.nan], pair_similarities(corpus.vectors, order[:-1], order[1:])])[
            : len(order)
        ],
    }
    types = [pa.int64(), pa.string(), pa.int64(), pa.string(), pa.float32()]
    _write(out, "order.parquet", columns, types)
    dropped.write(documents, out.file("duplicates.parquet"))
    draw(out.file("quality.png"), samples, numbers)
    out.rows = len(order)
    out.statistics = {"grouping": settings.grouping, **numbers}
    for name, value in numbers.items():
        if isinstance(value, int | float):
            metric(f"grouping_{name}", value)


def chain(neighbors: np.ndarray, similarities: np.ndarray) -> np.ndarray:
    """The order of all documents, int64 [N]: greedy similarity chains with minimum-degree starts (docs/methods.md 1.6).

    neighbors: int [N, k] row numbers, below 0 is padding. similarities: float [N, k]. Linear in N k; extra memory of 8
    bytes per edge for float32 similarities, 12 for float64. Raises EclectusError if the shapes differ.
    """
    from eclectus.tasks.grouping.chain import chain_with_restarts

    return chain_with_restarts(neighbors, similarities)[0]


@dataclass
class _Corpus:
    """The inputs of grouping, [N] each: ids, split, bytes, domain and partition numbers; vectors and lists on disk."""

    ids: np.ndarray
    split: np.ndarray
    sizes: np.ndarray
    domains: np.ndarray
    labels: np.ndarray
    names: list[str]
    vectors: PartMatrix
    neighbors: PartMatrix
    similarities: PartMatrix

    @classmethod
    def read(cls, documents: Artifact, embeddings: Artifact, neighbors: Artifact) -> _Corpus:
        table = read_table(documents, ["document", "split", "bytes"])
        corpus = cls(
            ids=np.array(table["document"].to_pylist(), dtype="S32"),
            split=table["split"].fill_null("train").to_numpy(zero_copy_only=False),
            sizes=table["bytes"].fill_null(0).to_numpy(),
            domains=read_codes(documents, "domain", "unknown")[0],
            labels=np.load(neighbors.file("partition.npy")),
            names=json.loads(neighbors.file("partitions.json").read_text()),
            vectors=open_embeddings(embeddings),
            neighbors=open_matrix(neighbors, "neighbors"),
            similarities=open_matrix(neighbors, "similarities"),
        )
        for name, rows in ((embeddings.name, len(corpus.vectors)), (neighbors.name, len(corpus.neighbors))):
            if rows != len(corpus.ids):
                raise EclectusError(
                    f"{name} has {rows} rows and {documents.name} {len(corpus.ids)}; make it from these documents"
                )
        return corpus


@dataclass
class _Chained:
    """One partition: its rows in the order of its chains, where chains begin, and each row's best similarity."""

    rows: np.ndarray
    restarts: np.ndarray
    best: np.ndarray


def _chain_partitions(corpus: _Corpus, kept: np.ndarray, settings: GroupSettings) -> list[_Chained]:
    local = np.full(len(corpus.ids), -1, np.int64)
    members = [rows[kept[rows]] for rows in rows_by_label(corpus.labels, len(corpus.names))]
    for rows in members:
        local[rows] = np.arange(len(rows))
    with ThreadPoolExecutor(settings.group_threads or os.cpu_count() or 1) as pool:
        return list(pool.map(lambda rows: _chain_partition(corpus, rows, local), members))


def _chain_partition(corpus: _Corpus, rows: np.ndarray, local: np.ndarray) -> _Chained:
    """Chains the documents `rows`. local: int64 [N], their numbers within the partition, -1 if not in the order."""
    from eclectus.tasks.grouping.chain import chain_with_restarts

    lists, similarities = np.asarray(corpus.neighbors[rows]), np.asarray(corpus.similarities[rows])
    near = np.where(lists < 0, -1, local[lists])
    had, left = (lists >= 0).sum(axis=1), (near >= 0).sum(axis=1)
    # A list of mostly dropped and held-out documents is replaced by the nearest of the documents that are left.
    poor = np.flatnonzero((left < had / 4) & (left < len(rows) - 1))
    if len(poor):
        found, cosines = exact_neighbors(corpus.vectors, rows[poor], rows, near.shape[1])
        near[poor] = np.where(found < 0, -1, local[found])
        similarities[poor] = cosines
    similarities = np.where(near < 0, np.nan, similarities).astype(np.float32)
    order, restarts = chain_with_restarts(near, similarities)
    best = np.where(near < 0, -np.inf, similarities).max(axis=1, initial=-np.inf)
    return _Chained(rows[order], restarts, np.where(np.isfinite(best), best, np.nan)[order])


def _ordered(
    corpus: _Corpus, partitions: list[_Chained], kept: np.ndarray, settings: GroupSettings
) -> tuple[np.ndarray, np.ndarray]:
    """The order of the kept rows, int64 [M], and where chains begin, bool [M]; a baseline has one chain per block."""
    if settings.grouping == "similarity":
        joined = _joined(corpus.vectors, [each for each in partitions if len(each.rows)])
        rows = [each.rows for each in joined] or [np.empty(0, np.int64)]
        return np.concatenate(rows), np.concatenate([each.restarts for each in joined] or [np.empty(0, bool)])
    order = np.flatnonzero(kept)[np.random.default_rng(settings.seed).permutation(int(kept.sum()))]
    restarts = np.zeros(len(order), bool)
    if settings.grouping == "domain":
        order = order[np.lexsort((corpus.domains[order], corpus.labels[order]))]
        restarts[1:] = (np.diff(corpus.domains[order]) != 0) | (np.diff(corpus.labels[order]) != 0)
    restarts[:1] = True
    return order, restarts


def _joined(vectors: Matrix, partitions: list[_Chained]) -> list[_Chained]:
    """The partitions in order: after the first, always the one whose first document is most similar to the last.

    Of very many, the next JOINED that are left are compared.
    """
    if len(partitions) < 3:
        return partitions
    heads = np.array([each.rows[0] for each in partitions])
    order, left, rest = [0], np.arange(1, len(partitions))[:JOINED], iter(range(JOINED + 1, len(partitions)))
    while len(left):
        last = np.full(len(left), partitions[order[-1]].rows[-1])
        near = np.nan_to_num(pair_similarities(vectors, last, heads[left]), nan=-2.0)
        order.append(int(left[np.argmax(near)]))
        left = np.append(left[left != order[-1]], list(islice(rest, 1))).astype(np.int64)
    return [partitions[number] for number in order]


def _planned_instances(corpus: _Corpus, order: np.ndarray, settings: GroupSettings) -> dict[str, float | None]:
    """Similarity of the documents within the future instances, and across their borders after the shuffle."""
    spans = plan(corpus.sizes[order], settings.group_instance_bytes, True, settings.seed)
    return instance_quality(
        corpus.vectors, order[spans.position], spans.firsts, spans.size, corpus.domains, settings.seed
    )


def _quality(
    corpus: _Corpus, order: np.ndarray, restarts: np.ndarray, partitions: list[_Chained], settings: GroupSettings
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    best = np.full(len(corpus.ids), np.nan, np.float32)
    for each in partitions:
        best[each.rows] = each.best
    blocks = corpus.labels[order] if settings.grouping != "random" else np.zeros(len(order), np.int64)
    numbers, samples = order_quality(
        corpus.vectors, order, blocks, restarts, best[order], corpus.domains[order], settings.seed
    )
    if settings.grouping == "similarity":
        described = [
            {
                "partition": name,
                "grouped": len(each.rows),
                "chains": int(each.restarts.sum()),
                "adjacent_similarity": mean(pair_similarities(corpus.vectors, each.rows[:-1], each.rows[1:])),
                "best_neighbor_similarity": mean(each.best),
            }
            for name, each in zip(corpus.names, partitions, strict=True)
        ]
        numbers["partitions"] = largest(described, "grouped")
    return numbers, samples


def _counts(corpus: _Corpus, order: np.ndarray, restarts: np.ndarray, dropped: Duplicates) -> dict[str, int]:
    return {
        "documents": len(corpus.ids),
        "heldout": int((corpus.split == "heldout").sum()),
        "apart": int((~np.isin(corpus.split, ("train", "heldout"))).sum()),
        "without_embedding": int((~usable_rows(corpus.vectors)).sum()),
        "duplicates": len(dropped),
        "duplicates_of_heldout": int((corpus.split[dropped.originals] == "heldout").sum()),
        "grouped": len(order),
        "chains": int(restarts.sum()),
    }


def _write(out: Draft, name: str, columns: dict[str, np.ndarray], types: list[pa.DataType]) -> None:
    arrays = [pa.array(values, kind) for values, kind in zip(columns.values(), types, strict=True)]
    pq.write_table(pa.table(arrays, names=list(columns)), out.file(name), compression="zstd")
