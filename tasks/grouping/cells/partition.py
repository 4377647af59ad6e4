"""The search of one partition by cells: its stages, each of them spread over parts.

    copies       documents with the same embedding: the first one is searched for all of them, so a million copies of a
                 text are no cell that nothing splits
    tree         nodes of a sample, nodes of all documents, cells of the nodes, blocks of cells
    sample       exact neighbours of SAMPLE documents: half of them choose the overlap, the other half measure the
                 recall
    cells        the nearest cells of every document
    blocks       searched; then put together part by part (`eclectus.tasks.grouping.cells.search`)

Memory here: about 40 bytes per document of the partition, and the cells' centres; in a call, the vectors of a block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from eclectus.storage.artifact import Artifact
from eclectus.tasks.disk_matrix import PartMatrix, mapped, matrix_files, usable_rows
from eclectus.tasks.grouping.cells import search, tree
from eclectus.tasks.grouping.nearest import Lists, NeighborSettings, exact_neighbors
from eclectus.tasks.over_parts import Done, Part, key_of, over_parts

SAMPLE = 512
ROUNDING = 1e-5
SECONDS = {"hash": 3e-6, "nodes": 8e-6, "split": 15e-6, "sample": 8e-6, "cells": 15e-6, "search": 60e-6, "merge": 5e-6}
"""CPU seconds per document (256 dimensions), to choose between this process and Ray."""


@dataclass(frozen=True)
class Corpus:
    """What is searched: the files of the embeddings, rows at which parts begin (int64 [parts + 1]), who works.

    key: of everything that decides the lists. made: results of all stages, for `forget`.
    """

    embeddings: list[Path]
    begins: np.ndarray
    settings: NeighborSettings
    key: str
    workers: int = 0
    made: list[Done] = field(default_factory=list)

    @classmethod
    def of(cls, embeddings: Artifact, begins: np.ndarray, labels: np.ndarray, settings: NeighborSettings) -> Corpus:
        """labels: int32 [N], the partition of each document."""
        files = matrix_files(embeddings, "embeddings")
        digests = embeddings.digests()
        names = [path.relative_to(embeddings.path).as_posix() for path in files]
        partitions = hashlib.sha256(labels.tobytes()).hexdigest()
        key = key_of(
            "neighbours", [digests[name] for name in names], begins.tolist(), partitions, settings.key_values()
        )
        return cls(files, begins, settings, key, settings.neighbors_threads or settings.curation_workers)

    @property
    def dimension(self) -> int:
        return int(PartMatrix(self.embeddings).shape[1])

    def hashes(self) -> np.ndarray:
        """Of all documents, uint64 [N]: equal for embeddings with the same bits, 0 where there is none."""
        calls = [
            ({"embeddings": self.embeddings, "begin": begin, "end": end}, end - begin)
            for begin, end in pairwise(self.begins.tolist())
        ]
        return np.concatenate([np.load(each.file("hash.npy")) for each in self.over(hash_vectors, "hash", "", calls)])

    def over(
        self, function: Any, stage: str, name: str, calls: Sequence[tuple[dict[str, Any], int]], gpus: float = 0
    ) -> list[Done]:
        """`over_parts` for one stage of a partition. calls: arguments and documents of each."""
        parts = [
            Part(key_of(f"cells 1 {stage}", self.key, name, number), arguments, size, f"{name}, {stage} {number}")
            for number, (arguments, size) in enumerate(calls)
        ]
        what = f"neighbours of {name}: {stage}" if name else f"neighbours: {stage}"
        done = over_parts(function, parts, what, seconds=SECONDS.get(stage, 0.0), workers=self.workers, gpus=gpus)
        self.made.extend(done)
        return done

    def publish(self, stage: str, name: str, arrays: dict[str, np.ndarray]) -> Path:
        """A folder with these arrays as `.npy`, for the workers."""
        part = Part(key_of(f"cells 1 {stage}", self.key, name), {"arrays": arrays}, 0, f"{name}, {stage}")
        done = over_parts(save_arrays, [part], f"neighbours: {stage}", workers=1)
        self.made.extend(done)
        return done[0].folder


def save_arrays(out: Path, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    for name, array in arrays.items():
        np.save(out / f"{name}.npy", array)
    return {}


def hash_vectors(out: Path, embeddings: list[Path], begin: int, end: int) -> dict[str, Any]:
    """Writes hash.npy uint64 [end - begin]: equal for rows with the same bits, 0 for one without an embedding."""
    matrix = PartMatrix(embeddings)
    weights = np.random.default_rng(1).integers(0, 2**63, matrix.shape[1], np.uint64) * 2 + 1
    hashes = np.empty(end - begin, np.uint64)
    for first in range(begin, end, tree.BATCH):
        block = matrix[first : min(first + tree.BATCH, end)]
        bits = block.view(f"u{block.dtype.itemsize}").astype(np.uint64)
        found = ((bits * weights).sum(axis=1) << np.uint64(1)) | np.uint64(1)
        hashes[first - begin : first - begin + len(block)] = np.where(usable_rows(block), found, np.uint64(0))
    np.save(out / "hash.npy", hashes)
    return {}


def representatives(rows: np.ndarray, hashes: np.ndarray, vectors: PartMatrix) -> np.ndarray:
    """For each of these rows [n] of `vectors` the position of the first with the same bits, int64 [n].

    hashes: uint64 [n], of `hash_vectors`; rows with the same are compared.
    """
    order = np.argsort(hashes, kind="stable")
    same = np.concatenate([[False], hashes[order[1:]] == hashes[order[:-1]]])[: len(order)]
    maybe = np.flatnonzero(same)
    for begin in range(0, len(maybe), tree.BATCH):
        at = maybe[begin : begin + tree.BATCH]
        same[at] = (vectors[rows[order[at]]] == vectors[rows[order[at - 1]]]).all(axis=1)
    first = np.empty(len(order), np.int64)
    first[order] = order[np.flatnonzero(~same)][np.cumsum(~same) - 1]
    return first


@dataclass(frozen=True)
class Members:
    """The documents of a partition, in a folder: those that are searched, and their copies.

    rows: int64 [n], ascending. own: int32 [n], the number of each one's representative. kept: int64 [R], the rows of
    the representatives. starts, copies: int32, the documents (by position) of each representative, ascending, as CSR.
    """

    folder: Path
    rows: np.ndarray
    own: np.ndarray
    kept: np.ndarray
    starts: np.ndarray
    copies: np.ndarray

    @classmethod
    def load(cls, folder: Path) -> Members:
        names = ("rows", "own", "kept", "starts", "copies")
        return cls(folder, **{name: mapped(folder / f"{name}.npy") for name in names})

    @classmethod
    def find(cls, corpus: Corpus, name: str, rows: np.ndarray, hashes: np.ndarray) -> Members:
        first = representatives(rows, hashes, PartMatrix(corpus.embeddings))
        kept = np.flatnonzero(first == np.arange(len(rows)))
        copies = np.argsort(first, kind="stable")
        arrays = {
            "rows": rows,
            "own": np.searchsorted(kept, first).astype(np.int32),
            "kept": rows[kept],
            "starts": np.searchsorted(first[copies], np.append(kept, len(rows))).astype(np.int32),
            "copies": copies.astype(np.int32),
        }
        return cls.load(corpus.publish("members", name, arrays))

    def ranges(self, begins: np.ndarray) -> list[tuple[int, int]]:
        """The representatives of each part of the corpus, as ranges of their numbers."""
        bounds = np.searchsorted(self.kept, begins).tolist()
        return list(pairwise(bounds))


@dataclass(frozen=True)
class Searched:
    """A partition that was searched: folders of its tree, of its documents' cells by part, and of its lists by part.

    fresh: folder that says which representatives have lists, where earlier lists were updated.
    """

    name: str
    members: Members
    tree: Path
    assigned: list[Path]
    merged: list[Path]
    overlap: int
    blocks: int
    statistics: dict[str, Any] = field(default_factory=dict)
    fresh: Path | None = None


def search_partition(corpus: Corpus, name: str, rows: np.ndarray, hashes: np.ndarray) -> Searched:
    """Finds the lists of these documents (rows int64, ascending; hashes of their vectors) by cells."""
    members = Members.find(corpus, name, rows, hashes)
    sample = Sample.draw(corpus, name, members)
    built, bounds = _build_tree(corpus, name, members)
    overlap = sample.overlap(corpus, built, members)
    source = {"embeddings": corpus.embeddings, "rows": members.folder / "kept.npy"}
    calls = [
        ({**source, "tree": built, "begin": begin, "end": end, "overlap": overlap}, end - begin)
        for begin, end in members.ranges(corpus.begins)
    ]
    assigned = [each.folder for each in corpus.over(tree.assign_cells, "cells", name, calls)]
    merged, largest = search_blocks(corpus, name, members, assigned, bounds)
    half = (len(sample.positions) + 1) // 2 if len(sample.positions) > 1 else 0
    found = lists_of(members, merged, sample.positions[half:], corpus.settings.neighbors_k)[1]
    recall, error = sample.recall(found, half)
    statistics = {
        "recall": round(recall, 4),
        "recall_error": round(error, 4),
        "cells": int(bounds[-1][1]),
        "overlap": overlap,
        "blocks": len(bounds),
        "largest_cell": largest,
        "copies": len(rows) - len(members.kept),
    }
    return Searched(name, members, built, assigned, merged, overlap, len(bounds), statistics)


def _build_tree(corpus: Corpus, name: str, members: Members) -> tuple[Path, list[tuple[int, int]]]:
    """The folder of the tree, and the cells of each block."""
    source = {"embeddings": corpus.embeddings, "rows": members.folder / "kept.npy"}
    seed, ranges = corpus.settings.seed, members.ranges(corpus.begins)
    (nodes,) = corpus.over(tree.find_nodes, "tree", name, [({**source, "seed": seed}, 0)])
    calls = [({**source, "nodes": nodes.folder, "begin": begin, "end": end}, end - begin) for begin, end in ranges]
    assigned = corpus.over(tree.assign_nodes, "nodes", name, calls)
    documents = np.sum([each.about["documents"] for each in assigned], axis=0)
    most = tree.block_documents(tree.Vectors(corpus.embeddings, members.folder / "kept.npy").dimension)
    folders = [each.folder for each in assigned]
    calls = [
        ({**source, "assigned": folders, "begin": begin, "end": end, "seed": seed}, int(documents[begin:end].sum()))
        for begin, end in consecutive(documents, most)
    ]
    split = corpus.over(tree.split_nodes, "split", name, calls)
    cells = np.concatenate([each.about["cells"] for each in split])
    bounds = consecutive(np.concatenate([each.about["documents"] for each in split]), most)
    arrays = {
        "nodes": np.load(nodes.file("nodes.npy")),
        "centres": np.concatenate([np.load(each.file("centres.npy")) for each in split]),
        "first": np.concatenate([[0], np.cumsum(cells)]).astype(np.int64),
        "block": np.repeat(np.arange(len(bounds)), np.diff([0, *(end for _, end in bounds)])).astype(np.int32),
    }
    return corpus.publish("cells of the tree", name, arrays), bounds


def consecutive(sizes: np.ndarray, most: int) -> list[tuple[int, int]]:
    """Ranges of consecutive items, each of at most `most` together, or of one item."""
    bounds, begin, total = [], 0, 0
    for number, size in enumerate(sizes.tolist()):
        if number > begin and total + size > most:
            bounds.append((begin, number))
            begin, total = number, 0
        total += size
    return [*bounds, (begin, len(sizes))]


def search_blocks(
    corpus: Corpus, name: str, members: Members, assigned: list[Path], bounds: list[tuple[int, int]]
) -> tuple[list[Path], int]:
    """The folders of the representatives' lists, part by part, and the size of the largest cell."""
    width, cuda = corpus.settings.neighbors_k, corpus.settings.neighbors_device == "cuda"
    calls = [
        (
            {
                "embeddings": corpus.embeddings,
                "rows": members.folder / "kept.npy",
                "assigned": assigned,
                "begin": begin,
                "end": end,
                "width": width,
                "device": corpus.settings.neighbors_device,
            },
            len(members.kept) // len(bounds),
        )
        for begin, end in bounds
    ]
    found = corpus.over(search.search_block, "search", name, calls, gpus=float(cuda))
    calls = [
        ({"blocks": [each.folder for each in found], "begin": begin, "end": end, "width": width}, end - begin)
        for begin, end in members.ranges(corpus.begins)
    ]
    merged = [each.folder for each in corpus.over(search.merge_blocks, "merge", name, calls)]
    return merged, max(each.about["largest"] for each in found)


