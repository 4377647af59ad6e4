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

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from eclectus.tasks.disk_matrix import PartMatrix
from eclectus.tasks.grouping.cells import search, tree
from eclectus.tasks.grouping.cells.corpus import Corpus, Members
from eclectus.tasks.grouping.cells.sample import Sample


@dataclass(frozen=True)
class Searched:
    """A partition that was searched: folders of its tree, of its documents' cells by part, and of its lists by part.

    sample: what measures the recall. fresh: folder that says which representatives have lists, where earlier lists were
    updated.
    """

    name: str
    members: Members
    tree: Path
    assigned: list[Path]
    merged: list[Path]
    overlap: int
    blocks: int
    sample: Sample
    statistics: dict[str, Any] = field(default_factory=dict)
    fresh: Path | None = None

    def measured(self, similarities: PartMatrix) -> dict[str, float]:
        """The recall of the lists and its error. similarities: float32 [N, k], of all documents."""
        recall, error = self.sample.recall(similarities[self.members.rows[self.sample.positions]])
        return {"recall": round(recall, 4), "recall_error": round(error, 4)}


def search_partition(corpus: Corpus, name: str, rows: np.ndarray, hashes: np.ndarray) -> Searched:
    """Finds the lists of these documents (rows int64, ascending; hashes of their vectors) by cells."""
    members = Members.find(corpus, name, rows, hashes)
    choosing, measuring = Sample.draw(corpus, name, members).halves()
    built, bounds = _build_tree(corpus, name, members)
    overlap = choosing.overlap(corpus, built, members)
    source = {"embeddings": corpus.embeddings, "rows": members.folder / "kept.npy"}
    calls = [
        ({**source, "tree": built, "begin": begin, "end": end, "overlap": overlap}, end - begin)
        for begin, end in members.ranges(corpus.begins)
    ]
    assigned = [each.folder for each in corpus.over(tree.assign_cells, "cells", name, calls)]
    merged, largest = search_blocks(corpus, name, members, assigned, bounds)
    statistics = {
        "cells": int(bounds[-1][1]),
        "overlap": overlap,
        "blocks": len(bounds),
        "largest_cell": largest,
        "copies": len(rows) - len(members.kept),
    }
    return Searched(name, members, built, assigned, merged, overlap, len(bounds), measuring, statistics)


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


def lists_of(members: Members, merged: list[Path], positions: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The lists of these documents (positions [n]), copies included: positions int64 [n, k], -1 is padding; cosines."""
    own = members.own[positions]
    near, cosines = (PartMatrix([folder / name for folder in merged])[own] for name in ("near.npy", "cosine.npy"))
    return search.with_copies(
        near, cosines, np.asarray(own, np.int64), np.asarray(positions), members.starts, members.copies, k
    )
