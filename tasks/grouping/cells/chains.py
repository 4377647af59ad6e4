"""Similarity chains of a partition that was searched by cells: block by block, the blocks joined where their ends fit.

    a block     the documents of consecutive cells, chained along the edges between them
                (`eclectus.tasks.grouping.chain`)
    the join    from the first block on, always the block one of whose ends is most similar to the last document so far;
                it is turned round if that is its last one

A document most of whose neighbours were dropped gets the nearest of those left in its cell. The price is linear;
nothing of the size of all lists is held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from eclectus.tasks.compiled import compiled
from eclectus.tasks.disk_matrix import PartMatrix, mapped
from eclectus.tasks.grouping.chain import chain_with_restarts
from eclectus.tasks.grouping.nearest import Matrix, similarities_of, unit
from eclectus.tasks.over_parts import Done, Part, forget, key_of, over_parts

SECONDS = 2e-5
CHAINED = ("rows", "restarts", "best", "before")


@dataclass
class Chained:
    """Documents in the order of their chains: rows, where chains begin, each one's best similarity, and its similarity
    to the one before it, NaN where that is not known; [n] each."""

    rows: np.ndarray
    restarts: np.ndarray
    best: np.ndarray
    before: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))

    def __post_init__(self) -> None:
        if len(self.before) != len(self.rows):
            self.before = np.full(len(self.rows), np.nan, np.float32)

    def turned(self) -> Chained:
        """The other way round."""
        before = np.append(np.float32(np.nan), self.before[:0:-1])
        return Chained(self.rows[::-1], np.append(True, self.restarts[:0:-1]), self.best[::-1], before)


def chain_block(
    out: Path, files: dict[str, list[Path]], rows: Path, kept: Path, begin: int, end: int
) -> dict[str, Any]:
    """Chains rows begin to end - 1 of `rows`, ascending. files: of embeddings, neighbors, similarities and cells.

    Writes rows.npy int64, restarts.npy bool, best.npy and before.npy float32, in the order of the chains. kept: bool
    [N], the documents that are grouped.
    """
    here, left = np.asarray(mapped(rows)[begin:end]), np.load(kept)
    lists, similarities = PartMatrix(files["neighbors"])[here], PartMatrix(files["similarities"])[here]
    alive = (lists >= 0) & left[np.maximum(lists, 0)]
    near = np.where(alive, positions_in(here, lists, len(left)), -1)
    best = np.where(alive, similarities, -np.inf).max(axis=1, initial=-np.inf)
    had, left_over = (lists >= 0).sum(axis=1), alive.sum(axis=1)
    poor = np.flatnonzero((left_over < had / 4) & ((near >= 0).sum(axis=1) < len(here) - 1))
    if len(poor):
        cells, vectors = PartMatrix(files["cells"])[here], PartMatrix(files["embeddings"])
        near[poor], similarities[poor] = nearest_in_cells(vectors, here, cells, poor, near.shape[1])
        best[poor] = np.fmax(best[poor], np.nan_to_num(similarities[poor], nan=-np.inf).max(axis=1, initial=-np.inf))
    similarities = np.where(near < 0, np.nan, similarities).astype(np.float32)
    order, restarts = chain_with_restarts(near, similarities)
    np.save(out / "rows.npy", here[order].astype(np.int64))
    np.save(out / "before.npy", _before(near, similarities, order))
    np.save(out / "restarts.npy", restarts)
    np.save(out / "best.npy", np.where(np.isfinite(best), best, np.nan)[order].astype(np.float32))
    return {}


def _before(near: np.ndarray, similarities: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Of each document in this order the similarity to the one before it, float32 [n]; NaN if neither lists the other.

    near: int [n, k], positions, -1 is padding. similarities: float32 [n, k], NaN there.
    """
    before = np.full(len(order), np.nan, np.float32)
    for one, other in ((order[:-1], order[1:]), (order[1:], order[:-1])):
        line, column = np.nonzero(near[one] == other[:, None])
        before[1 + line] = np.fmax(before[1 + line], similarities[one[line], column])
    return before


