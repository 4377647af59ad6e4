"""Near-duplicates of a whole corpus by their texts alone, found before anything is trained.

    sketches      256 bytes of each document (tasks/documents/shingles.py)
    candidates    documents that agree in all bytes of one of many bands; within a group of such documents each with
                  its neighbours in the order of the following bytes, and with the group's first: linear in its size
    estimate      share of equal bytes; candidates far below the threshold are dropped (standard deviation 0.03)
    verified      by the exact overlap of their shingles

A band is as wide as it can be while a pair at the threshold agrees in one of them with a probability of 0.995. So of a
cluster of many copies not every pair is found, but each copy with the first of them.
Price: 3,500 to 6,000 documents of 3 kB per second on one core, so 3 to 5 minutes for a million; a candidate that is
verified is read and shingled again. Memory: 256 bytes per document and the shingles of 2,048 pairs.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from eclectus.storage.artifact import Artifact
from eclectus.tasks.documents.shingles import BINS, overlap, shingles, sketch
from eclectus.tasks.documents.table import read_batches
from eclectus.tasks.documents.text_reader import TextReader
from eclectus.tasks.run import progress

FOUND = 0.995
LOWEST = 0.5
MARGIN = 0.12
NEXT_IN_GROUP = 4
PAIRS_AT_A_TIME = 2_048
COMPARED_AT_A_TIME = 2**16


def near_duplicate_pairs(documents: Artifact, rank: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of rows int64 [P, 2] (lower first, sorted, unique) whose overlap is at least `threshold`; overlaps [P].

    rank: int [N], distinct, order in which documents of a group go first, the highest first; below 0 are documents that
    are not compared. threshold: from LOWEST on, under which no band would find most of the pairs.
    """
    threshold = max(threshold, LOWEST)
    rows = np.flatnonzero(rank >= 0)
    bytes_ND = _sketches(documents, rank >= 0)
    pairs = rows[_candidates(bytes_ND, rank[rows], threshold)]
    pairs = np.unique(np.sort(pairs, axis=1), axis=0)
    reader, overlaps = TextReader(documents), np.zeros(len(pairs))
    report_progress = progress(len(pairs), "comparing near-duplicates", "pairs")
    for begin in range(0, len(pairs), PAIRS_AT_A_TIME):
        part = pairs[begin : begin + PAIRS_AT_A_TIME]
        needed = np.unique(part)
        sets = dict(zip(needed.tolist(), map(shingles, reader.read(needed)), strict=True))
        overlaps[begin : begin + len(part)] = [overlap(sets[a], sets[b]) for a, b in part.tolist()]
        report_progress(begin + len(part))
    near = overlaps >= threshold
    return pairs[near], overlaps[near]


def band_width(threshold: float) -> int:
    """Bytes of a band: the most with which a pair of this overlap agrees in some band with probability FOUND."""
    widths = [width for width in range(1, 9) if 1 - (1 - threshold**width) ** (BINS // width) >= FOUND]
    return widths[-1]


def _sketches(documents: Artifact, wanted: np.ndarray) -> np.ndarray:
    """The sketches of the wanted documents, uint8 [n, BINS]. wanted: bool [N]."""
    out = np.zeros((int(wanted.sum()), BINS), np.uint8)
    report_progress = progress(len(out), "looking for near-duplicates", "documents")
    row = done = 0
    for batch in read_batches(documents, ["text"]):
        here = wanted[row : row + len(batch)]
        row += len(batch)
        for text in batch["text"].filter(pa.array(here)).to_pylist():
            sketch(text or "", out[done])
            done += 1
        report_progress(done)
    return out


def _candidates(bytes_ND: np.ndarray, rank: np.ndarray, threshold: float) -> np.ndarray:
    """Pairs int64 [P, 2] of positions that agree in a band and are not estimated far below the threshold; unique."""
    count, found = len(bytes_ND), np.empty(0, np.int64)
    width = band_width(threshold)
    for begin in range(0, BINS - width + 1, width):
        order, starts = _groups(bytes_ND, begin, width)
        if len(order) == 0:
            continue
        sizes = np.diff(np.append(starts, len(order)))
        group = np.repeat(np.arange(len(starts)), sizes)
        first = order[np.lexsort((-rank[order], group))[starts]][group]
        with_first = _estimates(bytes_ND, first, order)
        pairs = [np.stack([first, order], axis=1)[(with_first >= threshold - MARGIN) & (first != order)]]
        # Two of a large group that surely repeat its first need not be compared with each other.
        sure = (with_first >= threshold + MARGIN) & (sizes > NEXT_IN_GROUP)[group]
        for step in range(1, NEXT_IN_GROUP):
            here = np.flatnonzero((group[step:] == group[:-step]) & ~(sure[step:] & sure[:-step]))
            one, other = order[here], order[here + step]
            near = _estimates(bytes_ND, one, other) >= threshold - MARGIN
            pairs.append(np.stack([one[near], other[near]], axis=1))
        pair = np.concatenate(pairs)
        found = np.union1d(found, pair.min(axis=1) * count + pair.max(axis=1))
    return np.stack([found // max(count, 1), found % max(count, 1)], axis=1)


def _groups(bytes_ND: np.ndarray, begin: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the documents that share a band's bytes with another, group by group, and where groups begin.

    Within a group the bytes after the band decide the order.
    """
    key = _as_number(bytes_ND[:, begin : begin + width])
    order = np.argsort(key, kind="stable")
    same = key[order[1:]] == key[order[:-1]]
    order = np.sort(order[np.concatenate([same, [False]]) | np.concatenate([[False], same])]) if len(key) else order
    key = key[order]
    columns = (np.arange(8) + begin + width) % BINS
    inside = np.lexsort((_as_number(bytes_ND[order][:, columns]), key))
    order, key = order[inside], key[inside]
    return order, np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]])[: len(key)])


def _estimates(bytes_ND: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Share of equal bytes of pairs of sketches [P]."""
    parts = np.array_split(np.arange(len(one)), 1 + len(one) // COMPARED_AT_A_TIME)
    return np.concatenate([(bytes_ND[one[part]] == bytes_ND[other[part]]).mean(axis=1) for part in parts])


def _as_number(columns: np.ndarray) -> np.ndarray:
    """Up to 8 bytes [n, width] as one number uint64 [n]."""
    wide = np.zeros((len(columns), 8), np.uint8)
    wide[:, : columns.shape[1]] = columns
    return wide.view(np.uint64).ravel()
