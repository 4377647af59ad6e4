"""Lists of a grown corpus in parts: earlier ones are carried over, and only what is new is compared.

    carried      lists of documents that were there, renumbered; one that names a removed document is searched again
    tree         of the earlier lists; documents that were there keep their cells, the others are assigned
    fresh        documents that are new or whose list is searched again (with all their copies): each is compared with
                 the documents whose nearest cell is one of its `probes` nearest cells, which gives it a list, and the
                 others candidates for theirs. How many probes it takes is known from the sample
    blocks       of cells, each with its documents and the fresh ones that probe them: a document is read once

Price for n documents of which m are fresh: reading n lists and vectors, and m x probes x OWN products. In a search of
all documents every one stands in `overlap` cells, of which most pairs share several; for a few it is cheaper to compare
them with many cells, in which every other document stands once.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from eclectus.storage.artifact import Artifact
from eclectus.tasks.disk_matrix import PartMatrix, mapped, matrix_files
from eclectus.tasks.documents.digest_set import distinct
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
    set_one_thread,
    write_by_cell,
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
    if name in carried.samples:
        new = rows[mapped(carried.files["rows"] / "to_old.npy")[rows] < 0]
        sample = Sample.grown(corpus, name, members, carried.samples[name], carried.to_new, new)
    else:
        sample = Sample.draw(corpus, name, members, RECALL_SAMPLE)
    probes = sample.probes(corpus, built, members, PartMatrix([folder / "cells.npy" for folder in assigned]))
    block = np.load(built / "block.npy")
    merged, shared = _compare(corpus, name, members, built, assigned, fresh, carried, probes)
    blocks = len(np.unique(block))
    statistics = {
        "cells": len(block),
        "overlap": overlap,
        "probes": probes,
        "blocks": blocks,
        "copies": len(rows) - len(members.kept),
        "updated": int(fresh.sum()),
    }
    return Searched(name, members, built, assigned, merged, overlap, blocks, sample, statistics, shared)


def _compare(
    corpus: Corpus,
    name: str,
    members: Members,
    built: Path,
    assigned: list[Path],
    fresh: np.ndarray,
    carried: Carried,
    probes: int,
) -> tuple[list[Path], Path]:
    """Folders of `merge_fresh` by part, and one that says who is fresh."""
    numbers, width = np.flatnonzero(fresh), corpus.settings.neighbors_k
    arrays = {"fresh": fresh, "last": carried.lasts[members.kept], "numbers": numbers}
    shared, ranges = corpus.publish("fresh", name, arrays), members.ranges(corpus.begins)
    source = {"embeddings": corpus.embeddings, "rows": members.folder / "kept.npy", "shared": shared}
    most = block_documents(corpus.dimension)
    calls = [
        ({**source, "tree": built, "begin": begin, "end": min(begin + most, len(numbers)), "probes": probes}, most)
        for begin in range(0, len(numbers), most)
    ]
    probed = [each.folder for each in corpus.over(probe_cells, "cells of new documents", name, calls)]
    sizes = np.zeros(len(mapped(built / "block.npy")), np.int64)
    for folder in (*assigned, *probed):
        sizes += np.bincount(mapped(folder / "cell.npy"), minlength=len(sizes))
    calls = [
        (
            {**source, "assigned": assigned, "probed": probed, "begin": begin, "end": end, "width": width},
            int(sizes[begin:end].sum()),
        )
        for begin, end in consecutive(sizes, 2 * most)
    ]
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
    """Writes cells.npy as `assign_cells`, but documents that were there keep their cells; and by cell, as there, the
    documents whose nearest one it is."""
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
    write_by_cell(out, cells[:, :1], np.arange(begin, end))
    return {}


def probe_cells(
    out: Path, embeddings: list[Path], rows: Path, shared: Path, tree: Path, begin: int, end: int, probes: int
) -> dict[str, Any]:
    """Writes by cell, as `assign_cells`, those of fresh documents begin to end - 1 of which it is one of the `probes`
    nearest."""
    set_one_thread()
    vectors, cells_of = Vectors(embeddings, rows), Tree.load(tree)
    numbers = mapped(shared / "numbers.npy")
    cells = [
        cells_of.nearest(vectors(numbers[first : min(first + BATCH, end)]), probes)
        for first in range(begin, end, BATCH)
    ]
    write_by_cell(out, np.concatenate(cells), np.arange(begin, end))
    return {}


def compare_fresh(
    out: Path,
    embeddings: list[Path],
    rows: Path,
    shared: Path,
    assigned: list[Path],
    probed: list[Path],
    begin: int,
    end: int,
    width: int,
) -> dict[str, Any]:
    """Compares the documents whose nearest cell is one of begin to end - 1 with the fresh documents that probe it.
    assigned: folders of `keep_cells`; probed: of `probe_cells`.

    Writes document.npy, near.npy and cosine.npy as `search_block`, but a document may have two lines: of the fresh
    documents their lists, of the others those fresh ones that are as near as the last of their list. Only documents
    that have any.
    """
    set_one_thread()
    vectors, is_fresh = Vectors(embeddings, rows), mapped(shared / "fresh.npy")
    cell, documents, position, _ = search.entries(assigned, begin, end)
    asked, queries, asking, _ = search.entries(probed, begin, end)
    own, numbers = documents[position], np.asarray(mapped(shared / "numbers.npy")[queries])
    lasts = np.where(is_fresh[own], -np.inf, mapped(shared / "last.npy")[own]).astype(np.float32)
    near, near_cosines = _empty(len(own), width)
    lists, cosines = _empty(len(numbers), width)
    block, probing = vectors(own), vectors(numbers)
    every = np.arange(begin, end + 1)
    theirs, bounds = np.searchsorted(cell, every).tolist(), np.searchsorted(asked, every).tolist()
    for number in range(end - begin):
        others = asking[bounds[number] : bounds[number + 1]]
        for first in range(theirs[number], theirs[number + 1] if len(others) else 0, search.MOST_MEMBERS):
            some = np.arange(first, min(first + search.MOST_MEMBERS, theirs[number + 1]))
            for queried in np.array_split(others, -(-len(others) // search.MOST_MEMBERS)):
                products = block[some[0] : some[-1] + 1] @ probing[queried].T
                search.insert_fresh(near, near_cosines, lists, cosines, some, queried, products, lasts, numbers, own)
    lines, found = np.flatnonzero(near[:, 0] >= 0), np.flatnonzero(lists[:, 0] >= 0)
    document = np.concatenate([own[lines], numbers[found]])
    order = np.argsort(document, kind="stable")
    np.save(out / "document.npy", document[order].astype(np.int32))
    np.save(out / "near.npy", np.concatenate([near[lines], lists[found]])[order])
    np.save(out / "cosine.npy", np.concatenate([near_cosines[lines], cosines[found]])[order])
    return {}


def _empty(count: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full((count, width), -1, np.int32), np.full((count, width), -np.inf, np.float32)


def merge_fresh(out: Path, found: list[Path], begin: int, end: int, width: int) -> dict[str, Any]:
    """Writes document.npy, near.npy and cosine.npy as `compare_fresh`, of documents begin to end - 1, from all of its
    folders."""
    every = [mapped(folder / "document.npy") for folder in found]
    ranges = [slice(*np.searchsorted(each, (begin, end))) for each in every]
    here = [each[part] for each, part in zip(every, ranges, strict=True)]
    documents = distinct(np.concatenate([np.empty(0, np.int32), *here]))
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
