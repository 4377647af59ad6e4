"""Lists of a grown corpus in parts: earlier ones are carried over, and only what is new is compared.

    carried      lists of documents that were there, renumbered; one that names a removed document is searched again
    tree         of the earlier lists; documents that were there keep their cells, the others are assigned
    fresh        documents that are new or whose list is searched again (with all their copies): compared with all
                 members of their cells, which gives them lists, and the others candidates for theirs; part by part, so
                 that vectors are read in the order of the file

Price for n documents of which m are fresh: reading n lists and vectors, and m x (members of their cells) products.
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
from eclectus.tasks.grouping.cells.corpus import Corpus, Members
from eclectus.tasks.grouping.cells.partition import Searched, consecutive
from eclectus.tasks.grouping.cells.sample import Sample
from eclectus.tasks.grouping.cells.tree import (
    BATCH,
    MOST_OVERLAP,
    Tree,
    Vectors,
    block_documents,
    order_of,
    set_one_thread,
)

RECALL_SAMPLE = 128


@dataclass(frozen=True)
class Carried:
    """Earlier lists for the present documents.

    files: of the earlier `neighbors` and `similarities`, and `rows`, with to_old.npy (the rows then, -1 for new
    documents) and to_new.npy. cells: of the earlier cells. lasts: similarity at the end of each present document's
    list. kept: bool [N], which have one. growth: of the settings. exact: partitions that were searched exactly.
    overlaps: of those searched by cells whose lists are worth an update; trees, samples: folders of their trees, and of
    their samples (which earlier versions lack).
    """

    files: dict[str, Any]
    cells: list[Path]
    lasts: PartMatrix
    kept: np.ndarray
    growth: float
    exact: set[str]
    overlaps: dict[str, int]
    trees: dict[str, Path]
    samples: dict[str, Path]
    to_new: np.ndarray

    @classmethod
    def of(cls, corpus: Corpus, artifact: Artifact, names: list[str], to_new: np.ndarray) -> Carried:
        """names: of the partitions of the earlier artifact. to_new: int64 [documents then], rows now, -1 if gone."""
        to_old = np.full(int(corpus.begins[-1]), -1, np.int64)
        to_old[to_new[to_new >= 0]] = np.flatnonzero(to_new >= 0)
        shared = corpus.publish("rows then and now", "", {"to_old": to_old, "to_new": to_new})
        files: dict[str, Any] = {name: matrix_files(artifact, name) for name in ("neighbors", "similarities")}
        files["rows"] = shared
        calls = [
            ({"files": files, "begin": begin, "end": end}, end - begin)
            for begin, end in pairwise(corpus.begins.tolist())
        ]
        done = corpus.over(carry_part, "earlier lists", "", calls)
        kept = np.concatenate([np.load(each.file("kept.npy")) for each in done])
        lasts = PartMatrix([each.file("last.npy") for each in done])
        partitions = artifact.statistics["partitions"]
        exact = {each["partition"] for each in partitions if each["method"] == "exact"}
        trees, samples = (_folders(artifact, kind, names) for kind in ("tree", "sample"))
        target = corpus.settings.neighbors_recall_target
        good = [each for each in partitions if each["partition"] in trees and not _searched_better_again(each, target)]
        overlaps = {each["partition"]: each["overlap"] for each in good}
        growth, cells = corpus.settings.neighbors_growth, matrix_files(artifact, "cells")
        return cls(files, cells, lasts, kept, growth, exact, overlaps, trees, samples, to_new)

    def news(self, name: str, rows: np.ndarray) -> int | None:
        """How many documents of a partition (rows) that is searched exactly need a search; None if all do."""
        new = int((~self.kept[rows]).sum())
        updated = name in self.exact and new <= self.growth * len(rows)
        return new if len(rows) and (updated or not new) else None


def _searched_better_again(described: dict[str, Any], target: float) -> bool:
    """Whether the lists of a partition clearly miss the target, and more cells of each document would help."""
    return bool(
        described["overlap"] < MOST_OVERLAP and described["recall"] + 2 * described.get("recall_error", 0.0) < target
    )


def _folders(artifact: Artifact, kind: str, names: list[str]) -> dict[str, Path]:
    """The folders of this kind that an artifact has, by partition."""
    folders = {name: Path(artifact.path) / kind / str(number) for number, name in enumerate(names)}
    return {name: folder for name, folder in folders.items() if folder.is_dir()}


def carry_part(out: Path, files: dict[str, Any], begin: int, end: int) -> dict[str, Any]:
    """Writes kept.npy bool [n], and last.npy float32 [n], the similarity at the end of each list (-inf where it is
    shorter), of rows begin to end - 1; a document without an earlier list, or one that names a removed document, has
    none."""
    kept, last = np.zeros(end - begin, bool), np.full(end - begin, -np.inf, np.float32)
    for first in range(begin, end, BATCH):
        lines, near, cosines = earlier_lists(files, np.arange(first, min(first + BATCH, end)))
        kept[first - begin + lines], last[first - begin + lines] = True, np.where(near < 0, -np.inf, cosines)[:, -1]
    np.save(out / "kept.npy", kept)
    np.save(out / "last.npy", last)
    return {}


def earlier_lists(files: dict[str, Any], rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of these rows the positions of those that keep their lists; the lists as rows of now, -1 is padding; cosines, NaN
    there. files: of `Carried`."""
    old, to_new = mapped(files["rows"] / "to_old.npy")[rows], mapped(files["rows"] / "to_new.npy")
    lines = np.flatnonzero(old >= 0)
    then = PartMatrix(files["neighbors"])[old[lines]]
    now = np.where(then < 0, -1, to_new[np.maximum(then, 0)]).astype(then.dtype)
    whole = ((then < 0) == (now < 0)).all(axis=1) & (then >= 0).any(axis=1)
    return lines[whole], now[whole], PartMatrix(files["similarities"])[old[lines[whole]]]