def nearest_to_sample(
    out: Path, embeddings: list[Path], rows: Path, begin: int, end: int, queries: list[int], k: int
) -> dict[str, Any]:
    """Writes rows.npy int64 [Q, k] and cosine.npy: the exact neighbours of the queries (rows) among rows begin to end
    - 1 of a partition."""
    tree.set_one_thread()
    found, cosines = exact_neighbors(
        PartMatrix(embeddings), np.array(queries, np.int64), np.asarray(mapped(rows)[begin:end]), k
    )
    np.save(out / "rows.npy", found)
    np.save(out / "cosine.npy", cosines)
    return {}


@dataclass(frozen=True)
class Sample:
    """Documents of a partition whose exact neighbours are known: the first half chooses, the other half measures.

    positions: int64 [Q], in the partition. exact: int64 [Q, k], positions, -1 is padding. cosines: float32 [Q, k].
    """

    positions: np.ndarray
    exact: np.ndarray
    cosines: np.ndarray

    @classmethod
    def draw(cls, corpus: Corpus, name: str, members: Members, size: int = SAMPLE) -> Sample:
        random = np.random.default_rng([corpus.settings.seed, len(members.rows), 2])
        positions = random.choice(len(members.rows), min(size, len(members.rows)), replace=False)
        k, queries = corpus.settings.neighbors_k, members.rows[positions]
        bounds = np.searchsorted(members.rows, corpus.begins).tolist()
        source = {"embeddings": corpus.embeddings, "rows": members.folder / "rows.npy", "queries": queries.tolist()}
        calls = [({**source, "begin": begin, "end": end, "k": k}, end - begin) for begin, end in pairwise(bounds)]
        lists = Lists(np.full((len(queries), k), -1), np.full((len(queries), k), np.nan, np.float32))
        for each in corpus.over(nearest_to_sample, "sample", name, calls):
            lists.merge(np.arange(len(queries)), np.load(each.file("rows.npy")), np.load(each.file("cosine.npy")))
        exact = np.searchsorted(members.rows, np.maximum(lists.rows, members.rows[0]))
        return cls(positions, np.where(lists.rows < 0, -1, exact), lists.similarities)

    def overlap(self, corpus: Corpus, built: Path, members: Members) -> int:
        """The smallest overlap of the cells with which enough of the first half's neighbours share a cell, or the
        most."""
        half = slice(0, (len(self.positions) + 1) // 2)
        exact = self.exact[half]
        mine, theirs = members.own[self.positions[half]], members.own[np.maximum(exact, 0)]
        documents, place = np.unique(np.concatenate([mine, theirs.ravel()]), return_inverse=True)
        vectors, cells = tree.Vectors(corpus.embeddings, members.folder / "kept.npy"), tree.Tree.load(built)
        batches = np.array_split(documents, 1 + len(documents) // tree.BATCH)
        cells_of = np.concatenate([cells.nearest(vectors(part), tree.MOST_OVERLAP) for part in batches])[place]
        least = tree.shares_a_cell(cells_of[: len(mine)], cells_of[len(mine) :].reshape(*theirs.shape, -1))
        least[theirs == mine[:, None]] = 1
        there, target = exact >= 0, corpus.settings.neighbors_recall_target
        shares = [
            ((least <= overlap) & there).sum(axis=1) / np.maximum(there.sum(axis=1), 1)
            for overlap in range(1, tree.MOST_OVERLAP + 1)
        ]
        enough = np.flatnonzero([each.mean() >= min(1.0, target + standard_error(each)) for each in shares])
        return int(enough[0]) + 1 if len(enough) else tree.MOST_OVERLAP

    def recall(self, similarities: np.ndarray, begin: int = 0) -> tuple[float, float]:
        """The recall and its standard error: share of the neighbours listed that are as near as the exact ones: of
        documents that are equally near, any will do. similarities: float32 [Q - begin, k], of the lists of the
        documents from `begin` on."""
        exact = self.exact[begin:]
        last = np.where(exact < 0, np.inf, self.cosines[begin:]).min(axis=1, initial=np.inf)
        hits = np.nan_to_num(similarities, nan=-np.inf) >= last[:, None] - ROUNDING
        wanted = (exact >= 0).sum(axis=1)
        error = standard_error(hits.sum(axis=1) / np.maximum(wanted, 1))
        return float(hits.sum() / max(1, int(wanted.sum()))), error


def standard_error(shares: np.ndarray) -> float:
    """Of the mean of these numbers [n]."""
    return float(shares.std() / np.sqrt(max(1, len(shares))))


def lists_of(members: Members, merged: list[Path], positions: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The lists of these documents (positions [n]), copies included: positions int64 [n, k], -1 is padding; cosines."""
    own = members.own[positions]
    near, cosines = (PartMatrix([folder / name for folder in merged])[own] for name in ("near.npy", "cosine.npy"))
    return search.with_copies(
        near, cosines, np.asarray(own, np.int64), np.asarray(positions), members.starts, members.copies, k
    )
