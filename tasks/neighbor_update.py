"""Neighbour lists of a corpus that has grown: updated, not searched again.

    carried     documents that were here before keep their lists, with the rows renumbered; a list that names a document
                which is gone is searched again, as a new document's is
    new         searched exactly among all documents of the partition
    merged      every carried list against the new documents only: those nearer than its last place enter it

Price for n documents of which m are new: two matrix products of n x m, against one of n x n; 1% new documents cost 2% of an
exact search. Exact lists come out as a full search gives them; the lists of an index keep the recall that they had, which
is measured again.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from storage.artifact import Artifact
from storage.errors import EclectusError
from tasks.nearest import Lists, Partition, exact_neighbors, measured_recall, recall_sample, similarities_of, unit
from tasks.run import current_run

if TYPE_CHECKING:
    from tasks.neighbors import NeighborSettings

MADE_OF = "made_of.json"
BLOCK = 65_536
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
    run = current_run()
    if run is None or settings.neighbors_growth == 0 or not embeddings.file("ids.npy").is_file():
        return None
    ids, key = np.load(embeddings.file("ids.npy"), mmap_mode="r"), embeddings.statistics.get("embedding_key")
    best: tuple[int, Earlier] | None = None
    for note in sorted((run.home.store.root / "neighbors").glob(f"*/{MADE_OF}")):
        with contextlib.suppress(EclectusError, OSError, ValueError):
            told = json.loads(note.read_text())
            before = run.home.store.find(f"embeddings-{told['embeddings']}")
            if told["settings"] != settings.key_values() or before.statistics.get("embedding_key") != key:
                continue
            artifact = run.home.store.find(str(note.parent))
            earlier = Earlier(artifact, _rows_now(artifact, before, ids, names, labels))
            shared = int((earlier.to_new >= 0).sum())
            if (best is None or shared > best[0]) and not run.home.store.faults(artifact):
                best = shared, earlier
    return best[1] if best else None


def _rows_now(
    artifact: Artifact, before: Artifact, ids: np.ndarray, names: list[str], labels: np.ndarray
) -> np.ndarray:
    old = np.load(before.file("ids.npy"), mmap_mode="r")
    if len(ids) == 0:
        return np.full(len(old), -1)
    order = np.argsort(ids, kind="stable")
    rows = order[np.minimum(np.searchsorted(ids, old, sorter=order), len(ids) - 1)]
    number = {name: place for place, name in enumerate(names)}
    then = json.loads(artifact.file("partitions.json").read_text())
    partition_now = np.array([number.get(name, -1) for name in then] or [-1])
    same = partition_now[np.load(artifact.file("partition.npy"))] == labels[rows]
    return np.where((ids[rows] == old) & same, rows, -1)


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
    new, old = partition.rows[~carried[partition.rows]], partition.rows[carried[partition.rows]]
    if len(new) > settings.neighbors_growth * len(partition.rows):
        lists.clear(partition.rows)
        return None
    if len(new):
        lists.rows[new], lists.similarities[new] = exact_neighbors(vectors, new, partition.rows, settings.neighbors_k)
        _enter(vectors, new, old, lists)
    method = {told["partition"]: told["method"] for told in earlier.artifact.statistics["partitions"]}[partition.name]
    recall = 1.0
    if method != "exact":
        recall = measured_recall(vectors, partition.rows, recall_sample(partition.rows, settings), lists, settings)
    return {"method": method, "recall": round(recall, 4), "updated": len(new)}


def _enter(vectors: np.ndarray, new: np.ndarray, old: np.ndarray, lists: Lists) -> None:
    """Merges the new documents (rows) into the lists of the old ones (rows) to which they are near enough."""
    import faiss

    sample, k = unit(vectors, new), min(lists.rows.shape[1], len(new))
    for begin in range(0, len(old), BLOCK):
        block = old[begin : begin + BLOCK]
        queries = unit(vectors, block)
        near, places = faiss.knn(queries, sample, k, metric=faiss.METRIC_INNER_PRODUCT)
        last = np.where(lists.rows[block, -1] < 0, -np.inf, lists.similarities[block, -1])
        enters = near > last[:, None] - ROUNDING
        rows, width = np.flatnonzero(enters[:, 0]), int(enters.sum(axis=1).max(initial=0))
        found = np.where(enters, new[places], -1)[rows, :width]
        # A list that is searched again belongs to a document that others may already list.
        found[(found[:, :, None] == lists.rows[block[rows]][:, None, :]).any(axis=2)] = -1
        lists.merge(block[rows], found, similarities_of(vectors, queries[rows], found))
