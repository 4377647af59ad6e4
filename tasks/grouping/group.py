"""Grouping: an order of the training documents in which adjacent documents are similar (docs/methods.md 1.6).

    1. near-duplicates are dropped (`eclectus.tasks.grouping.duplicates`), train copies of held-out documents among them
    2. each partition's neighbour graph is chained (`eclectus.tasks.grouping.chain`), partitions in parallel
    3. the partitions are joined: the next one is that whose first document is most similar to the last one so far
    4. the order and the instances that it will give are measured (`eclectus.tasks.grouping.quality`)

`random` and `domain` are the baselines: the same documents without the neighbours. Held-out documents are never in the
order. Price: linear in the edges of the graph.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from eclectus.storage.artifact import Artifact, Draft
from eclectus.storage.errors import EclectusError
from eclectus.tasks.disk_matrix import PartMatrix, matrix_files, open_embeddings, open_ids, open_matrix
from eclectus.tasks.documents.split import DuplicateSettings
from eclectus.tasks.documents.table import read_codes, read_ids, read_table
from eclectus.tasks.grouping.cells.chains import Chained, chain_by_blocks
from eclectus.tasks.grouping.duplicates import Duplicates, near_duplicates
from eclectus.tasks.grouping.instance_layout import plan
from eclectus.tasks.grouping.nearest import Matrix, exact_neighbors
from eclectus.tasks.grouping.neighbors import largest, rows_by_label
from eclectus.tasks.grouping.quality import (
    adjacent_similarities,
    draw,
    instance_quality,
    mean,
    order_quality,
    pair_similarities,
)
from eclectus.tasks.over_parts import key_of
from eclectus.tasks.run import metric
from eclectus.tasks.settings import BASIC, SEED, CurationWorkerSettings, RuntimeSetting
from eclectus.tasks.step import step

TRAIN, HELD_OUT, APART = 0, 1, 2
ROWS = 2**20
"""Documents per row group of the order."""

PLANNED, RUNS = 2**21, 64
JOINED = 1000
"""Partitions whose first documents are compared with the last document of the order."""


class GroupSettings(DuplicateSettings, CurationWorkerSettings):
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
    group_threads: int = RuntimeSetting(
        0, "Partitions, or blocks of a large one, chained at the same time; 0 takes all CPUs.", ge=0
    )
    seed: int = SEED


@step(makes="grouping", version=4)
def group(documents: Artifact, embeddings: Artifact, neighbors: Artifact, settings: GroupSettings, out: Draft) -> None:
    """Writes order.parquet (row, document, chain, partition, similarity to the previous document), duplicates.parquet
    and quality.png. Rows of the artifact: documents in the order.
    """
    corpus = _Corpus.read(documents, embeddings, neighbors)
    kept, dropped = corpus.split == TRAIN, Duplicates.none()
    if settings.duplicate_drop:
        dropped = near_duplicates(
            documents,
            corpus.vectors,
            kept,
            corpus.split == HELD_OUT,
            corpus.sizes,
            settings.duplicate_similarity,
            settings.duplicate_overlap,
            settings.curation_workers,
        )
    kept[dropped.rows] = False
    partitions = _chain_partitions(corpus, kept, settings)
    order, restarts, known = _ordered(corpus, partitions, kept, settings)
    adjacent = adjacent_similarities(corpus.vectors, order, known)
    numbers, samples = _quality(corpus, order, restarts, adjacent, partitions, settings)
    numbers |= _planned_instances(corpus, order, adjacent, settings)
    numbers |= _counts(corpus, order, restarts, dropped)
    _write_order(out, corpus, order, restarts, adjacent)
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
    """The inputs of grouping, [N] each: ids, split (TRAIN, HELD_OUT, APART), bytes, domain and partition numbers;
    vectors and lists on disk. files: of the matrices, where partitions were searched by cells. key: of all inputs."""

    ids: Matrix
    split: np.ndarray
    sizes: np.ndarray
    domains: np.ndarray
    labels: np.ndarray
    names: list[str]
    vectors: PartMatrix
    neighbors: PartMatrix
    similarities: PartMatrix
    isolated: int
    files: dict[str, list[Path]]
    key: str

    @classmethod
    def read(cls, documents: Artifact, embeddings: Artifact, neighbors: Artifact) -> _Corpus:
        split, names = read_codes(documents, "split", "train")
        places = np.array([{"train": TRAIN, "heldout": HELD_OUT}.get(name, APART) for name in names], np.int8)
        files = {name: matrix_files(neighbors, name) for name in ("neighbors", "similarities", "block", "cells")}
        corpus = cls(
            ids=open_ids(embeddings) if matrix_files(embeddings, "ids") else read_ids(documents),
            split=places[split] if len(split) else np.empty(0, np.int8),
            sizes=read_table(documents, ["bytes"])["bytes"].fill_null(0).to_numpy(),
            domains=read_codes(documents, "domain", "unknown")[0],
            labels=np.load(neighbors.file("partition.npy")),
            names=json.loads(neighbors.file("partitions.json").read_text()),
            vectors=open_embeddings(embeddings),
            neighbors=open_matrix(neighbors, "neighbors"),
            similarities=open_matrix(neighbors, "similarities"),
            isolated=len(np.load(neighbors.file("isolated.npy"))),
            files={"embeddings": matrix_files(embeddings, "embeddings"), **files},
            key=key_of("group", documents.digest, embeddings.digest, neighbors.digest),
        )
        for name, rows in ((embeddings.name, len(corpus.vectors)), (neighbors.name, len(corpus.neighbors))):
            if rows != len(corpus.sizes):
                raise EclectusError(
                    f"{name} has {rows} rows and {documents.name} {len(corpus.sizes)}; make it from these documents"
                )
        return corpus


def _chain_partitions(corpus: _Corpus, kept: np.ndarray, settings: GroupSettings) -> list[Chained]:
    """Each partition's chains: by blocks of cells where it was searched so, else all at once."""
    members = [rows[kept[rows]] for rows in rows_by_label(corpus.labels, len(corpus.names))]
    block = PartMatrix(corpus.files["block"])[:] if corpus.files["block"] else np.full(len(kept), -1, np.int32)
    local = np.full(len(kept), -1, np.int32)
    for rows in members:
        local[rows] = np.arange(len(rows))
    whole = [number for number, rows in enumerate(members) if not (block[rows] >= 0).any()]
    with ThreadPoolExecutor(settings.group_threads or os.cpu_count() or 1) as pool:
        results = pool.map(lambda number: _chain_partition(corpus, members[number], local), whole)
        chained = dict(zip(whole, results, strict=True))
    digest = hashlib.sha256(np.packbits(kept).tobytes()).hexdigest()
    for number in set(range(len(members))) - set(whole):
        rows = members[number]
        key = key_of("chains", corpus.key, corpus.names[number], digest)
        workers = settings.group_threads or settings.curation_workers
        chained[number] = chain_by_blocks(corpus.vectors, corpus.files, rows, block[rows], kept, key, workers)
    return [chained[number] for number in range(len(members))]


