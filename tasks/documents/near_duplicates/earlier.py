"""What an earlier corpus of the same home gives to one that has grown: sketches, the overlaps of its pairs, and the
pairs of each band.

Documents are the same where their ids are, which are hashes of their texts. They must stand in the same order, which
they do when files are added or taken away; else all pairs are compared again. Pairs of bands are taken over where the
order by rank is the same too.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from eclectus.tasks.disk_matrix import mapped
from eclectus.tasks.documents.digest_set import positions_of
from eclectus.tasks.documents.near_duplicates.candidates import PAIRS
from eclectus.tasks.documents.near_duplicates.changed import (
    BANDS,
    FRESH,
    GONE,
    read_band_pairs,
    write_band_pairs,
)
from eclectus.tasks.documents.near_duplicates.overlaps import OVERLAPS
from eclectus.tasks.documents.near_duplicates.sketches import COLUMNS, IDS
from eclectus.tasks.documents.shingles import BINS, MEASURE
from eclectus.tasks.over_parts import Done, find
from eclectus.tasks.reuse import earlier

RANK = "rank.npy"
AT_A_TIME = 2**20
MOST_CHANGED = 0.2
"""Share of the documents, new or gone, from which on it costs less to form all groups again."""
RECORDED = f"near-duplicates 1, {MEASURE}"
"""Value of the statistic `compared_by` of artifacts that name their comparison in `compared`."""


def earlier_comparison() -> Done | None:
    """The newest comparison of a corpus of this home: pairs.npy and overlaps.npy, and in its description the keys of
    the sketches of each part."""
    for artifact in earlier("documents", compared_by=RECORDED):
        if there := find(artifact.statistics["compared"]):
            return there
    return None


def carry_over(
    out: Path, compared: Path, theirs: list[Path], ours: list[Path], same: list[int], rank: Path, banded: bool
) -> dict[str, Any]:
    """Writes the overlaps of the earlier pairs whose documents are both here: pairs.npy as `lower row * N + higher
    row`, sorted, and overlaps.npy; and, if `banded` and the order by rank is as it was, what `Changed` reads.

    theirs, ours: folders of the sketches of each part. same: for each of theirs, the number of the equal part of ours,
    or -1. rank: of the present documents.
    """
    row_map = _row_map(theirs, ours, same)
    count = int(first_rows_of(ours)[-1])
    codes, measured = (mapped(compared / name) for name in (PAIRS, OVERLAPS))
    blocks = [slice(begin, begin + AT_A_TIME) for begin in range(0, len(codes), AT_A_TIME)]
    kept = sum(int((_present(codes[block], row_map, count) >= 0).sum()) for block in blocks)
    pairs = np.lib.format.open_memmap(out / PAIRS, "w+", np.int64, (kept,))
    overlaps = np.lib.format.open_memmap(out / OVERLAPS, "w+", np.float64, (kept,))
    done = 0
    for block in blocks:
        mine = _present(codes[block], row_map, count)
        here = np.flatnonzero(mine >= 0)
        pairs[done : done + len(here)] = mine[here]
        overlaps[done : done + len(here)] = measured[block][here]
        done += len(here)
    banded = banded and (compared / BANDS).is_file() and _carry_bands(out, compared, theirs, row_map, np.load(rank))
    return {"pairs": kept, "banded": banded}


def _row_map(theirs: list[Path], ours: list[Path], same: list[int]) -> np.ndarray:
    """The present row of each earlier document, int64, or -1; all -1 if they do not stand in the same order."""
    their_rows, our_rows = (first_rows_of(each) for each in (theirs, ours))
    row_map = np.full(their_rows[-1], -1)
    others = [number for number in range(len(ours)) if number not in set(same)]
    rows = [np.empty(0, np.int64), *(np.arange(our_rows[each], our_rows[each + 1]) for each in others)]
    our_others = np.concatenate(rows)
    ids = np.concatenate([np.empty(0, "S16"), *(np.load(ours[each] / IDS) for each in others)])
    for folder, number, (begin, end) in zip(theirs, same, pairwise(their_rows.tolist()), strict=True):
        if number >= 0:
            row_map[begin:end] = np.arange(our_rows[number], our_rows[number + 1])
        elif len(ids):
            position = positions_of(np.load(folder / IDS), ids)
            row_map[begin:end] = np.where(position >= 0, our_others[position], -1)
    there = row_map[row_map >= 0]
    if not (there[1:] > there[:-1]).all():
        row_map[:] = -1
    return row_map


def _carry_bands(out: Path, compared: Path, theirs: list[Path], row_map: np.ndarray, rank: np.ndarray) -> bool:
    """Writes the pairs of each band in present rows, fresh.npy and gone.npy; False if the order by rank changed, or too
    many documents."""
    then = np.load(compared / RANK)
    now = np.where(row_map >= 0, rank[row_map], -1) if len(rank) else np.full(len(row_map), -1)
    both = np.flatnonzero((then >= 0) & (now >= 0))
    if not (np.diff(now[both[np.argsort(then[both])]]) > 0).all():
        return False
    fresh = rank >= 0
    fresh[row_map[both]] = False
    gone = np.flatnonzero((then >= 0) & (now < 0))
    if fresh.sum() + len(gone) > MOST_CHANGED * len(rank):
        return False
    sketches, begins = [np.empty((BINS, 0), np.uint8)], first_rows_of(theirs)
    for folder, (begin, end) in zip(theirs, pairwise(begins.tolist()), strict=True):
        here = gone[np.searchsorted(gone, begin) : np.searchsorted(gone, end)] - begin
        sketches.append(mapped(folder / COLUMNS)[:, here])
    np.save(out / FRESH, np.flatnonzero(fresh))
    np.save(out / GONE, np.concatenate(sketches, axis=1))
    row_map = np.where(now >= 0, row_map, -1)
    present = (_present(each, row_map, len(rank)) for each in read_band_pairs(compared))
    write_band_pairs(out, (each[each >= 0] for each in present))
    return True


def first_rows_of(sketched: list[Path]) -> np.ndarray:
    """The first row of each part, and the number of all rows."""
    return np.cumsum([0, *(len(mapped(folder / IDS)) for folder in sketched)])


def _present(codes: np.ndarray, row_map: np.ndarray, count: int) -> np.ndarray:
    """Pairs of earlier rows as pairs of the present `count` ones; -1 where a document is gone."""
    lower, higher = (row_map[each] for each in np.divmod(codes, max(len(row_map), 1)))
    return np.where((lower >= 0) & (higher >= 0), lower * count + higher, -1)
