"""The lists of all partitions, written part by part as the documents are."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from eclectus.tasks.disk_matrix import PartMatrix, mapped
from eclectus.tasks.grouping.cells import tree
from eclectus.tasks.grouping.cells.corpus import Corpus, Members
from eclectus.tasks.grouping.cells.partition import Searched, consecutive, lists_of
from eclectus.tasks.grouping.cells.search import merge_lines, with_copies
from eclectus.tasks.grouping.cells.update import Carried, earlier_lists, fresh_lists
from eclectus.tasks.grouping.nearest import Lists, NeighborSettings, Partition, Rows, search
from eclectus.tasks.grouping.neighbor_update import insert_new
from eclectus.tasks.over_parts import Done

EXACT_DOCUMENTS = 50_000


def search_exactly(
    out: Path,
    embeddings: list[Path],
    rows: Path,
    bounds: list[tuple[int, int]],
    settings: NeighborSettings,
    carried: dict[str, Any] | None,
) -> dict[str, Any]:
    """Searches partitions exactly, one after the other. bounds: where each begins and ends in `rows`. carried:
    `Carried.files`, of earlier lists that are updated.

    Writes row.npy int64 [m], rows.npy int [m, k] (rows, -1 is padding) and similarities.npy float32 (NaN there).
    """
    tree.set_one_thread()
    every, vectors = mapped(rows), PartMatrix(embeddings)
    row = np.asarray(every[bounds[0][0] : bounds[-1][1]])
    lists = Lists(
        np.full((len(row), settings.neighbors_k), -1), np.full((len(row), settings.neighbors_k), np.nan, "f4")
    )
    for begin, end in bounds:
        lines = np.arange(begin, end) - bounds[0][0]
        partition = Partition("", row[lines])
        if carried:
            _update_exactly(vectors, partition, lists, lines, carried)
        else:
            search(vectors, partition, lists, settings, lines)
    order = np.argsort(row)
    np.save(out / "row.npy", row[order])
    np.save(out / "rows.npy", lists.rows[order])
    np.save(out / "similarities.npy", lists.similarities[order])
    return {}


def _update_exactly(
    vectors: PartMatrix, partition: Partition, lists: Lists, lines: np.ndarray, carried: dict[str, Any]
) -> None:
    """Fills the lists of one partition (lines of `lists`) from its earlier ones: the same as of a search."""
    rows = partition.rows
    here, near, cosines = earlier_lists(carried, rows)
    own = Lists(np.full((len(rows), near.shape[1]), -1), np.full((len(rows), near.shape[1]), np.nan, np.float32))
    # Merged, so that documents of equal similarity are in order of row.
    own.merge(here, np.where(near < 0, -1, np.searchsorted(rows, near)), cosines)
    kept = np.zeros(len(rows), bool)
    kept[here] = True
    insert_new(Rows(vectors, rows), np.flatnonzero(~kept), np.arange(len(rows)), kept, own)
    lists.rows[lines], lists.similarities[lines] = (
        np.where(own.rows < 0, -1, rows[np.maximum(own.rows, 0)]),
        own.similarities,
    )


def write_part(
    out: Path,
    begin: int,
    end: int,
    settings: NeighborSettings,
    wide: bool,
    exact: list[Path],
    by_cells: list[dict[str, Any]],
    carried: dict[str, Any] | None,
    as_before: Path | None,
) -> dict[str, Any]:
    """Writes neighbors.npy, similarities.npy, block.npy int32 and cells.npy int32 of rows begin to end - 1.

    wide: whether rows need 8 bytes. exact: folders of `search_exactly`. by_cells: of each partition that was searched
    by cells its folders `members`, `merged`, `assigned`, `tree` and `fresh`, and `first_block`, what its blocks are
    counted from. carried: `Carried.files`; as_before: bool [N] in a file, the rows of whose partitions they are valid.
    """
    k, overlap = settings.neighbors_k, max([1, *(each["overlap"] for each in by_cells)])
    rows = np.full((end - begin, k), -1, np.int64 if wide else np.int32)
    similarities = np.full((end - begin, k), np.nan, np.float32)
    block, cells = np.full(end - begin, -1, np.int32), np.full((end - begin, overlap), -1, np.int32)
    if carried and as_before:
        there = np.flatnonzero(mapped(as_before)[begin:end])
        for first in range(0, len(there), tree.BATCH):
            part = there[first : first + tree.BATCH]
            lines, near, cosines = earlier_lists(carried, begin + part)
            rows[part[lines]], similarities[part[lines]] = near, cosines
    for folder in exact:
        row = mapped(folder / "row.npy")
        first, last = np.searchsorted(row, (begin, end))
        rows[row[first:last] - begin] = mapped(folder / "rows.npy")[first:last]
        similarities[row[first:last] - begin] = mapped(folder / "similarities.npy")[first:last]
    for each in by_cells:
        members = Members.load(each["members"])
        first, last = np.searchsorted(members.rows, (begin, end))
        assigned = PartMatrix([folder / "cells.npy" for folder in each["assigned"]])
        block_of = np.load(each["tree"] / "block.npy")
        for start in range(first, last, tree.BATCH):
            positions = np.arange(start, min(start + tree.BATCH, last))
            lines, own = members.rows[positions] - begin, members.own[positions]
            if each["fresh"]:
                _merge_fresh_lists(rows, similarities, members, each, assigned.begins, positions, lines)
            else:
                found, similarities[lines] = lists_of(members, each["merged"], positions, k)
                rows[lines] = np.where(found < 0, -1, members.rows[np.maximum(found, 0)])
            nearest = assigned[own]
            cells[lines, : nearest.shape[1]] = nearest
            block[lines] = block_of[nearest[:, 0]] + each["first_block"]
    for name, array in (("neighbors", rows), ("similarities", similarities), ("block", block), ("cells", cells)):
        np.save(out / f"{name}.npy", array)
    return {}


def _merge_fresh_lists(
    rows: np.ndarray,
    similarities: np.ndarray,
    members: Members,
    described: dict[str, Any],
    bounds: np.ndarray,
    positions: np.ndarray,
    lines: np.ndarray,
) -> None:
    """Gives fresh documents their lists, and merges what was found for the others into theirs. rows, similarities: of a
    part; positions, lines [n]: of documents in the partition and in the part. described, bounds: as of `write_part`,
    the representatives of each of its folders."""
    own, k = np.asarray(members.own[positions], np.int64), rows.shape[1]
    fresh = mapped(described["fresh"] / "fresh.npy")[own]
    there, near, cosines = fresh_lists(described["merged"], bounds, own, k)
    here = np.flatnonzero(there | fresh)
    found, cosines = with_copies(
        near[here], cosines[here], own[here], positions[here], members.starts, members.copies, k
    )
    found = np.where(found < 0, -1, members.rows[np.maximum(found, 0)]).astype(rows.dtype)
    old, lines = ~fresh[here], lines[here]
    near, before = rows[lines[old]], np.nan_to_num(similarities[lines[old]], nan=-np.inf)
    merge_lines(near, before, np.arange(len(near)), found[old], np.nan_to_num(cosines[old], nan=-np.inf))
    found[old], cosines[old] = near, np.where(near < 0, np.nan, before)
    rows[lines], similarities[lines] = found, cosines


def write_lists(
    corpus: Corpus,
    exact: list[Done],
    by_cells: list[Searched],
    rows: int,
    carried: dict[str, Any] | None = None,
    as_before: Path | None = None,
) -> list[Done]:
    """The lists of every part of the documents. carried, as_before: as of `write_part`."""
    described, blocks = [], 0
    for each in by_cells:
        folders = {"members": each.members.folder, "tree": each.tree, "merged": each.merged, "assigned": each.assigned}
        folders["fresh"] = each.fresh
        described.append({**folders, "overlap": each.overlap, "first_block": blocks})
        blocks += each.blocks
    calls = [
        (
            {
                "begin": begin,
                "end": end,
                "settings": corpus.settings,
                "wide": rows >= 2**31,
                "exact": [each.folder for each in exact],
                "by_cells": described,
                "carried": carried,
                "as_before": as_before,
            },
            end - begin,
        )
        for begin, end in pairwise(corpus.begins.tolist())
    ]
    return corpus.over(write_part, "lists", "", calls)


def search_small(corpus: Corpus, partitions: list[Partition], carried: Carried | None = None) -> list[Done]:
    """Searches partitions exactly, many small ones in a call, or updates what is carried of them."""
    if not partitions:
        return []
    stage = "exact update" if carried else "exact search"
    rows = np.concatenate([each.rows for each in partitions])
    folder = corpus.publish(f"partitions of the {stage}", "", {"rows": rows})
    sizes = np.array([len(each.rows) for each in partitions])
    ends = np.cumsum(sizes).tolist()
    bounds = list(zip([0, *ends[:-1]], ends, strict=True))
    arguments = {"embeddings": corpus.embeddings, "rows": folder / "rows.npy", "settings": corpus.settings}
    arguments["carried"] = carried.files if carried else None
    calls = [
        ({**arguments, "bounds": bounds[begin:end]}, int(sizes[begin:end].sum()))
        for begin, end in consecutive(sizes, EXACT_DOCUMENTS)
    ]
    return corpus.over(search_exactly, stage, "", calls)