def _chain_partition(corpus: _Corpus, rows: np.ndarray, local: np.ndarray) -> Chained:
    """Chains the documents `rows`. local: int32 [N], their numbers within the partition, -1 if not in the order."""
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
    return Chained(rows[order], restarts, np.where(np.isfinite(best), best, np.nan)[order])


def _ordered(
    corpus: _Corpus, partitions: list[Chained], kept: np.ndarray, settings: GroupSettings
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The order of the kept rows, int64 [M]; where chains begin, bool [M] (a baseline has one chain per block); what is
    known of the similarity to the document before, float32 [M - 1], or NaN."""
    if settings.grouping == "similarity":
        joined = _joined(corpus.vectors, [each for each in partitions if len(each.rows)])
        return _concatenated(joined)
    order = np.flatnonzero(kept)[np.random.default_rng(settings.seed).permutation(int(kept.sum()))]
    restarts = np.zeros(len(order), bool)
    if settings.grouping == "domain":
        order = order[np.lexsort((corpus.domains[order], corpus.labels[order]))]
        restarts[1:] = (np.diff(corpus.domains[order]) != 0) | (np.diff(corpus.labels[order]) != 0)
    restarts[:1] = True
    return order, restarts, np.full(max(0, len(order) - 1), np.nan, np.float32)


def _concatenated(chains: list[Chained]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows = np.concatenate([np.empty(0, np.int64), *(each.rows for each in chains)])
    restarts = np.concatenate([np.empty(0, bool), *(each.restarts for each in chains)])
    before = np.concatenate([np.empty(0, np.float32), *(each.before for each in chains)])
    return rows, restarts, before[1:]


def _joined(vectors: Matrix, partitions: list[Chained]) -> list[Chained]:
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


def _planned_instances(
    corpus: _Corpus, order: np.ndarray, adjacent: np.ndarray, settings: GroupSettings
) -> dict[str, float | None]:
    """Similarity of the documents within the future instances, and across their borders after the shuffle.

    Of a large corpus PLANNED documents are looked at, in RUNS stretches of the order.
    """
    following = np.append(adjacent, np.float32(np.nan))
    if len(order) > PLANNED:
        starts = np.linspace(0, len(order) - PLANNED // RUNS, RUNS).astype(np.int64)
        looked_at = (starts[:, None] + np.arange(PLANNED // RUNS)).ravel()
        order, following = order[looked_at], following[looked_at]
        # The next one in another stretch is not the one that follows in the order.
        following[PLANNED // RUNS - 1 :: PLANNED // RUNS] = np.nan
    spans = plan(corpus.sizes[order], settings.group_instance_bytes, True, settings.seed)
    return instance_quality(
        corpus.vectors,
        order[spans.position],
        spans.firsts,
        spans.size,
        corpus.domains,
        settings.seed,
        following[spans.position],
    )


def _quality(
    corpus: _Corpus,
    order: np.ndarray,
    restarts: np.ndarray,
    adjacent: np.ndarray,
    partitions: list[Chained],
    settings: GroupSettings,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    best = np.full(len(corpus.ids), np.nan, np.float32)
    for each in partitions:
        best[each.rows] = each.best
    blocks = corpus.labels[order] if settings.grouping != "random" else np.zeros(len(order), np.int64)
    numbers, samples = order_quality(
        corpus.vectors, order, blocks, restarts, best[order], corpus.domains[order], adjacent, settings.seed
    )
    if settings.grouping == "similarity":
        labels = corpus.labels[order]
        begins = np.flatnonzero(np.diff(labels, prepend=-1)).tolist()
        inside = {int(labels[a]): adjacent[a : b - 1] for a, b in pairwise([*begins, len(order)])}
        described = [
            {
                "partition": name,
                "grouped": len(each.rows),
                "chains": int(each.restarts.sum()),
                "adjacent_similarity": mean(inside.get(number, adjacent[:0])),
                "best_neighbor_similarity": mean(each.best),
            }
            for number, (name, each) in enumerate(zip(corpus.names, partitions, strict=True))
        ]
        numbers["partitions"] = largest(described, "grouped")
    return numbers, samples


def _counts(corpus: _Corpus, order: np.ndarray, restarts: np.ndarray, dropped: Duplicates) -> dict[str, int]:
    return {
        "documents": len(corpus.sizes),
        "heldout": int((corpus.split == HELD_OUT).sum()),
        "apart": int((corpus.split == APART).sum()),
        "without_embedding": corpus.isolated,
        "duplicates": len(dropped),
        "duplicates_of_heldout": int((corpus.split[dropped.originals] == HELD_OUT).sum()),
        "grouped": len(order),
        "chains": int(restarts.sum()),
    }


def _write_order(out: Draft, corpus: _Corpus, order: np.ndarray, restarts: np.ndarray, adjacent: np.ndarray) -> None:
    """Writes order.parquet, row group by row group. adjacent: similarities of the documents to those before, [M -
    1]."""
    kinds = {
        "row": pa.int64(),
        "document": pa.string(),
        "chain": pa.int64(),
        "partition": pa.string(),
        "similarity": pa.float32(),
    }
    names, chains = pa.array(corpus.names, pa.string()), 0
    with pq.ParquetWriter(out.file("order.parquet"), pa.schema(list(kinds.items())), compression="zstd") as writer:
        for begin in range(0, max(1, len(order)), ROWS):
            rows = order[begin : begin + ROWS]
            chain = np.cumsum(restarts[begin : begin + ROWS]) + (chains - 1)
            chains = int(chain[-1]) + 1 if len(chain) else 0
            before = adjacent[max(0, begin - 1) : begin + len(rows) - 1]
            columns = {
                "row": rows,
                "document": pa.array(corpus.ids[rows]).cast(pa.string()),
                "chain": chain,
                "partition": names.take(pa.array(corpus.labels[rows])),
                "similarity": before if begin else np.concatenate([[np.nan], before])[: len(rows)],
            }
            arrays = [pa.array(columns[name], kind) for name, kind in kinds.items()]
            writer.write_table(pa.table(arrays, names=list(kinds)))
