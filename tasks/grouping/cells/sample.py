"""Documents of a partition whose exact neighbours are known: what overlap the cells need, and how good lists are."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from eclectus.tasks.disk_matrix import PartMatrix, mapped
from eclectus.tasks.grouping.cells import tree
from eclectus.tasks.grouping.cells.corpus import Corpus, Members
from eclectus.tasks.grouping.nearest import Lists, exact_neighbors

SAMPLE = 512
MOST_PROBES = 256
ROUNDING = 1e-5


@dataclass(frozen=True)
class Sample:
    """Documents of a partition whose exact neighbours are known.

    positions: int64 [Q], in the partition. exact: int64 [Q, k], positions, -1 is padding. cosines: float32 [Q, k].
    """

    positions: np.ndarray
    exact: np.ndarray
    cosines: np.ndarray

    @classmethod
    def draw(cls, corpus: Corpus, name: str, members: Members, size: int = SAMPLE) -> Sample:
        random = np.random.default_rng([corpus.settings.seed, len(members.rows), 2])
        positions = random.choice(len(members.rows), min(size, len(members.rows)), replace=False)
        return cls(positions, *exact_lists(corpus, name, members, members.rows[positions]))

    @classmethod
    def grown(
        cls, corpus: Corpus, name: str, members: Members, then: Path, to_new: np.ndarray, new: np.ndarray
    ) -> Sample:
        """The sample of earlier lists, its exact neighbours compared with new documents only, and as large a share of
        those. then: folder of `save`. to_new: int64, the rows now of the rows then. new: int64, new documents' rows.

        A document that lost a neighbour is compared with all again, like the new ones.
        """
        rows = _renumbered(np.load(then / "rows.npy"), to_new)
        left = rows >= 0
        before, cosines = np.load(then / "near.npy")[left], np.load(then / "cosines.npy")[left]
        rows, near = rows[left], _renumbered(before, to_new)
        whole = ((near >= 0) == (before >= 0)).all(axis=1)
        lists = Lists(near[whole], cosines[whole])
        if len(new) and whole.any():
            fresh = exact_neighbors(PartMatrix(corpus.embeddings), rows[whole], new, near.shape[1])
            lists.merge(np.arange(len(lists.rows)), *fresh)
        random = np.random.default_rng([corpus.settings.seed, len(members.rows), 3])
        share = len(rows) / max(1, len(members.rows) - len(new))
        drawn = random.choice(new, min(len(new), max(1, round(share * len(new)))), replace=False)
        again = np.concatenate([rows[~whole], drawn])
        rows = np.concatenate([rows[whole], again])
        exact, others = exact_lists(corpus, name, members, again)
        chosen = np.sort(random.choice(len(rows), min(len(rows), SAMPLE), replace=False))
        positions = np.searchsorted(members.rows, rows[chosen])
        near = np.concatenate([np.searchsorted(members.rows, np.maximum(lists.rows, members.rows[0])), exact])
        near[: len(lists.rows)][lists.rows < 0] = -1
        return cls(positions, near[chosen], np.concatenate([lists.similarities, others])[chosen])

    def halves(self) -> tuple[Sample, Sample]:
        """One that chooses the overlap, one that measures the recall; both this one if it is a single document."""
        half = (len(self.positions) + 1) // 2
        if half == len(self.positions):
            return self, self
        arrays = (self.positions, self.exact, self.cosines)
        return Sample(*(each[:half] for each in arrays)), Sample(*(each[half:] for each in arrays))

    def save(self, folder: Path, members: Members) -> None:
        """Writes rows.npy int64 [Q], near.npy int64 [Q, k], rows too, and cosines.npy, for `grown`."""
        folder.mkdir(parents=True)
        np.save(folder / "rows.npy", members.rows[self.positions])
        np.save(folder / "near.npy", np.where(self.exact < 0, -1, members.rows[np.maximum(self.exact, 0)]))
        np.save(folder / "cosines.npy", self.cosines)

    def overlap(self, corpus: Corpus, built: Path, members: Members) -> int:
        """The smallest overlap of the cells with which enough of the neighbours share a cell, or the most."""
        exact = self.exact
        mine, theirs = members.own[self.positions], members.own[np.maximum(exact, 0)]
        documents, place = np.unique(np.concatenate([mine, theirs.ravel()]), return_inverse=True)
        vectors, cells = tree.Vectors(corpus.embeddings, members.folder / "kept.npy"), tree.Tree.load(built)
        batches = np.array_split(documents, 1 + len(documents) // tree.BATCH)
        cells_of = np.concatenate([cells.nearest(vectors(part), tree.MOST_OVERLAP) for part in batches])[place]
        least = tree.shares_a_cell(cells_of[: len(mine)], cells_of[len(mine) :].reshape(*theirs.shape, -1))
        least[theirs == mine[:, None]] = 1
        there, target = exact >= 0, corpus.settings.neighbors_recall_target
        return _smallest(least, there, target, tree.MOST_OVERLAP)

    def probes(self, corpus: Corpus, built: Path, members: Members, cells: PartMatrix) -> int:
        """In how many of its nearest cells a document must look for those whose own nearest cell is among them, to find
        enough of its neighbours; or the most. cells: int32 [R, overlap], of the representatives, nearest first."""
        mine, theirs = members.own[self.positions], members.own[np.maximum(self.exact, 0)]
        documents, place = np.unique(theirs, return_inverse=True)
        nearest_cell = cells[documents][place.reshape(theirs.shape), 0]
        vectors = tree.Vectors(corpus.embeddings, members.folder / "kept.npy")
        probed = tree.Tree.load(built).nearest(vectors(mine), MOST_PROBES)
        there = probed[:, None, :] == nearest_cell[:, :, None]
        least = np.where(there.any(axis=2), there.argmax(axis=2), MOST_PROBES) + 1
        least[theirs == mine[:, None]] = 1
        return _smallest(least, self.exact >= 0, corpus.settings.neighbors_recall_target, MOST_PROBES)

    def recall(self, similarities: np.ndarray) -> tuple[float, float]:
        """The recall and its standard error: share of the neighbours listed that are as near as the exact ones: of
        documents that are equally near, any will do. similarities: float32 [Q, k], of the lists of the documents."""
        last = np.where(self.exact < 0, np.inf, self.cosines).min(axis=1, initial=np.inf)
        hits = np.nan_to_num(similarities, nan=-np.inf) >= last[:, None] - ROUNDING
        wanted = (self.exact >= 0).sum(axis=1)
        error = standard_error(hits.sum(axis=1) / np.maximum(wanted, 1))
        return float(hits.sum() / max(1, int(wanted.sum()))), error


def nearest_to_sample(
    out: Path, embeddings: list[Path], rows: Path, begin: int, end: int, queries: list[int], k: int
) -> dict[str, Any]:
    """Writes rows.npy int64 [Q, k] and cosine.npy: the exact neighbours of the queries (rows) among rows begin to end
    - 1 of a partition."""
    tree.set_one_thread()
    vectors, wanted, every = PartMatrix(embeddings), np.array(queries, np.int64), mapped(rows)
    lists = Lists(np.full((len(wanted), k), -1), np.full((len(wanted), k), np.nan, np.float32))
    # For a few queries, blocks that fit into the processor's cache.
    step = max(4_096, 1_024 * len(wanted))
    for first in range(begin, end, step):
        found = exact_neighbors(vectors, wanted, np.asarray(every[first : min(first + step, end)]), k)
        lists.merge(np.arange(len(wanted)), *found)
    np.save(out / "rows.npy", lists.rows)
    np.save(out / "cosine.npy", lists.similarities)
    return {}


def exact_lists(corpus: Corpus, name: str, members: Members, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The exact neighbours of these rows [Q] within their partition: positions int64 [Q, k], -1 is padding; cosines."""
    k = corpus.settings.neighbors_k
    lists = Lists(np.full((len(queries), k), -1), np.full((len(queries), k), np.nan, np.float32))
    if len(queries):
        bounds = np.searchsorted(members.rows, corpus.begins).tolist()
        source = {"embeddings": corpus.embeddings, "rows": members.folder / "rows.npy", "queries": queries.tolist()}
        calls = [({**source, "begin": begin, "end": end, "k": k}, end - begin) for begin, end in pairwise(bounds)]
        for each in corpus.over(nearest_to_sample, "sample", name, calls):
            lists.merge(np.arange(len(queries)), np.load(each.file("rows.npy")), np.load(each.file("cosine.npy")))
    exact = np.searchsorted(members.rows, np.maximum(lists.rows, members.rows[0]))
    return np.where(lists.rows < 0, -1, exact), lists.similarities


def _renumbered(rows: np.ndarray, to_new: np.ndarray) -> np.ndarray:
    """These rows, or -1, as the rows that they are now; -1 if they are gone."""
    return np.where(rows < 0, -1, to_new[np.maximum(rows, 0)])


def _smallest(least: np.ndarray, there: np.ndarray, target: float, most: int) -> int:
    """The smallest number, of 1 to `most`, with which enough neighbours are found, or `most`.

    least: int [Q, k], the smallest with which each is found. there: bool [Q, k], False for padding.
    """
    for number in range(1, most):
        shares = ((least <= number) & there).sum(axis=1) / np.maximum(there.sum(axis=1), 1)
        if shares.mean() >= min(1.0, target + standard_error(shares)):
            return number
    return most


def standard_error(shares: np.ndarray) -> float:
    """Of the mean of these numbers [n]."""
    return float(shares.std() / np.sqrt(max(1, len(shares))))
