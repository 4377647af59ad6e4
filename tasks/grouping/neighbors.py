"""The nearest neighbours of every document within its partition, by cosine.

    small partition     exact: a blocked matrix product
    large partition     by cells (`eclectus.tasks.grouping.cells`): linear in the documents, spread over blocks of
                        cells; the recall is measured on a sample against exact search
    grown corpus        earlier lists are updated (`eclectus.tasks.grouping.neighbor_update`)

Documents without a (finite, non-zero) embedding have no neighbours and are listed in isolated.npy.
"""

from __future__ import annotations

import json
import os
from itertools import pairwise
from typing import Any

import numpy as np

from eclectus.storage.artifact import Artifact, Draft
from eclectus.storage.errors import EclectusError
from eclectus.tasks.disk_matrix import PartMatrix, open_embeddings, usable_rows
from eclectus.tasks.documents.table import first_rows, read_codes
from eclectus.tasks.grouping.cells.corpus import Corpus
from eclectus.tasks.grouping.cells.lists import search_small, write_lists
from eclectus.tasks.grouping.cells.partition import Searched, search_partition
from eclectus.tasks.grouping.cells.tree import MOST_OVERLAP, TREE
from eclectus.tasks.grouping.cells.update import Carried, update_partition
from eclectus.tasks.grouping.nearest import Lists, NeighborSettings, Partition, search
from eclectus.tasks.grouping.neighbor_update import MADE_OF, copy_lists, find_earlier, made_of, update
from eclectus.tasks.over_parts import forget, link_or_copy
from eclectus.tasks.ray_cluster import require_gpu
from eclectus.tasks.run import metric, notify, progress
from eclectus.tasks.step import step

MOST_PARTITIONS = 1000
EXACT_PER_HOUR = 3e13
"""Products of an exact search per CPU hour, about."""


@step(makes="neighbors", version=4)
def neighbors(documents: Artifact, embeddings: Artifact, settings: NeighborSettings, out: Draft) -> None:
    """Writes neighbors int32 or int64 [N, k] (rows, -1 is padding), similarities float32 [N, k] (NaN there),
    partition.npy int32 [N], partitions.json (name by number) and isolated.npy (rows without an embedding).

    A corpus of one part has neighbors.npy and similarities.npy, a larger one neighbors/part-*.npy and so on, one per
    part of the documents. Where a partition was searched by cells, so are block int32 [N], of cells, and cells int32
    [N, overlap]; -1 is none; tree/NUMBER/ has the cells of that partition, sample/NUMBER/ documents (rows.npy) with
    their exact neighbours (near.npy, cosines.npy), which measure the recall, also of a corpus that has grown.
    """
    vectors, begins = open_embeddings(embeddings), first_rows(documents)
    names, labels = partition_labels(documents, settings.neighbors_partition)
    if len(vectors) != len(labels):
        raise EclectusError(
            f"{embeddings.name} has {len(vectors)} rows and {documents.name} {len(labels)}; embed these documents first"
        )
    largest_partition = int(np.bincount(labels, minlength=1).max())
    if len(begins) == 2 and not _by_cells(largest_partition, settings):
        searched, isolated, updated = _search_in_this_process(embeddings, vectors, names, labels, settings, out)
    else:
        searched, isolated, updated = _search_in_parts(embeddings, begins, names, labels, settings, out)
    searched = largest(searched, "documents")
    for each in searched:
        metric("neighbors_recall", each["recall"], partition=each["partition"])
    np.save(out.file("partition.npy"), labels)
    out.file("partitions.json").write_text(json.dumps(names, ensure_ascii=False, indent=1))
    np.save(out.file("isolated.npy"), isolated)
    out.file(MADE_OF).write_text(json.dumps(made_of(embeddings, settings), sort_keys=True))
    out.rows = len(labels)
    out.statistics = {
        "documents": len(labels),
        "k": settings.neighbors_k,
        "without_embedding": len(isolated),
        "updated_from": updated,
        "partitions_searched": len(names),
        "partitions": searched,
    }


Found = tuple[list[dict[str, Any]], np.ndarray, str | None]
"""What is described of each partition, the rows without an embedding, and the artifact whose lists were updated."""