def update_partition(
    corpus: Corpus, name: str, rows: np.ndarray, hashes: np.ndarray, carried: Carried
) -> Searched | None:
    """As `search_partition`, from earlier lists; None if too much is new."""
    overlap = carried.overlaps.get(name, 0)
    if not overlap or (~carried.kept[rows]).sum() > carried.growth * len(rows):
        return None
    members, built = Members.find(corpus, name, rows, hashes), carried.trees[name]
    fresh = np.bincount(members.own, ~carried.kept[rows], len(members.kept)) > 0
    source = {"embeddings": corpus.embeddings, "rows": members.folder / "kept.npy"}
    then = {"cells_then": carried.cells, "to_old": carried.files["rows"] / "to_old.npy"}
    calls = [
        ({**source, **then, "tree": built, "begin": begin, "end": end, "overlap": overlap}, end - begin)
        for begin, end in members.ranges(corpus.begins)
    ]
    assigned = [each.folder for each in corpus.over(keep_cells, "cells kept", name, calls)]
    merged, shared = _compare(corpus, name, members, assigned, fresh, carried)
    block = np.load(built / "block.npy")
    blocks = len(np.unique(block))
    statistics = {
        "cells": len(block),
        "overlap": overlap,
        "blocks": blocks,
        "copies": len(rows) - len(members.kept),
        "updated": int(fresh.sum()),
    }
    if name in carried.samples:
        new = rows[mapped(carried.files["rows"] / "to_old.npy")[rows] < 0]
        sample = Sample.grown(corpus, name, members, carried.samples[name], carried.to_new, new)
    else:
        sample = Sample.draw(corpus, name, members, RECALL_SAMPLE)
    return Searched(name, members, built, assigned, merged, overlap, blocks, sample, statistics, shared)


