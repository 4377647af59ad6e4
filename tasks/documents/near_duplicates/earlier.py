"""What an earlier corpus of the same home gives to one that has grown: sketches, and the overlaps of its pairs.

Documents are the same where their ids are, which are hashes of their texts. They must stand in the same order, which
they do when files are added or taken away; else all pairs are compared again.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from eclectus.tasks.disk_matrix import mapped
from eclectus.tasks.documents.digest_set import positions_of
from eclectus.tasks.documents.near_duplicates.candidates import PAIRS
from eclectus.tasks.documents.near_duplicates.overlaps import OVERLAPS
from eclectus.tasks.documents.near_duplicates.sketches import IDS
from eclectus.tasks.documents.shingles import MEASURE
from eclectus.tasks.over_parts import Done, find
from eclectus.tasks.reuse import earlier

ROW_MAP = "row_map.npy"
AT_A_TIME = 2**20
RECORDED = f"near-duplicates 1, {MEASURE}"
"""Value of the statistic `compared_by` of artifacts that name their comparison in `compared`."""


def earlier_comparison() -> Done | None:
    """The newest comparison of a corpus of this home: pairs.npy and overlaps.npy, and in its description the keys of
    the sketches of each part."""
    for artifact in earlier("documents", compared_by=RECORDED):
        if there := find(artifact.statistics["compared"]):
            return there
    return None


def carry_over(out: Path, compared: Path, theirs: list[Path], ours: list[Path], same: list[int]) -> dict[str, Any]:
    """Writes row_map.npy, int64: the present row of each earlier document, or -1; and the overlaps of the earlier pairs
    whose documents are both here: pairs.npy as `lower row * N + higher row`, sorted, and overlaps.npy.

    theirs, ours: folders of the sketches of each part. same: for each of theirs, the number of the equal part of ours,
    or -1.
    """
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
    np.save(out / ROW_MAP, row_map)
    codes, measured = (mapped(compared / name) for name in (PAIRS, OVERLAPS))
    blocks = [slice(begin, begin + AT_A_TIME) for begin in range(0, len(codes), AT_A_TIME)]
    kept = sum(int((_present(codes[block], row_map, our_rows[-1]) >= 0).sum()) for block in blocks)
    pairs = np.lib.format.open_memmap(out / PAIRS, "w+", np.int64, (kept,))
    overlaps = np.lib.format.open_memmap(out / OVERLAPS, "w+", np.float64, (kept,))
    done = 0
    for block in blocks:
        mine = _present(codes[block], row_map, our_rows[-1])
        here = np.flatnonzero(mine >= 0)
        pairs[done : done + len(here)] = mine[here]
        overlaps[done : done + len(here)] = measured[block][here]
        done += len(here)
    return {"pairs": kept}


def first_rows_of(sketched: list[Path]) -> np.ndarray:
    """The first row of each part, and the number of all rows."""
    return np.cumsum([0, *(len(mapped(folder / IDS)) for folder in sketched)])


def _present(codes: np.ndarray, row_map: np.ndarray, count: int) -> np.ndarray:
    """Pairs of earlier rows as pairs of the present `count` ones; -1 where a document is gone."""
    lower, higher = (row_map[each] for each in np.divmod(codes, max(len(row_map), 1)))
    return np.where((lower >= 0) & (higher >= 0), lower * count + higher, -1)
