"""Lists of a grown corpus in parts: earlier ones are carried over, and only what is new is compared.

    carried      lists of documents that were there, renumbered; one that names a removed document is searched again
    tree         of the earlier lists; documents that were there keep their cells, the others are assigned
    fresh        documents that are new or whose list is searched again (with all their copies): compared with all
                 members of their cells, which gives them lists, and the others candidates for theirs

Price for n documents of which m are fresh: reading n lists and the vectors of the cells with fresh documents, and
m x (members of their cells) products.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from eclectus.storage.artifact import Artifact
from eclectus.tasks.disk_matrix import PartMatrix, mapped, matrix_files
from eclectus.tasks.grouping.cells import search
from eclectus.tasks.grouping.cells.partition import Corpus, Members, Sample, Searched
from eclectus.tasks.grouping.cells.tree import BATCH, Tree, Vectors, set_one_thread, write_by_cell

RECALL_SAMPLE = 128


@dataclass(frozen=True)
class Carried:
    """Earlier lists for the present documents. folders: of `carry_part`, by part. kept: bool [N], which have one.

    tree: folder of each partition's tree then, by its name. to_old: file of the rows then, int [N], -1 for new ones.
    """

    cells: list[Path]
    folders: list[Path]
    kept: np.ndarray
    trees: dict[str, Path]
    overlaps: dict[str, int]
    to_old: Path

    @classmethod
    def of(cls, corpus: Corpus, artifact: Artifact, names: list[str], to_new: np.ndarray) -> Carried:
        """names: of the partitions of the earlier artifact. to_new: int64 [documents then], rows now, -1 if gone."""
        to_old = np.full(int(corpus.begins[-1]), -1, np.int64)
        to_old[to_new[to_new >= 0]] = np.flatnonzero(to_new >= 0)
        shared = corpus.publish("rows then and now", "", {"to_old": to_old, "to_new": to_new})
        files = {name: matrix_files(artifact, name) for name in ("neighbors", "similarities")}
        calls = [
            ({"files": files, "shared": shared, "begin": begin, "end": end}, end - begin)
            for begin, end in pairwise(corpus.begins.tolist())
        ]
        folders = [each.folder for each in corpus.over(carry_part, "earlier lists", "", calls)]
        kept = np.concatenate([np.load(folder / "kept.npy") for folder in folders])
        trees = {name: Path(artifact.path) / "tree" / str(number) for number, name in enumerate(names)}
        described = {each["partition"]: each.get("overlap", 0) for each in artifact.statistics["partitions"]}
        overlaps = {name: described.get(name, 0) for name, folder in trees.items() if folder.is_dir()}
        return cls(matrix_files(artifact, "cells"), folders, kept, trees, overlaps, shared / "to_old.npy")


def carry_part(out: Path, files: dict[str, list[Path]], shared: Path, begin: int, end: int) -> dict[str, Any]:
    """Writes near.npy [n, k] (rows now, -1 is padding), cosine.npy (-inf there) and kept.npy bool [n] of rows begin to
    end - 1; a document without an earlier list, or one that names a removed document, has none."""
    old, to_new = (
        np.load(shared / "to_old.npy", mmap_mode="r")[begin:end],
        np.load(shared / "to_new.npy", mmap_mode="r"),
    )
    lists, cosines = PartMatrix(files["neighbors"]), PartMatrix(files["similarities"])
    near = np.full((end - begin, lists.shape[1]), -1, lists.dtype)
    found, kept = np.full(near.shape, -np.inf, np.float32), np.zeros(end - begin, bool)
    for first in range(0, end - begin, BATCH):
        lines = first + np.flatnonzero(old[first : first + BATCH] >= 0)
        then = lists[old[lines]]
        now = np.where(then < 0, -1, to_new[np.maximum(then, 0)])
        whole = ((then < 0) == (now < 0)).all(axis=1) & (then >= 0).any(axis=1)
        lines = lines[whole]
        near[lines] = now[whole]
        found[lines] = np.nan_to_num(cosines[old[lines]], nan=-np.inf)
        kept[lines] = True
    for name, array in (("near", near), ("cosine", found), ("kept", kept)):
        np.save(out / f"{name}.npy", array)
    return {}


def update_partition(
    corpus: Corpus, name: str, rows: np.ndarray, hashes: np.ndarray, carried: Carried
) -> tuple[Searched, Sample] | None:
    """As `search_partition`, from earlier lists, and a sample that measures them; None if too much is new."""
    overlap = carried.overlaps.get(name, 0)
    if not overlap or (~carried.kept[rows]).sum() > corpus.settings.neighbors_growth * len(rows):
        return None
    members, built = Members.find(corpus, name, rows, hashes), carried.trees[name]
    fresh = np.bincount(members.own, ~carried.kept[rows], len(members.kept)) > 0
    source = {"embeddings": corpus.embeddings, "rows": members.folder / "kept.npy"}
    calls = [
        (
            {
                **source,
                "tree": built,
                "begin": begin,
                "end": end,
                "overlap": overlap,
                "cells_then": carried.cells,
                "to_old": carried.to_old,
            },
            end - begin,
        )
        for begin, end in members.ranges(corpus.begins)
    ]
    assigned = [each.folder for each in corpus.over(keep_cells, "cells kept", name, calls)]
    cosines = PartMatrix([folder / "cosine.npy" for folder in carried.folders])
    lasts = np.empty(len(fresh), np.float32)
    for begin in range(0, len(fresh), BATCH):
        lasts[begin : begin + BATCH] = cosines[members.kept[begin : begin + BATCH]][:, -1]
    shared = corpus.publish("fresh", name, {"fresh": fresh, "last": lasts})
    block = np.load(built / "block.npy")
    bounds = [(int(a), int(b)) for a, b in pairwise(np.flatnonzero(np.diff(block, prepend=-1, append=-1)).tolist())]
    arguments = {**source, "assigned": assigned, "shared": shared, "width": corpus.settings.neighbors_k}
    calls = [({**arguments, "begin": a, "end": b}, len(fresh) // len(bounds)) for a, b in bounds]
    found = [each.folder for each in corpus.over(compare_fresh, "new documents", name, calls)]
    calls = [
        ({"blocks": found, "begin": begin, "end": end, "width": corpus.settings.neighbors_k}, end - begin)
        for begin, end in members.ranges(corpus.begins)
    ]
    merged = [each.folder for each in corpus.over(search.merge_blocks, "merge", name, calls)]
    statistics = {
        "cells": len(block),
        "overlap": overlap,
        "blocks": len(bounds),
        "copies": len(rows) - len(members.kept),
        "updated": int(fresh.sum()),
    }
    searched = Searched(name, members, built, assigned, merged, overlap, len(bounds), statistics, shared)
    return searched, Sample.draw(corpus, name, members, RECALL_SAMPLE)


def keep_cells(
    out: Path,
    embeddings: list[Path],
    rows: Path,
    tree: Path,
    begin: int,
    end: int,
    overlap: int,
    cells_then: list[Path],
    to_old: Path,
) -> dict[str, Any]:
    """As `assign_cells`, but documents that were there keep their cells."""
    set_one_thread()
    vectors, cells_of, then = Vectors(embeddings, rows), Tree.load(tree), PartMatrix(cells_then)
    old = mapped(to_old)
    cells = np.full((end - begin, overlap), -1, np.int32)
    for first in range(begin, end, BATCH):
        part = np.arange(first, min(first + BATCH, end))
        before = old[vectors.rows[part]]
        there = before >= 0
        cells[part[there] - begin] = then[before[there]][:, :overlap]
        new = part[cells[part - begin, 0] < 0]
        if len(new):
            cells[new - begin] = cells_of.nearest(vectors(new), overlap)
    np.save(out / "cells.npy", cells)
    write_by_cell(out, cells, np.arange(begin, end))
    return {}


def compare_fresh(
    out: Path, embeddings: list[Path], rows: Path, assigned: list[Path], shared: Path, begin: int, end: int, width: int
) -> dict[str, Any]:
    """Writes document.npy, near.npy and cosine.npy as `search_block`: of fresh documents their lists, of the others
    those fresh ones that are as near as the last of their list. Only documents that have any."""
    set_one_thread()
    cell, document, place = search.entries(assigned, begin, end)
    fresh, last = mapped(shared / "fresh.npy"), mapped(shared / "last.npy")
    used = np.isin(cell, np.unique(cell[fresh[document]]))
    cell, document, place = cell[used], document[used], place[used]
    documents, position = np.unique(document, return_inverse=True)
    vectors = Vectors(embeddings, rows)(documents)
    is_fresh, lasts = np.asarray(fresh[documents]), np.asarray(last[documents])
    near = np.full((len(documents), width), -1, np.int32)
    cosines = np.full((len(documents), width), -np.inf, np.float32)
    for members in search.cells_of(cell, position, place):
        queries = members[is_fresh[members]]
        if len(queries):
            products = vectors[queries] @ vectors[members].T
            search.insert_fresh(near, cosines, members, queries, products, is_fresh, lasts)
    found = np.flatnonzero(near[:, 0] >= 0)
    near = near[found]
    np.save(out / "document.npy", documents[found].astype(np.int32))
    np.save(out / "near.npy", np.where(near < 0, -1, documents[np.maximum(near, 0)]).astype(np.int32))
    np.save(out / "cosine.npy", cosines[found])
    return {}
