"""Candidates: pairs of documents that agree in all bytes of a band of their sketches, and are not estimated far below
the threshold.

Within a group of documents that agree, in the order of the bytes after the band, each is compared with its neighbours
and with the group's first: linear in its size. A band is as wide as it can be while a pair at the threshold agrees in
one of them with a probability of FOUND.

Every call takes some bands of all documents, or those of a range of the bands' bytes where there are very many.
Price: 7 seconds per million documents of which a tenth are in groups. Memory: 40 bytes per document of the range, 60
where all are alike.

Of a corpus that has grown, only the groups with a document that is new or gone are formed again (`changed.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from eclectus.tasks.compiled import compiled
from eclectus.tasks.disk_matrix import PartMatrix, mapped
from eclectus.tasks.documents.near_duplicates.changed import (
    MULTIPLIER,
    Changed,
    ascending,
    read_bytes,
    without,
    write_band_pairs,
)
from eclectus.tasks.documents.near_duplicates.sketches import COLUMNS, ROWS
from eclectus.tasks.documents.shingles import BINS

PAIRS = "pairs.npy"
FOUND = 0.995
MARGIN = 0.12
NEXT_IN_GROUP = 4
COMPARED_AT_A_TIME = 2**18


def band_width(threshold: float) -> int:
    """Bytes of a band: the most with which a pair of this overlap agrees in some band with probability FOUND."""
    widths = [width for width in range(1, 9) if 1 - (1 - threshold**width) ** (BINS // width) >= FOUND]
    return widths[-1]


def bands_of(threshold: float) -> list[int]:
    """The first byte of each band."""
    width = band_width(threshold)
    return list(range(0, BINS - width + 1, width))


def band_pairs(
    out: Path,
    sketches: list[Path],
    rank: Path,
    bands: list[int],
    threshold: float,
    share: tuple[int, int],
    before: Path | None = None,
) -> dict[str, Any]:
    """Writes the pairs that agree in one of these bands, as `lower row * N + higher row`, int64 [P], sorted, unique;
    and those of each band (BandPairs).

    sketches: folder of each part. rank: int64 [N], the highest goes first in its group; below 0 are documents that are
    not compared. share: (number, of how many) of the range of a band's bytes. before: folder of `carry_over`.
    """
    rows = PartMatrix([folder / ROWS for folder in sketches])
    rank_N, width = np.asarray(mapped(rank)), band_width(threshold)
    changed = Changed.load(before, bands, bands_of(threshold)) if before else None
    found = []
    for number, begin in enumerate(bands):
        # Opened for each band: pages that were read are then given back.
        columns = [np.asarray(mapped(folder / COLUMNS)) for folder in sketches]
        band = range(begin, begin + width)
        if changed:
            members, kept = changed.members(columns, band, rank_N), changed.pairs[number]
        else:
            members, kept = _not_alone(read_bytes(columns, band), rank_N, share), np.empty(0, np.int64)
        order, starts = _groups(members, columns, band)
        del columns
        pairs = _pairs(order, starts, rows, rank_N, threshold)
        found.append(ascending([pairs, without(kept, members, len(rank_N))]) if len(kept) else pairs)
    write_band_pairs(out, found)
    pairs = ascending(found)
    np.save(out / PAIRS, pairs)
    return {"pairs": len(pairs)}


def _groups(rows: np.ndarray, columns: list[np.ndarray], band: range) -> tuple[np.ndarray, np.ndarray]:
    """Of these rows, ascending, those that share a band's bytes with another, group by group, and where groups begin.

    Within a group the 8 bytes after the band decide the order.
    """
    key = read_bytes(columns, band, rows)
    inside = np.lexsort((read_bytes(columns, range(band.stop, band.stop + 8), rows), key))
    rows, key = rows[inside], key[inside]
    new = np.concatenate([[True], key[1:] != key[:-1]])[: len(key)]
    # A row whose hash only equals that of another is in no group.
    alone = new & np.concatenate([new[1:], [True]])[: len(key)]
    return rows[~alone], np.flatnonzero(new[~alone])


def _not_alone(key: np.ndarray, rank: np.ndarray, share: tuple[int, int]) -> np.ndarray:
    """Ascending rows of the documents whose key another one has, and perhaps a few more: int64 [n].

    One sort of numbers that hold a hash of the key above the row: a third of the price of sorting rows by key.
    """
    bits = np.uint64(max(1, len(key).bit_length()))
    rows = np.flatnonzero(rank >= 0)
    both = key[rows]
    both *= MULTIPLIER
    if share[1] > 1:
        mine = (both >> np.uint64(32)) % np.uint64(share[1]) == share[0]
        rows, both = rows[mine], both[mine]
    both &= ~np.uint64(0) << bits
    both |= rows.view(np.uint64)
    del rows
    both.sort()
    both = both[_repeated(both, bits)]
    both &= ~(~np.uint64(0) << bits)
    rows = both.astype(np.int64)
    rows.sort()
    return rows


def _pairs(order: np.ndarray, starts: np.ndarray, rows: PartMatrix, rank: np.ndarray, threshold: float) -> np.ndarray:
    """The candidates among groups of rows, as `lower row * N + higher row`, int64 [P], sorted, unique.

    Of small groups all pairs: most are found in many bands, and `far_apart` looks at each of them once.
    """
    sizes = np.diff(np.append(starts, len(order)))
    small = sizes <= NEXT_IN_GROUP
    found = [_all_pairs(order, starts[small], sizes[small], len(rank))]
    in_large = np.repeat(~small, sizes)
    order, sizes = order[in_large], sizes[~small]
    first = _firsts(order, np.cumsum(sizes) - sizes, rank)
    group = np.repeat(np.arange(len(sizes)), sizes)
    least, sure = _equal_bytes(threshold)
    for begin in range(0, len(order), COMPARED_AT_A_TIME):
        end, before = min(begin + COMPARED_AT_A_TIME, len(order)), max(0, begin - NEXT_IN_GROUP + 1)
        here, groups = order[before:end], group[before:end]
        names, number = np.unique(first[groups], return_inverse=True)
        found.append(
            _near(rows[here], rows[names], number, here, names, groups, begin - before, least, sure, len(rank))
        )
    return ascending(found)


def far_apart(pairs: np.ndarray, sketches: PartMatrix, threshold: float) -> np.ndarray:
    """Which of these pairs, `lower row * N + higher row`, are estimated far below the threshold, bool [P]."""
    out = np.empty(len(pairs), bool)
    for begin in range(0, len(pairs), COMPARED_AT_A_TIME):
        lower, higher = np.divmod(pairs[begin : begin + COMPARED_AT_A_TIME], len(sketches))
        documents, place = np.unique(np.concatenate([lower, higher]), return_inverse=True)
        one, other = np.split(place, 2)
        out[begin : begin + len(lower)] = _equal(sketches[documents], one, other) < _equal_bytes(threshold)[0]
    return out


def _equal_bytes(threshold: float) -> tuple[int, int]:
    """Equal bytes of a pair that may reach the threshold, at least, and of one that surely does."""
    shares = np.arange(BINS + 1) / BINS
    least, sure = (int(np.searchsorted(shares, each)) for each in (threshold - MARGIN, threshold + MARGIN))
    return least, sure


@compiled
def _repeated(values: np.ndarray, bits: np.uint64) -> np.ndarray:
    """Which of these sorted numbers equal one beside them above the lowest bits, bool [n]."""
    out = np.zeros(len(values), np.bool_)
    for at in range(1, len(values)):
        if (values[at] ^ values[at - 1]) >> bits == 0:
            out[at - 1] = out[at] = True
    return out


@compiled
def _firsts(order: np.ndarray, starts: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """The row of the highest rank of each group."""
    out = np.empty(len(starts), np.int64)
    for group in range(len(starts)):
        end = starts[group + 1] if group + 1 < len(starts) else len(order)
        best = order[starts[group]]
        for at in range(starts[group], end):
            if rank[order[at]] > rank[best]:
                best = order[at]
        out[group] = best
    return out


@compiled
def _all_pairs(order: np.ndarray, starts: np.ndarray, sizes: np.ndarray, count: int) -> np.ndarray:
    """All pairs of rows within each of these groups."""
    out = np.empty((sizes * (sizes - 1)).sum() // 2, np.int64)
    found = 0
    for group in range(len(starts)):
        for at in range(starts[group], starts[group] + sizes[group]):
            for before in range(starts[group], at):
                out[found] = min(order[at], order[before]) * count + max(order[at], order[before])
                found += 1
    return out


@compiled
def _equal(sketches: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Equal bytes of pairs of these sketches, int32 [P]."""
    out = np.empty(len(one), np.int32)
    for pair in range(len(one)):
        same = np.int32(0)
        for byte in range(256):
            same += sketches[one[pair], byte] == sketches[other[pair], byte]
        out[pair] = same
    return out