@compiled
def positions_in(here: np.ndarray, lists: np.ndarray, count: int) -> np.ndarray:
    """The position in `here` [n], ascending, of each of `lists` [m, k], int32; -1 if it is not there, or below 0.

    count: all rows are below it. A table of a byte per row, and the number of those before each 64.
    """
    there, before = np.zeros(count, np.uint8), np.zeros(count // 64 + 1, np.int32)
    for row in here:
        there[row] = 1
        before[row // 64] += 1
    total = 0
    for group in range(len(before)):
        number = before[group]
        before[group] = total
        total += number
    found = np.full(lists.shape, -1, np.int32)
    for i in range(lists.shape[0]):
        for c in range(lists.shape[1]):
            row = lists[i, c]
            if row >= 0 and there[row]:
                position = before[row // 64]
                for other in range(row // 64 * 64, row):
                    position += there[other]
                found[i, c] = position
    return found


def nearest_in_cells(
    vectors: Matrix, rows: np.ndarray, cells: np.ndarray, poor: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """For these documents (positions in `rows`) the nearest that are in their own cell: positions int64 [n, k], -1 is
    padding; cosines, NaN there. cells: int32 [rows, overlap], nearest first."""
    near = np.full((len(poor), k), -1, np.int64)
    cosines = np.full((len(poor), k), np.nan, np.float32)
    member, place = np.nonzero(cells >= 0)
    order = np.argsort(cells[member, place], kind="stable")
    member, cell = member[order], cells[member, place][order]
    own = cells[poor, 0]
    for number in np.unique(own).tolist():
        begin, end = np.searchsorted(cell, (number, number + 1))
        others, lines = member[begin:end], np.flatnonzero(own == number)
        queries = unit(vectors, rows[poor[lines]])
        products = queries @ unit(vectors, rows[others]).T
        products[others == poor[lines][:, None]] = -np.inf
        best = np.argsort(-products, axis=1, kind="stable")[:, :k]
        found = np.where(np.isfinite(np.take_along_axis(products, best, axis=1)), others[best], -1)
        near[lines, : found.shape[1]] = found
        wanted = np.where(found < 0, -1, rows[np.maximum(found, 0)])
        cosines[lines, : found.shape[1]] = similarities_of(vectors, queries, wanted)
    return near, cosines


def chain_by_blocks(
    vectors: Matrix,
    files: dict[str, list[Path]],
    rows: np.ndarray,
    block: np.ndarray,
    kept: np.ndarray,
    key: str,
    workers: int,
) -> Chained:
    """The chains of one partition. rows: int64 [n], ascending, all kept; block: int32 [n]. kept: bool [N].

    key: of what decides the lists and `kept`. workers: as of `over_parts`.
    """
    order = np.argsort(block, kind="stable")
    bounds = np.flatnonzero(np.diff(block[order], prepend=-2, append=-2)).tolist()
    arrays = {"rows": rows[order], "kept": kept}
    (shared,) = over_parts(_publish, [Part(key_of("chains 1", key), arrays, 0)], "chaining", workers=1)
    arguments = {"files": files, "rows": shared.file("rows.npy"), "kept": shared.file("kept.npy")}
    parts = [
        Part(key_of("chain 2", key, begin, end), {**arguments, "begin": begin, "end": end}, end - begin, "a block")
        for begin, end in pairwise(bounds)
    ]
    done = over_parts(chain_block, parts, "chaining", seconds=SECONDS, workers=workers)
    joined = join_blocks(vectors, [_read(each) for each in done])
    forget([shared, *done])
    return joined


def _publish(out: Path, rows: np.ndarray, kept: np.ndarray) -> dict[str, Any]:
    np.save(out / "rows.npy", rows)
    np.save(out / "kept.npy", kept)
    return {}


def _read(done: Done) -> Chained:
    return Chained(*(np.load(done.file(f"{name}.npy")) for name in CHAINED))


def join_blocks(vectors: Matrix, blocks: Sequence[Chained]) -> Chained:
    """The blocks, each begun at the end that is most similar to the last document of those before."""
    left, joined = list(blocks), []
    ends = np.stack([unit(vectors, each.rows[[0, -1]]) for each in left])
    numbers = np.arange(len(left))
    at, turn = 0, False
    while len(numbers):
        each = left[numbers[at]]
        joined.append(each.turned() if turn else each)
        last = ends[numbers[at], 0 if turn else 1]
        numbers = np.delete(numbers, at)
        if len(numbers):
            near = np.nan_to_num(ends[numbers] @ last, nan=-2.0)
            at, turn = int(np.argmax(near) // 2), bool(np.argmax(near) % 2)
    return Chained(*(np.concatenate([getattr(each, name) for each in joined]) for name in CHAINED))