def _compare(
    corpus: Corpus, name: str, members: Members, assigned: list[Path], fresh: np.ndarray, carried: Carried
) -> tuple[list[Path], Path]:
    """Folders of `merge_fresh` by part, and one that says who is fresh."""
    numbers, width = np.flatnonzero(fresh), corpus.settings.neighbors_k
    arrays = {
        "fresh": fresh,
        "last": carried.lasts[members.kept],
        "numbers": numbers,
        "cells": PartMatrix([folder / "cells.npy" for folder in assigned])[numbers],
    }
    shared, ranges = corpus.publish("fresh", name, arrays), members.ranges(corpus.begins)
    source = {"embeddings": corpus.embeddings, "rows": members.folder / "kept.npy", "shared": shared}
    most = block_documents(corpus.dimension)
    groups = [(begin, min(begin + most, len(numbers))) for begin in range(0, len(numbers), most)]
    calls = [({**source, "begin": begin, "end": end}, end - begin) for begin, end in groups]
    vectors = [each.folder for each in corpus.over(fresh_vectors, "vectors of new documents", name, calls)]
    sizes = np.array([end - begin for begin, end in ranges])
    together = [(ranges[a][0], ranges[b - 1][1], assigned[a:b]) for a, b in consecutive(sizes, 2 * most)]
    calls = []
    for folder, group in zip(vectors, groups, strict=True):
        arguments = {**source, "fresh": folder, "group": group, "width": width}
        calls += [({**arguments, "assigned": cells, "begin": a, "end": b}, b - a) for a, b, cells in together]
    found = [each.folder for each in corpus.over(compare_fresh, "new documents", name, calls)]
    calls = [({"found": found, "begin": begin, "end": end, "width": width}, end - begin) for begin, end in ranges]
    return [each.folder for each in corpus.over(merge_fresh, "merge", name, calls)], shared


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
    """Writes cells.npy as `assign_cells`, but documents that were there keep their cells."""
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
    return {}


def fresh_vectors(out: Path, embeddings: list[Path], rows: Path, shared: Path, begin: int, end: int) -> dict[str, Any]:
    """Writes vectors.npy float32 [end - begin, D], of these of the fresh documents."""
    np.save(out / "vectors.npy", Vectors(embeddings, rows)(mapped(shared / "numbers.npy")[begin:end]))
    return {}


def compare_fresh(
    out: Path,
    embeddings: list[Path],
    rows: Path,
    shared: Path,
    fresh: Path,
    group: tuple[int, int],
    assigned: list[Path],
    begin: int,
    end: int,
    width: int,
) -> dict[str, Any]:
    """Compares documents begin to end - 1 with a group of the fresh documents in the same cells. assigned: folders of
    the cells of these documents. fresh: folder of `fresh_vectors`.

    Writes document.npy, near.npy and cosine.npy as `search_block`: of the fresh documents their lists, of the others
    those fresh ones that are as near as the last of their list. Only documents that have any.
    """
    first, last = group
    numbers, queries = np.asarray(mapped(shared / "numbers.npy")[first:last]), np.load(fresh / "vectors.npy")
    cells, asked = PartMatrix([folder / "cells.npy" for folder in assigned]), mapped(shared / "cells.npy")[first:last]
    vectors, is_fresh = Vectors(embeddings, rows), np.asarray(mapped(shared / "fresh.npy")[begin:end])
    lasts = np.where(is_fresh, np.inf, mapped(shared / "last.npy")[begin:end]).astype(np.float32)
    used = np.unique(asked[asked >= 0])
    theirs, bounds = _by_cell(asked, used)
    lists, cosines = _empty(len(numbers), width)
    found, step = [], 2 * block_documents(vectors.dimension)
    for start in range(0, end - begin, step):
        here = np.arange(start, min(start + step, end - begin))
        # Documents of a cell beside each other, in the processor's cache.
        here = here[np.argsort(cells[here][:, 0], kind="stable")]
        block, least, (mine, starts) = vectors(begin + here), lasts[here], _by_cell(cells[here], used)
        near, near_cosines = _empty(len(here), width)
        for number in range(len(used)):
            some = mine[starts[number] : starts[number + 1]][: search.MOST_MEMBERS]
            if len(some):
                others = theirs[bounds[number] : bounds[number + 1]][: search.MOST_MEMBERS]
                products = block[some] @ queries[others].T
                search.insert_fresh(
                    near, near_cosines, lists, cosines, some, others, products, least, numbers, begin + here
                )
        lines = np.flatnonzero(near[:, 0] >= 0)
        found.append((begin + here[lines], near[lines], near_cosines[lines]))
    lines = np.flatnonzero(lists[:, 0] >= 0)
    found.append((numbers[lines], lists[lines], cosines[lines]))
    document, near, cosine = (np.concatenate(each) for each in zip(*found, strict=True))
    order = np.argsort(document, kind="stable")
    np.save(out / "document.npy", document[order].astype(np.int32))
    np.save(out / "near.npy", near[order])
    np.save(out / "cosine.npy", cosine[order])
    return {}