@compiled
def _near(
    sketches: np.ndarray,
    first_sketches: np.ndarray,
    number: np.ndarray,
    rows: np.ndarray,
    first_rows: np.ndarray,
    group: np.ndarray,
    begin: int,
    least: int,
    sure: int,
    count: int,
) -> np.ndarray:
    """Pairs of documents of large groups from `begin` on with their group's first and with those before them.

    number: of the group's first among first_sketches and first_rows. least, sure: equal bytes. Two that surely repeat
    the first need not be compared with each other.
    """
    out = np.empty(len(rows) * 4, np.int64)
    with_first = np.zeros(len(rows), np.int64)
    found = 0
    for at in range(len(rows)):
        same = np.int32(0)
        for byte in range(256):
            same += sketches[at, byte] == first_sketches[number[at], byte]
        with_first[at] = same
        if at < begin:
            continue
        row, other = rows[at], first_rows[number[at]]
        if same >= least and row != other:
            out[found] = min(row, other) * count + max(row, other)
            found += 1
        for before in range(max(0, at - 3), at):
            if group[before] != group[at]:
                continue
            if with_first[at] >= sure and with_first[before] >= sure:
                continue
            same = np.int32(0)
            for byte in range(256):
                same += sketches[at, byte] == sketches[before, byte]
            if same >= least:
                out[found] = min(row, rows[before]) * count + max(row, rows[before])
                found += 1
    return out[:found]
