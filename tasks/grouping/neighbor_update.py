"""Neighbour lists of a corpus that has grown: updated, not searched again.

    carried     documents that were here before keep their lists, with the rows renumbered; a list that names a document
                which is gone is searched again, as a new document's is
    new         searched exactly among all documents of the partition
    merged      every carried list against the new documents only: those nearer than its last place enter it

Price for n documents of which m are new: one matrix product of n x m, against one of n x n, and no index. Exact lists come
out as a full search gives them; the lists of an index keep the recall that they had, which is measured again.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from eclectus.storage.artifact import Artifact
from eclectus.storage.errors import EclectusError
from eclectus.tasks.documents.digest_set import positions_of
from eclectus.tasks.grouping.nearest import (
    SLACK,
    Lists,
    NeighborSettings,
    Partition,
    measured_recall,
    recall_sample,
    similarities_of,
    unit,
)
from eclectus.tasks.reuse import earlier, is_whole

MADE_OF = "made_of.json"
BLOCK = 65_536
PRODUCTS = 2**23
MINIMUM_BLOCK = 256
RECALL_STRIDE = 4
ROUNDING = 1e-5


@dataclass(frozen=True)
class Earlier:
    """Neighbour lists of before. to_new: int64 [documents then], the row that each has now, or -1 if it is gone."""

    artifact: Artifact
    to_new: np.ndarray

    @property
    def in_order(self) -> bool:
        """Whether the documents still come in the order of then, so that ties need no second look."""
        here = self.to_new[self.to_new >= 0]
        return bool((np.diff(here) > 0).all())


def made_of(embeddings: Artifact, settings: NeighborSettings) -> dict[str, Any]:
    """What is kept with the lists, so that a later run can tell whether to go on from them."""
    return {"embeddings": embeddings.digest, "settings": settings.key_values()}


def find_earlier(
    embeddings: Artifact, settings: NeighborSettings, names: list[str], labels: np.ndarray
) -> Earlier | None:
    """The whole lists in this home, made under these settings by the same embedding model, that share most documents.

    names, labels: the partitions of now; a document that changed its partition counts as gone.
    """
    if settings.neighbors_growth == 0 or not embeddings.file("ids.npy").is_file():
        return None
    ids, key = np.load(embeddings.file("ids.npy"), mmap_mode="r"), embeddings.statistics.get("embedding_key")
    of_this_model = {each.digest: each for each in earlier("embeddings", embedding_key=key)}
    best: tuple[int, Earlier] | None = None
    for artifact in earlier("neighbors"):
        with contextlib.suppress(EclectusError, OSError, ValueError):
            told = json.loads(artifact.file(MADE_OF).read_text())
            before = of_this_model.get(told["embeddings"])
            if told["settings"] != settings.key_values() or before is None:
                continue
            found = Earlier(artifact, _rows_now(artifact, before, ids, names, labels))
            shared = int((found.to_new >= 0).sum())
            if (best is None or shared > best[0]) and is_whole(artifact):
                best = shared, found
    return best[1] if best else None


def _rows_now(
    artifact: Artifact, before: Artifact, ids: np.ndarray, names: list[str], labels: np.ndarray
) -> np.ndarray:
    old = np.load(before.file("ids.npy"), mmap_mode="r")
    if len(ids) == 0:
        return np.full(len(old), -1)
    rows = positions_of(old, ids)
    number = {name: position for position, name in enumerate(names)}
    then = json.loads(artifact.file("partitions.json").read_text())
    partition_now = np.array([number.get(name, -1) for name in then] or [-1])
    same = partition_now[np.load(artifact.file("partition.npy"))] == labels[rows]
    return np.where((rows >= 0) & same, rows, -1)


def carry_over(earlier: Earlier, lists: Lists) -> np.ndarray:
    """Copies the lists that are still whole into `lists`, renumbered; returns which rows now have theirs, bool [N]."""
    carried = np.zeros(len(lists.rows), bool)
    rows = np.load(earlier.artifact.file("neighbors.npy"), mmap_mode="r")
    similarities = np.load(earlier.artifact.file("similarities.npy"), mmap_mode="r")
    in_order = earlier.in_order
    for begin in range(0, len(rows), BLOCK):
        part = np.asarray(rows[begin : begin + BLOCK])
        renumbered = np.where(part < 0, -1, earlier.to_new[part])
        target = earlier.to_new[begin : begin + len(part)]
        whole = (target >= 0) & ((part < 0) == (renumbered < 0)).all(axis=1) & (part >= 0).any(axis=1)
        lists.rows[target[whole]] = renumbered[whole]
        lists.similarities[target[whole]] = similarities[begin : begin + len(part)][whole]
        if not in_order:
            # Merging nothing sorts the lists: documents of equal similarity come by row.
            none = np.empty((int(whole.sum()), 0))
            lists.merge(target[whole], none.astype(np.int64), none.astype(np.float32))
        carried[target[whole]] = True
    return carried


def update(
    vectors: np.ndarray,
    partition: Partition,
    earlier: Earlier,
    carried: np.ndarray,
    lists: Lists,
    settings: NeighborSettings,
) -> dict[str, Any] | None:
    """Brings the lists of one partition up to date and describes them; None, and the lists empty, when a search is due.

    carried: bool [N], the documents whose lists are those of before.
    """
    new = partition.rows[~carried[partition.rows]]
    method = {told["partition"]: told["method"] for told in earlier.artifact.statistics["partitions"]}.get(
        partition.name
    )
    # A language that was not there before may be one without any embedding.
    if method is None or len(new) > settings.neighbors_growth * len(partition.rows):
        lists.clear(partition.rows)
        return None
    if len(new):
        _meet(vectors, new, partition.rows, carried, lists)
    recall = 1.0
    if method != "exact":
        # A sample of the sample: at 1% new documents the recall of the lists of before, measured in full then, hardly moves.
        sample = recall_sample(partition.rows, settings)[::RECALL_STRIDE]
        recall = measured_recall(vectors, partition.rows, sample, lists, settings)
    return {"method": method, "recall": round(recall, 4), "updated": len(new)}


def _meet(vectors: np.ndarray, new: np.ndarray, rows: np.ndarray, carried: np.ndarray, lists: Lists) -> None:
    """Fills the lists of the new documents (rows) from `rows`, all of the partition, and enters them into the carried lists.

    Every cosine is computed once, blockwise, in both directions' service; few of them pass the last place of a list.
    """
    sample, k = unit(vectors, new), lists.rows.shape[1]
    best = _Best(len(new), k + 1 + SLACK)
    step = max(MINIMUM_BLOCK, PRODUCTS // len(new))
    for begin in range(0, len(rows), step):
        block = rows[begin : begin + step]
        queries = unit(vectors, block)
        cosines = queries @ sample.T
        best.take(cosines, block)
        old = np.flatnonzero(carried[block])
        last = np.where(lists.rows[block[old], -1] < 0, -np.inf, lists.similarities[block[old], -1])
        place, column = np.nonzero(cosines[old] > last[:, None] - np.float32(ROUNDING))
        if len(place):
            entered = np.unique(place)
            columns = _by_row(place, column, cosines[old], k)
            found = np.where(columns < 0, -1, new[columns])
            # A list that is searched again belongs to a document that others may already list.
            listed = lists.rows[block[old[entered]]]
            found[(found[:, :, None] == listed[:, None, :]).any(axis=2)] = -1
            lists.merge(block[old[entered]], found, similarities_of(vectors, queries[old[entered]], found))
    found = best.rows
    found[found == new[:, None]] = -1
    lists.clear(new)
    lists.merge(new, found, similarities_of(vectors, sample, found))


def _by_row(place: np.ndarray, column: np.ndarray, cosines: np.ndarray, most: int) -> np.ndarray:
    """Pairs (row, column), sorted by row, as one line a row that occurs: its `most` best columns at most, padded with -1."""
    starts = np.flatnonzero(np.diff(place, prepend=-1))
    if (np.diff(np.append(starts, len(place))) > most).any():
        order = np.lexsort((column, -cosines[place, column], place))
        place, column = place[order], column[order]
    line = np.cumsum(np.diff(place, prepend=-1) > 0) - 1
    rank = np.arange(len(place)) - starts[line]
    inside = rank < most
    lines = np.full((len(starts), int(rank[inside].max()) + 1), -1)
    lines[line[inside], rank[inside]] = column[inside]
    return lines


class _Best:
    """The best rows seen so far for each of m documents: `rows` int64 [m, width], -1 is padding."""

    def __init__(self, count: int, width: int) -> None:
        self.rows = np.full((count, width), -1)
        self._cosines = np.full((count, width), -np.inf, np.float32)

    def take(self, cosines: np.ndarray, rows: np.ndarray) -> None:
        """cosines: [n, m] of these rows [n] with the m documents."""
        width = self.rows.shape[1]
        hits = cosines > self._cosines.min(axis=1)
        if hits.sum() > 4 * self.rows.size:
            top = np.argpartition(-cosines, min(width, len(rows)) - 1, axis=0)[:width].T
        else:
            place, column = np.nonzero(hits)
            if len(column) == 0:
                return
            order = np.argsort(column, kind="stable")
            place, column = place[order], column[order]
            lines = _by_row(column, place, cosines.T, width)
            top = np.full((len(self.rows), lines.shape[1]), -1)
            top[np.unique(column)] = lines
        near = np.where(top < 0, -np.inf, np.take_along_axis(cosines.T, np.maximum(top, 0), axis=1))
        near = np.concatenate([self._cosines, near.astype(np.float32)], axis=1)
        candidates = np.concatenate([self.rows, np.where(top < 0, -1, rows[top])], axis=1)
        keep = np.argpartition(-near, width - 1, axis=1)[:, :width]
        self._cosines = np.take_along_axis(near, keep, axis=1)
        self.rows = np.take_along_axis(candidates, keep, axis=1)
