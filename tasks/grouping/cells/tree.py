"""Cells: many small overlapping sets of similar documents. Documents that share a cell are compared exactly.

    tree         spherical k-means of a sample, twice: nodes, along a greedy path through their centres, and in each
                 node cells of at most 2 x OWN documents of their own (larger ones are split again; what k-means cannot
                 split is cut)
    overlap      every document stands in its `overlap` nearest cells, of the NEAR nodes nearest to it
    blocks       consecutive cells of about BLOCK_BYTES of vectors, which one call searches and chains

Two documents find each other exactly if they share a cell, so the recall of any overlap is known from a sample before
anything is searched. The price is linear in the documents: N x (nodes + NEAR x cells of a node), both about the square
root of N / OWN, plus N x overlap^2 x OWN in the search, all as matrix products.

Functions here are called over parts (`eclectus.tasks.over_parts`): paths and numbers in, files out, one thread.
Documents are numbered within their partition; `rows` gives their rows in the embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from eclectus.tasks.compiled import compiled
from eclectus.tasks.disk_matrix import PartMatrix, mapped

OWN = 240
NEAR = 12
MOST_OVERLAP = 16
MOST_CENTRES = 256
POINTS_PER_CENTRE = 64
ROUNDS = 4
BATCH = 16_384
BLOCK_BYTES = 64 * 2**20


class Vectors:
    """Unit vectors of documents that are numbered from 0. rows: `.npy`, their rows in the embeddings, ascending."""

    def __init__(self, embeddings: list[Path], rows: Path) -> None:
        self._matrix, self.rows = PartMatrix(embeddings), mapped(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __call__(self, documents: np.ndarray) -> np.ndarray:
        """float32 [n, D] of these documents [n]."""
        block = np.asarray(self._matrix[self.rows[documents]], np.float32)
        block /= np.sqrt(np.einsum("nd,nd->n", block, block))[:, None]
        return block

    @property
    def dimension(self) -> int:
        return int(self._matrix.shape[1])


def block_documents(dimension: int) -> int:
    """Documents of which a block should have about this many."""
    return max(1_024, BLOCK_BYTES // (4 * max(1, dimension)))


@dataclass(frozen=True)
class Tree:
    """The cells of a partition, in a folder.

    nodes: float32 [n, D]. centres: float32 [C, D], of the cells, node by node. first: int64 [n + 1], where the cells of
    a node begin. block: int32 [C].
    """

    nodes: np.ndarray
    centres: np.ndarray
    first: np.ndarray
    block: np.ndarray

    @classmethod
    def load(cls, folder: Path) -> Tree:
        return cls(**{name: mapped(folder / f"{name}.npy") for name in TREE})

    def nearest(self, vectors: np.ndarray, overlap: int) -> np.ndarray:
        """The cells of these unit vectors [n, D], nearest first: int32 [n, overlap], -1 where there are fewer."""
        found = np.full((len(vectors), overlap), -1, np.int32)
        cosines = np.full((len(vectors), overlap), -np.inf, np.float32)
        # Nodes that hold three times as many cells as are wanted, where NEAR of them do not.
        enough = -(-3 * overlap * len(self.nodes) // max(1, len(self.centres)))
        nodes = nearest(vectors, self.nodes, max(NEAR, enough))
        line = np.argsort(nodes.ravel(), kind="stable")
        bounds = np.searchsorted(nodes.ravel()[line], np.arange(len(self.nodes) + 1)).tolist()
        line //= nodes.shape[1]
        for number, (begin, end) in enumerate(pairwise(bounds)):
            first, last = self.first[number : number + 2].tolist()
            if end > begin and last > first:
                products = vectors[line[begin:end]] @ self.centres[first:last].T
                _keep_best(found, cosines, line[begin:end], products, first)
        return found


@compiled
def _keep_best(found: np.ndarray, cosines: np.ndarray, lines: np.ndarray, products: np.ndarray, first: int) -> None:
    """Takes cells first to first + m - 1, with these cosines [n, m], into lists of cells [N, overlap], best first."""
    last = found.shape[1] - 1
    for i in range(len(lines)):
        me = lines[i]
        for c in range(products.shape[1]):
            cosine = products[i, c]
            if cosine <= cosines[me, last]:
                continue
            at = last
            while at > 0 and cosines[me, at - 1] < cosine:
                found[me, at], cosines[me, at] = found[me, at - 1], cosines[me, at - 1]
                at -= 1
            found[me, at], cosines[me, at] = first + c, cosine


TREE = ("nodes", "centres", "first", "block")


def find_nodes(out: Path, embeddings: list[Path], rows: Path, seed: int) -> dict[str, Any]:
    """Writes nodes.npy of `Tree`."""
    set_one_thread()
    vectors = Vectors(embeddings, rows)
    random = np.random.default_rng([seed, len(vectors)])
    count = max(1, round(2 * np.sqrt(len(vectors) / OWN)))
    nodes = _centres(vectors, np.arange(len(vectors)), count, random)
    nodes = nodes[_path(nodes)]
    np.save(out / "nodes.npy", nodes)
    return {"nodes": len(nodes)}


def _path(nodes: np.ndarray) -> np.ndarray:
    """A greedy path through all nodes: from the first on always to the most similar that is left."""
    left, order = np.ones(len(nodes), bool), [0]
    left[0] = False
    while left.any():
        order.append(int(np.argmax(np.where(left, nodes @ nodes[order[-1]], -np.inf))))
        left[order[-1]] = False
    return np.array(order)


def assign_nodes(
    out: Path, embeddings: list[Path], rows: Path, nodes: Path, begin: int, end: int
) -> dict[str, list[int]]:
    """Writes node.npy int32 [end - begin], the nearest node of each of these documents; returns how many each has."""
    set_one_thread()
    vectors, centres = Vectors(embeddings, rows), np.load(nodes / "nodes.npy")
    node = np.empty(end - begin, np.int32)
    for first in range(begin, end, BATCH):
        part = np.arange(first, min(first + BATCH, end))
        node[first - begin : first - begin + len(part)] = nearest(vectors(part), centres, 1)[:, 0]
    np.save(out / "node.npy", node)
    return {"documents": np.bincount(node, minlength=len(centres)).tolist()}


def split_nodes(
    out: Path, embeddings: list[Path], rows: Path, assigned: list[Path], begin: int, end: int, seed: int
) -> dict[str, list[int]]:
    """Writes centres.npy float32 [C, D] of the cells of nodes begin to end - 1; returns cells by node, documents by
    cell."""
    set_one_thread()
    vectors = Vectors(embeddings, rows)
    node = PartMatrix([folder / "node.npy" for folder in assigned])[:]
    centres, cells, documents = [np.empty((0, vectors.dimension), np.float32)], [], []
    for number in range(begin, end):
        members = np.flatnonzero(node == number)
        random = np.random.default_rng([seed, len(vectors), number])
        local = vectors(members) if len(members) <= 2 * block_documents(vectors.dimension) else None
        found, sizes = _split(vectors, members, local, random)
        centres.append(found)
        cells.append(len(found))
        documents += sizes
    np.save(out / "centres.npy", np.concatenate(centres))
    return {"cells": cells, "documents": documents}


def assign_cells(
    out: Path, embeddings: list[Path], rows: Path, tree: Path, begin: int, end: int, overlap: int
) -> dict[str, int]:
    """Writes cells.npy int32 [end - begin, overlap], nearest first, of these documents; and the same pairs by cell,
    then by how near it is: cell.npy, document.npy (int32), place.npy (uint8; 0 for a document's nearest cell)."""
    set_one_thread()
    vectors, cells_of = Vectors(embeddings, rows), Tree.load(tree)
    cells = np.empty((end - begin, overlap), np.int32)
    for first in range(begin, end, BATCH):
        part = np.arange(first, min(first + BATCH, end))
        cells[first - begin : first - begin + len(part)] = cells_of.nearest(vectors(part), overlap)
    np.save(out / "cells.npy", cells)
    write_by_cell(out, cells, np.arange(begin, end))
    return {}


def write_by_cell(out: Path, cells: np.ndarray, documents: np.ndarray) -> None:
    """Writes cell.npy, document.npy and place.npy. cells: int32 [n, overlap], of these documents [n]."""
    overlap = cells.shape[1]
    keys = np.where(cells < 0, -1, cells.astype(np.int64) * overlap + np.arange(overlap)).ravel()
    order = order_of(keys, int(keys.max(initial=-1)) + 1)
    line, place = np.divmod(order, overlap)
    np.save(out / "cell.npy", (keys[order] // overlap).astype(np.int32))
    np.save(out / "document.npy", documents[line].astype(np.int32))
    np.save(out / "place.npy", place.astype(np.uint8))


@compiled
def order_of(keys: np.ndarray, count: int) -> np.ndarray:
    """The positions of all keys of 0 or more, ascending by key, then by position, int64: a counting sort.

    keys: int64 [n], below `count`.
    """
    slot = np.zeros(count + 1, np.int64)
    for key in keys:
        if key >= 0:
            slot[key + 1] += 1
    for key in range(count):
        slot[key + 1] += slot[key]
    order = np.empty(slot[count], np.int64)
    for position in range(len(keys)):
        key = keys[position]
        if key >= 0:
            order[slot[key]] = position
            slot[key] += 1
    return order


def shares_a_cell(one: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Smallest overlap with which pairs share a cell, int [n, m]; MOST_OVERLAP + 1 if none does.

    one: int32 [n, MOST_OVERLAP], the cells of each document, nearest first. others: int32 [n, m, MOST_OVERLAP].
    """
    least = np.full(others.shape[:2], MOST_OVERLAP + 1)
    for mine in range(one.shape[1]):
        for theirs in range(others.shape[2]):
            same = (others[:, :, theirs] == one[:, mine, None]) & (one[:, mine, None] >= 0)
            least[same] = np.minimum(least[same], max(mine, theirs) + 1)
    return least


def nearest(vectors: np.ndarray, centres: np.ndarray, count: int) -> np.ndarray:
    """Positions int64 [n, count or fewer] of the most similar centres, nearest first."""
    import faiss

    centres = np.ascontiguousarray(centres)
    return faiss.knn(vectors, centres, min(count, len(centres)), metric=faiss.METRIC_INNER_PRODUCT)[1]


def set_one_thread() -> None:
    import faiss

    faiss.omp_set_num_threads(1)


def _centres(vectors: Any, documents: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """Unit centres float32 [count or fewer, D] of a sample of these documents. vectors: documents -> unit vectors."""
    import faiss

    count = min(count, len(documents))
    size = min(len(documents), POINTS_PER_CENTRE * count)
    sample = vectors(np.sort(random.choice(documents, size, replace=False)))
    if count == 1:
        mean = sample.mean(axis=0, keepdims=True)
        length = np.linalg.norm(mean)
        return mean / length if length > 0 else sample[:1]
    kmeans = faiss.Kmeans(
        sample.shape[1],
        count,
        niter=ROUNDS,
        seed=int(random.integers(2**31)),
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=POINTS_PER_CENTRE,
    )
    kmeans.train(sample)
    if kmeans.centroids is None:
        raise RuntimeError("faiss trained no centroids")
    return kmeans.centroids


def _split(
    vectors: Vectors, documents: np.ndarray, local: np.ndarray | None, random: np.random.Generator
) -> tuple[np.ndarray, list[int]]:
    """Centres of cells, float32 [C, D], each with at most 2 x OWN of these documents nearest to it, and these numbers.

    local: unit vectors of these documents, where they are in memory.
    """
    if len(documents) == 0:
        return np.empty((0, vectors.dimension), np.float32), []

    def unit(positions: np.ndarray) -> np.ndarray:
        return vectors(documents[positions]) if local is None else local[positions]

    every = np.arange(len(documents))
    if len(documents) <= 2 * OWN:
        return _centres(unit, every, 1, random), [len(documents)]
    centres = _centres(unit, every, min(MOST_CENTRES, -(-len(documents) // OWN)), random)
    batches = np.array_split(every, 1 + len(documents) // BATCH)
    label = np.concatenate([nearest(unit(part), centres, 1)[:, 0] for part in batches])
    order = np.argsort(label, kind="stable")
    bounds = np.searchsorted(label[order], np.arange(len(centres) + 1))
    parts = [order[first:last] for first, last in pairwise(bounds.tolist()) if last > first]
    if len(parts) == 1:
        # k-means finds nothing to tell them by: any of them are as good neighbours as any others.
        return unit(every[::OWN]), [len(part) for part in np.array_split(every, -(-len(every) // OWN))]
    found = [_split(vectors, documents[part], None if local is None else local[part], random) for part in parts]
    sizes: list[int] = []
    for _, each in found:
        sizes += each
    return np.concatenate([each for each, _ in found]), sizes
