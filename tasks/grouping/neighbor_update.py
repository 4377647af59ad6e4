"""Neighbour lists of a corpus that has grown: updated instead of searched again.

    kept        documents that were there keep their lists, with rows renumbered; a list that names a removed document
                is searched again, like that of a new document
    new         searched exactly among all documents of the partition
    merged      every kept list is compared with the new documents only; those nearer than its last entry are inserted

Price for n documents of which m are new: one matrix product of n x m, instead of n x n. The lists equal those of a full
search. For partitions that are searched exactly.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from eclectus.storage.artifact import Artifact
from eclectus.storage.errors import EclectusError
from eclectus.tasks.disk_matrix import mapped, matrix_files, open_matrix
from eclectus.tasks.documents.digest_set import positions_of
from eclectus.tasks.grouping.nearest import (
    SLACK,
    Lists,
    Matrix,
    NeighborSettings,
    Partition,
    Rows,
    similarities_of,
    unit,
)
from eclectus.tasks.reuse import earlier, is_whole

MADE_OF = "made_of.json"
BLOCK = 65_536
PRODUCTS = 2**23
MINIMUM_BLOCK = 256
ROUNDING = 1e-5


@dataclass(frozen=True)
class Earlier:
    """Earlier neighbour lists. to_new: int64 [documents then], the row of each now, or -1 if it is gone."""

    artifact: Artifact
    to_new: np.ndarray

    @cached_property
    def methods(self) -> dict[str, str]:
        """How each partition was searched."""
        return {each["partition"]: each["method"] for each in self.artifact.statistics["partitions"]}

    @property
    def in_order(self) -> bool:
        """Whether the documents kept their order, so that the order of ties stays valid."""
        here = self.to_new[self.to_new >= 0]
        return bool((np.diff(here) > 0).all())


def made_of(embeddings: Artifact, settings: NeighborSettings) -> dict[str, Any]:
    """What the lists were made from, stored with them, so that a later run knows whether to update them."""
    return {"embeddings": embeddings.digest, "settings": settings.key_values()}


def find_earlier(
    embeddings: Artifact, settings: NeighborSettings, names: list[str], labels: np.ndarray
) -> Earlier | None:
    """The intact lists in this home with these settings and the same embedding model that share most documents.

    names, labels: the present partitions; a document that changed its partition counts as removed.
    """
    if settings.neighbors_growth == 0 or not matrix_files(embeddings, "ids"):
        return None
    key = embeddings.statistics.get("embedding_key")
    of_this_model = {each.digest: each for each in earlier("embeddings", embedding_key=key)}
    best: tuple[int, Earlier] | None = None
    for artifact in earlier("neighbors"):
        with contextlib.suppress(EclectusError, OSError, ValueError):
            made_from = json.loads(artifact.file(MADE_OF).read_text())
            before = of_this_model.get(made_from["embeddings"])
            if made_from["settings"] != settings.key_values() or before is None:
                continue
            found = Earlier(artifact, _rows_now(artifact, before, embeddings, names, labels))
            shared = int((found.to_new >= 0).sum())
            if (best is None or shared > best[0]) and is_whole(artifact):
                best = shared, found
    return best[1] if best else None


def _rows_now(
    artifact: Artifact, before: Artifact, embeddings: Artifact, names: list[str], labels: np.ndarray
) -> np.ndarray:
    rows = rows_by_id(before, embeddings)
    if len(labels) == 0:
        return rows
    number = {name: position for position, name in enumerate(names)}
    then = json.loads(artifact.file("partitions.json").read_text())
    partition_now = np.array([number.get(name, -1) for name in then] or [-1])
    same = partition_now[np.load(artifact.file("partition.npy"))] == labels[rows]
    return np.where((rows >= 0) & same, rows, -1)


def rows_by_id(before: Artifact, embeddings: Artifact) -> np.ndarray:
    """Of each document of the earlier embeddings its row in these, int64 [documents then]; -1 if it is gone.

    Parts that are equal in both are not looked into: an id stands in one part only.
    """
    now = {digest: (ids, begin) for digest, ids, begin in _ids_by_part(embeddings)}
    then, rows, left = _ids_by_part(before), [], []
    for digest, ids, _ in then:
        same = now.pop(digest, None)
        rows.append(np.full(len(ids), -1) if same is None else same[1] + np.arange(len(ids)))
        if same is None:
            left.append(len(rows) - 1)
    others = [np.empty(0, "S1"), *(np.asarray(ids) for ids, _ in now.values())]
    others_rows = np.concatenate([np.empty(0, np.int64), *(begin + np.arange(len(ids)) for ids, begin in now.values())])
    if left and len(others_rows):
        ids = np.concatenate(others)
        order = np.argsort(ids, kind="stable")
        for number in left:
            place = positions_of(np.asarray(then[number][1]), ids[order], ascending=True)
            rows[number] = np.where(place < 0, -1, others_rows[order[place]])
    return np.concatenate(rows)


def _ids_by_part(embeddings: Artifact) -> list[tuple[str, np.ndarray, int]]:
    """Digest, ids [n] and first row of each part."""
    digests, found, begin = embeddings.digests(), [], 0
    for path in matrix_files(embeddings, "ids"):
        found.append((digests[path.relative_to(embeddings.path).as_posix()], mapped(path), begin))
        begin += len(found[-1][1])
    return found


def copy_lists(earlier: Earlier, lists: Lists) -> np.ndarray:
    """Copies the lists without removed documents into `lists`, renumbered; returns which rows have one, bool [N]."""
    kept = np.zeros(len(lists.rows), bool)
    rows, similarities = (open_matrix(earlier.artifact, name) for name in ("neighbors", "similarities"))
    in_order = earlier.in_order
    for begin in range(0, len(rows), BLOCK):
        part = rows[begin : begin + BLOCK]
        renumbered = np.where(part < 0, -1, earlier.to_new[part])
        target = earlier.to_new[begin : begin + len(part)]
        whole = (target >= 0) & ((part < 0) == (renumbered < 0)).all(axis=1) & (part >= 0).any(axis=1)
        lists.rows[target[whole]] = renumbered[whole]
        lists.similarities[target[whole]] = similarities[begin : begin + len(part)][whole]
        if not in_order:
            # Merging nothing sorts the lists, so that documents of equal similarity are in order of row.
            none = np.empty((int(whole.sum()), 0))
            lists.merge(target[whole], none.astype(np.int64), none.astype(np.float32))
        kept[target[whole]] = True
    return kept


def update(
    vectors: Matrix,
    partition: Partition,
    earlier: Earlier,
    kept: np.ndarray,
    lists: Lists,
    settings: NeighborSettings,
) -> dict[str, Any] | None:
    """Updates the lists of one partition and describes them; clears them and returns None if a search is needed.

    kept: bool [N], the documents that have their earlier lists.
    """
    new = partition.rows[~kept[partition.rows]]
    method = earlier.methods.get(partition.name)
    # A partition may be new, one without any embedding, or one of very many.
    if method != "exact" or len(new) > settings.neighbors_growth * len(partition.rows):
        lists.clear(partition.rows)
        return None
    if len(new):
        insert_new(vectors, new, partition.rows, kept, lists)
    return {"method": method, "recall": 1.0, "updated": len(new)}


def insert_new(vectors: Matrix | Rows, new: np.ndarray, rows: np.ndarray, kept: np.ndarray, lists: Lists) -> None:
    """Fills the lists of the new documents (rows) from `rows`, all of the partition, and inserts them into kept lists.

    Every cosine is computed once, blockwise, for both directions; few of them exceed the last entry of a list.
    """
    sample, k = unit(vectors, new), lists.rows.shape[1]
    best = _BestRows(len(new), k + 1 + SLACK)
    step = max(MINIMUM_BLOCK, PRODUCTS // len(new))
    for begin in range(0, len(rows), step):
        block = rows[begin : begin + step]
        queries = unit(vectors, block)
        cosines = queries @ sample.T
        best.add(cosines, block)
        old = np.flatnonzero(kept[block])
        last = np.where(lists.rows[block[old], -1] < 0, -np.inf, lists.similarities[block[old], -1])
        line, column = np.nonzero(cosines[old] > last[:, None] - np.float32(ROUNDING))
        if len(line):
            changed = np.unique(line)
            columns = _by_row(line, column, cosines[old], k)
            found = np.where(columns < 0, -1, new[columns])
            # `new` includes old documents whose list was dropped, and kept lists may hold those already.
            listed = lists.rows[block[old[changed]]]
            found[(found[:, :, None] == listed[:, None, :]).any(axis=2)] = -1
            lists.merge(block[old[changed]], found, similarities_of(vectors, queries[old[changed]], found))
    found = best.rows
    found[found == new[:, None]] = -1
    lists.clear(new)
    lists.merge(new, found, similarities_of(vectors, sample, found))


def _by_row(row: np.ndarray, column: np.ndarray, cosines: np.ndarray, most: int) -> np.ndarray:
    """Pairs (row, column), sorted by row, as one line per row that occurs: its `most` best columns, padded with -1."""
    starts = np.flatnonzero(np.diff(row, prepend=-1))
    if (np.diff(np.append(starts, len(row))) > most).any():
        order = np.lexsort((column, -cosines[row, column], row))
        row, column = row[order], column[order]
    line = np.cumsum(np.diff(row, prepend=-1) > 0) - 1
    rank = np.arange(len(row)) - starts[line]
    inside = rank < most
    lines = np.full((len(starts), int(rank[inside].max()) + 1), -1)
    lines[line[inside], rank[inside]] = column[inside]
    return lines


class _BestRows:
    """The best rows seen so far for each of m documents: `rows` int64 [m, width], -1 is padding."""

    def __init__(self, count: int, width: int) -> None:
        self.rows = np.full((count, width), -1)
        self._cosines = np.full((count, width), -np.inf, np.float32)

    def add(self, cosines: np.ndarray, rows: np.ndarray) -> None:
        """cosines: [n, m] of these rows [n] with the m documents."""
        width = self.rows.shape[1]
        hits = cosines > self._cosines.min(axis=1)
        if hits.sum() > 4 * self.rows.size:
            top = np.argpartition(-cosines, min(width, len(rows)) - 1, axis=0)[:width].T
        else:
            row, column = np.nonzero(hits)
            if len(column) == 0:
                return
            order = np.argsort(column, kind="stable")
            row, column = row[order], column[order]
            lines = _by_row(column, row, cosines.T, width)
            top = np.full((len(self.rows), lines.shape[1]), -1)
            top[np.unique(column)] = lines
        near = np.where(top < 0, -np.inf, np.take_along_axis(cosines.T, np.maximum(top, 0), axis=1))
        near = np.concatenate([self._cosines, near.astype(np.float32)], axis=1)
        candidates = np.concatenate([self.rows, np.where(top < 0, -1, rows[top])], axis=1)
        keep = np.argpartition(-near, width - 1, axis=1)[:, :width]
        self._cosines = np.take_along_axis(near, keep, axis=1)
        self.rows = np.take_along_axis(candidates, keep, axis=1)
