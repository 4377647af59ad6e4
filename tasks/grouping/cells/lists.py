"""The lists of all partitions, written part by part as the documents are."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from eclectus.tasks.disk_matrix import PartMatrix, mapped
from eclectus.tasks.grouping.cells import tree
from eclectus.tasks.grouping.cells.partition import Corpus, Members, Searched, consecutive, lists_of
from eclectus.tasks.grouping.cells.search import merge_lines
from eclectus.tasks.grouping.nearest import Lists, NeighborSettings, Partition, search
from eclectus.tasks.over_parts import Done

EXACT_DOCUMENTS = 50_000


def search_exactly(
    out: Path, embeddings: list[Path], rows: Path, bounds: list[tuple[int, int]], settings: NeighborSettings
) -> dict[str, Any]:
    """Searches partitions exactly, one after the other. bounds: where each begins and ends in `rows`.

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
        search(vectors, Partition("", row[lines]), lists, settings, lines)
    order = np.argsort(row)
    np.save(out / "row.npy", row[order])
    np.save(out / "rows.npy", lists.rows[order])
    np.save(out / "similarities.npy", lists.similarities[order])
    return {}


def write_part(
    out: Path,
    begin: int,
    end: int,
    settings: NeighborSettings,
    wide: bool,
    exact: list[Path],
    by_cells: list[dict[str, Any]],
    carried: Path | None,
    as_before: Path | None,
) -> dict[str, Any]:
    """Writes neighbors.npy, similarities.npy, block.npy int32 and cells.npy int32 of rows begin to end - 1.

    wide: whether rows need 8 bytes. exact: folders of `search_exactly`. by_cells: of each partition that was searched
    by cells its folders `members`, `merged`, `assigned`, `tree` and `fresh`, and `first_block`, what its blocks are
    counted from. carried: folder of these rows' earlier lists; as_before: bool [N] in a file, whose are valid.
    """
    k, overlap = settings.neighbors_k, max([1, *(each["overlap"] for each in by_cells)])
    rows = np.full((end - begin, k), -1, np.int64 if wide else np.int32)
    similarities = np.full((end - begin, k), np.nan, np.float32)
    block, cells = np.full(end - begin, -1, np.int32), np.full((end - begin, overlap), -1, np.int32)
    if carried and as_before:
        lines = np.flatnonzero(mapped(as_before)[begin:end])
        rows[lines], cosines = mapped(carried / "near.npy")[lines], mapped(carried / "cosine.npy")[lines]
        similarities[lines] = np.where(rows[lines] < 0, np.nan, cosines)
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
            found, cosines = lists_of(members, each["merged"], positions, k)
            lines = members.rows[positions] - begin
            found = np.where(found < 0, -1, members.rows[np.maximum(found, 0)]).astype(rows.dtype)
            if each["fresh"]:
                # The others keep their lists, into which these are merged.
                old = ~np.load(each["fresh"] / "fresh.npy", mmap_mode="r")[members.own[positions]]
                near, before = rows[lines[old]], np.nan_to_num(similarities[lines[old]], nan=-np.inf)
                merge_lines(near, before, np.arange(len(near)), found[old], np.nan_to_num(cosines[old], nan=-np.inf))
                found[old], cosines[old] = near, np.where(near < 0, np.nan, before)
            rows[lines], similarities[lines] = found, cosines
            own = assigned[members.own[positions]]
            cells[lines, : own.shape[1]] = own
            block[lines] = block_of[own[:, 0]] + each["first_block"]
    for name, array in (("neighbors", rows), ("similarities", similarities), ("block", block), ("cells", cells)):
        np.save(out / f"{name}.npy", array)
    return {}


def write_lists(
    corpus: Corpus,
    exact: list[Done],
    by_cells: list[Searched],
    rows: int,
    carried: list[Path] | None = None,
    as_before: Path | None = None,
) -> list[Done]:
    """The lists of every part of the documents. carried, as_before: as of `write_part`, of each part."""
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
                "carried": carried[number] if carried else None,
                "as_before": as_before,
            },
            end - begin,
        )
        for number, (begin, end) in enumerate(pairwise(corpus.begins.tolist()))
    ]
    return corpus.over(write_part, "lists", "", calls)


def search_small(corpus: Corpus, partitions: list[Partition]) -> list[Done]:
    """Searches partitions exactly, many small ones in a call."""
    if not partitions:
        return []
    rows = np.concatenate([each.rows for each in partitions])
    folder = corpus.publish("small partitions", "", {"rows": rows})
    sizes = np.array([len(each.rows) for each in partitions])
    ends = np.cumsum(sizes).tolist()
    bounds = list(zip([0, *ends[:-1]], ends, strict=True))
    calls = [
        (
            {
                "embeddings": corpus.embeddings,
                "rows": folder / "rows.npy",
                "bounds": bounds[begin:end],
                "settings": corpus.settings,
            },
            int(sizes[begin:end].sum()),
        )
        for begin, end in consecutive(sizes, EXACT_DOCUMENTS)
    ]
    return corpus.over(search_exactly, "exact search", "", calls)