def _by_cells(documents: int, settings: NeighborSettings) -> bool:
    return documents >= settings.neighbors_exact_below and documents > settings.neighbors_k


def _search_in_this_process(
    embeddings: Artifact,
    vectors: PartMatrix,
    names: list[str],
    labels: np.ndarray,
    settings: NeighborSettings,
    out: Draft,
) -> Found:
    import faiss

    faiss.omp_set_num_threads(settings.neighbors_threads or os.cpu_count() or 1)
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
    lists.flush()
    return searched, np.flatnonzero(~usable), earlier.artifact.name if earlier else None


def _search_in_parts(
    embeddings: Artifact,
    begins: np.ndarray,
    names: list[str],
    labels: np.ndarray,
    settings: NeighborSettings,
    out: Draft,
) -> Found:
    if settings.neighbors_device == "cuda":
        require_gpu("neighbors_device")
    corpus = Corpus.of(embeddings, begins, labels, settings)
    hashes = corpus.hashes()
    earlier = find_earlier(embeddings, settings, names, labels)
    carried = None
    if earlier:
        then = json.loads(earlier.artifact.file("partitions.json").read_text())
        carried = Carried.of(corpus, earlier.artifact, then, earlier.to_new)
    small: list[Partition] = []
    grown: list[Partition] = []
    by_cells: list[Searched] = []
    searched: list[dict[str, Any]] = []
    as_before = np.zeros(len(labels), bool)
    for name, rows in zip(names, rows_by_label(labels, len(names)), strict=True):
        usable = rows[hashes[rows] != 0]
        described: dict[str, Any] = {"method": "exact", "recall": 1.0}
        if _by_cells(len(usable), settings):
            updated = update_partition(corpus, name, usable, hashes[usable], carried) if carried else None
            as_before[usable] = updated is not None
            by_cells.append(updated or search_partition(corpus, name, usable, hashes[usable]))
            described = {"method": "cells", **by_cells[-1].statistics}
        elif carried and (new := carried.news(name, usable)) is not None:
            described["updated"] = new
            as_before[usable] = not new
            grown += [Partition(name, usable)] if new else []
        else:
            small.append(Partition(name, usable))
        searched.append({"partition": name, "documents": len(rows), **described})
    shared = corpus.publish("lists that stay", "", {"as_before": as_before}) / "as_before.npy" if carried else None
    exact = search_small(corpus, small) + search_small(corpus, grown, carried)
    parts = write_lists(corpus, exact, by_cells, len(labels), carried.files if carried else None, shared)
    similarities = PartMatrix([part.file("similarities.npy") for part in parts])
    for each in by_cells:
        number = names.index(each.name)
        searched[number] |= each.measured(similarities)
        _report_recall(searched[number], each, settings, corpus.dimension)
        each.sample.save(out.file(f"sample/{number}"), each.members)
        for name in TREE:
            link_or_copy(each.tree / f"{name}.npy", out.file(f"tree/{number}/{name}.npy"))
    for name in ("neighbors", "similarities", *(("block", "cells") if by_cells else ())):
        for number, part in enumerate(parts):
            file = f"{name}.npy" if len(parts) == 1 else f"{name}/part-{number:05d}.npy"
            link_or_copy(part.file(f"{name}.npy"), out.file(file))
    forget(corpus.made)
    return searched, np.flatnonzero(hashes == 0), earlier.artifact.name if earlier else None


def _report_recall(described: dict[str, Any], searched: Searched, settings: NeighborSettings, dimension: int) -> None:
    """Reports a recall that is below the target by more than the sample's error, and what can be done."""
    recall, target, count = described["recall"], settings.neighbors_recall_target, len(searched.members.rows)
    if recall + described["recall_error"] < target:
        hours = count**2 * dimension / EXACT_PER_HOUR
        notify(
            f"neighbours of {searched.name}",
            f"{recall:.1%} of a sample's nearest documents were found, with {searched.overlap} cells each (at most "
            f"{MOST_OVERLAP}); neighbors_recall_target is {target:.1%}. Lower it to accept this, or set "
            f"neighbors_exact_below above {count:,} for an exact search of about {hours:.1f} CPU hours",
        )


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
