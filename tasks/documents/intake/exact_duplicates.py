"""Exact duplicates among the keys of all pieces, block by block of the key space: the first of equal texts stays.

A piece's keys are sorted, so that those of a block stand together. Equal keys of one piece are found first: of a text
that a corpus holds a million times, a block gets one key per piece. Memory: `KEYS_PER_BLOCK` keys of 24 bytes and their
order, and 16 bytes per duplicate. Price: 1 CPU second per 4 million documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eclectus.tasks.disk_matrix import mapped

KEYS_PER_BLOCK = 4_000_000


def exact_duplicates(keys: Sequence[Path], rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Documents whose text an earlier one has, ascending, and that earliest one: int64 [d] each, rows of all pieces.

    keys: of each piece, as `read_slices` writes them. rows: documents of each.
    """
    begins = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])
    blocks = -(-int(begins[-1]) // KEYS_PER_BLOCK)
    dropped, firsts = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for block in range(blocks):
        low, high = (np.uint64(min(each * 2**64 // blocks, 2**64 - 1)) for each in (block, block + 1))
        found, places = [np.empty((0, 2), np.uint64)], [np.empty(0, np.int64)]
        inner = [np.empty((0, 2), np.int64)]
        for path, begin in zip(keys, begins.tolist(), strict=False):
            piece = mapped(path)
            start = int(np.searchsorted(piece[:, 0], low))
            end = len(piece) if block == blocks - 1 else int(np.searchsorted(piece[:, 0], high))
            here = np.asarray(piece[start:end])
            at = here[:, 2].astype(np.int64) + begin
            first = _first_of_equal(here[:, :2], at)
            repeated = first != at
            inner.append(np.column_stack([at[repeated], first[repeated]]))
            found.append(here[~repeated, :2])
            places.append(at[~repeated])
        block_keys, block_places = np.concatenate(found), np.concatenate(places)
        order = np.lexsort((block_places, block_keys[:, 1], block_keys[:, 0]))
        ordered = block_places[order]
        first = _first_of_equal(block_keys[order], ordered)
        # Of a repetition within a piece, the first of its piece may repeat an earlier piece's.
        repeats, by_place = np.concatenate(inner), np.argsort(ordered)
        of_repeats = first[by_place[np.searchsorted(ordered, repeats[:, 1], sorter=by_place)]]
        dropped += [ordered[first != ordered], repeats[:, 0]]
        firsts += [first[first != ordered], of_repeats]
    every = np.concatenate(dropped)
    order = np.argsort(every, kind="stable")
    return every[order], np.concatenate(firsts)[order]


def _first_of_equal(keys: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The first place of each run of equal keys. keys: [n, 2], sorted. places: [n]."""
    if not len(keys):
        return places
    begins = np.concatenate([[True], (keys[1:] != keys[:-1]).any(1)])
    return places[np.maximum.accumulate(np.where(begins, np.arange(len(keys)), 0))]
