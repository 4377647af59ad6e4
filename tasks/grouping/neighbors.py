"""The nearest neighbours of every document within its partition, by cosine, with faiss.

    small partition     exact: a blocked matrix product
    large partition     IVF: k-means centroids of a sample; `nprobe` is doubled until the recall of a sample of queries,
                        against exact search, reaches the target; the recall of the final lists is measured
    very large          in shards: one shard's index is in memory at a time, lists are merged shard by shard
    grown corpus        earlier lists are updated (`eclectus.tasks.grouping.neighbor_update`)

Documents without a (finite, non-zero) embedding have no neighbours and are listed in isolated.npy.
Price on 2 cores: exact 100k x 384 takes 4 minutes; IVF 32 s at recall .99, 1M 17 minutes.
"""

from __future__ import annotations

import json
import os
from itertools import pairwise
from typing import Any

import numpy as np

from eclectus.storage.artifact import Artifact, Draft
from eclectus.storage.errors import EclectusError
from eclectus.tasks.disk_matrix import usable_rows
from eclectus.tasks.documents.table import read_codes
from eclectus.tasks.grouping.nearest import Lists, NeighborSettings, Partition, search
from eclectus.tasks.grouping.neighbor_update import MADE_OF, copy_lists, find_earlier, made_of, update
from eclectus.tasks.run import metric, progress
from eclectus.tasks.step import step

MOST_PARTITIONS = 1000


@step(makes="neighbors", version=1)
def neighbors(documents: Artifact, embeddings: Artifact, settings: NeighborSettings, out: Draft) -> None:
    """Writes neighbors.npy int32 or int64 [N, k] (rows, -1 is padding), similarities.npy float32 [N, k] (NaN there),
    partition.npy int32 [N], partitions.json (name by number) and isolated.npy (rows without an embedding).
    """
    import faiss

    faiss.omp_set_num_threads(settings.neighbors_threads or os.cpu_count() or 1)
    vectors = np.load(embeddings.file("embeddings.npy"), mmap_mode="r")
    names, labels = partition_labels(documents, settings.neighbors_partition)
    if len(vectors) != len(labels):
        raise EclectusError(
            f"{embeddings.name} has {len(vectors)} rows and {documents.name} {len(labels)}; embed these documents first"
        )
    usable = usable_rows(vectors)
    lists = Lists.create(out, len(labels), settings.neighbors_k)
    earlier = find_earlier(embeddings, settings, names, labels)
    kept = copy_lists(earlier, lists) if earlier else np.zeros(len(labels), bool)
    report_progress, done, searched = progress(int(usable.sum()), "searching neighbours", "documents"), 0, []
    for name, rows in zip(names, rows_by_label(labels, len(names)), strict=True):
        partition = Partition(name, rows[usable[rows]])
        described = update(vectors, partition, earlier, kept, lists, settings) if earlier else None
        described = described or search(vectors, partition, lists, settings)
        searched.append({"partition": name, "documents": len(rows), **described})
        done += len(partition.rows)
        report_progress(done)
    searched = largest(searched, "documents")
    for each in searched:
        metric("neighbors_recall", each["recall"], partition=each["partition"])
    lists.flush()
    np.save(out.file("partition.npy"), labels)
    out.file("partitions.json").write_text(json.dumps(names, ensure_ascii=False, indent=1))
    np.save(out.file("isolated.npy"), np.flatnonzero(~usable))
    out.file(MADE_OF).write_text(json.dumps(made_of(embeddings, settings), sort_keys=True))
    out.rows = len(labels)
    out.statistics = {
        "documents": len(labels),
        "k": settings.neighbors_k,
        "without_embedding": int((~usable).sum()),
        "updated_from": earlier.artifact.name if earlier else None,
        "partitions_searched": len(names),
        "partitions": searched,
    }


def partition_labels(documents: Artifact, by: str) -> tuple[list[str], np.ndarray]:
    """Names of the partitions, sorted, and the partition of each document, int32 [N]. A missing label is 'unknown'."""
    if by == "none":
        return ["all"], np.zeros(documents.manifest()["rows"], np.int32)
    codes, names = read_codes(documents, "language", "unknown")
    if by == "language+domain":
        domain, domains = read_codes(documents, "domain", "unknown")
        pairs, codes = np.unique(codes * max(len(domains), 1) + domain, return_inverse=True)
        names = [f"{names[pair // len(domains)]}/{domains[pair % len(domains)]}" for pair in pairs.tolist()]
        # Sorted by the whole name, in which two pairs may even be the same.
        order = sorted(set(names))
        number = {name: position for position, name in enumerate(order)}
        codes, names = np.array([number[name] for name in names], np.int64)[codes], order
    return names, codes.astype(np.int32)


def rows_by_label(labels: np.ndarray, count: int) -> list[np.ndarray]:
    """The rows of each label 0 to count - 1, ascending, in one pass over `labels` int [N]; below 0 is none."""
    order = np.argsort(labels, kind="stable")
    bounds = np.searchsorted(labels[order], np.arange(count + 1))
    return [order[begin:end] for begin, end in pairwise(bounds.tolist())]


def largest(described: list[dict[str, Any]], size: str) -> list[dict[str, Any]]:
    """Of very many partitions those of the most documents, in their order: what is described of each in a manifest."""
    if len(described) <= MOST_PARTITIONS:
        return described
    last = sorted((each[size] for each in described), reverse=True)[MOST_PARTITIONS - 1]
    return [each for each in described if each[size] >= last][:MOST_PARTITIONS]