def _empty(count: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full((count, width), -1, np.int32), np.full((count, width), -np.inf, np.float32)


def _by_cell(cells: np.ndarray, used: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The documents of each of the `used` cells, one cell after the other, and where each begins, int64 [used + 1];
    first those to which few other cells are nearer.

    cells: int32 [n, overlap], of each document, nearest first, -1 is none. used: ascending.
    """
    number = np.full(int(used.max(initial=-1)) + 2, -1)
    number[used] = np.arange(len(used))
    overlap, place = cells.shape[1], np.arange(cells.shape[1])
    # Of a cell that is not used the key is negative: -overlap + place.
    keys = (number[np.minimum(cells, len(number) - 1)] * overlap + place).ravel()
    order = order_of(keys, len(used) * overlap)
    return order // overlap, np.searchsorted(keys[order], np.arange(len(used) + 1) * overlap)


def merge_fresh(out: Path, found: list[Path], begin: int, end: int, width: int) -> dict[str, Any]:
    """Writes document.npy, near.npy and cosine.npy as `compare_fresh`, of documents begin to end - 1, from all of its
    folders."""
    every = [mapped(folder / "document.npy") for folder in found]
    ranges = [slice(*np.searchsorted(each, (begin, end))) for each in every]
    here = [each[part] for each, part in zip(every, ranges, strict=True)]
    documents = np.unique(np.concatenate([np.empty(0, np.int32), *here]))
    near, cosines = _empty(len(documents), width)
    for folder, some, part in zip(found, here, ranges, strict=True):
        theirs = [np.asarray(mapped(folder / name)[part]) for name in ("near.npy", "cosine.npy")]
        search.merge_lines(near, cosines, np.searchsorted(documents, some), *theirs)
    for name, array in (("document", documents), ("near", near), ("cosine", cosines)):
        np.save(out / f"{name}.npy", array)
    return {}


def fresh_lists(
    merged: list[Path], bounds: np.ndarray, own: np.ndarray, width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `merge_fresh` found for these representatives [n]: which have something, bool [n]; near int32 [n, width], -1
    is padding; cosines. bounds: int64 [parts + 1], the representatives of each folder."""
    there = np.zeros(len(own), bool)
    near, cosines = np.full((len(own), width), -1, np.int32), np.full((len(own), width), -np.inf, np.float32)
    part = np.searchsorted(bounds, own, side="right") - 1
    for number in np.unique(part).tolist():
        folder, here = merged[number], np.flatnonzero(part == number)
        documents = mapped(folder / "document.npy")
        place = np.searchsorted(documents, own[here])
        hit = np.flatnonzero(place < len(documents))
        hit = hit[documents[place[hit]] == own[here[hit]]]
        there[here[hit]] = True
        near[here[hit]], cosines[here[hit]] = (
            mapped(folder / "near.npy")[place[hit]],
            mapped(folder / "cosine.npy")[place[hit]],
        )
    return there, near, cosines
