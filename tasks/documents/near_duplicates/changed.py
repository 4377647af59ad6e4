"""The groups of a band in which a corpus changed: those with a document that is new or gone. All others have the pairs
that they had, so of 1% new documents a hundredth of the groups is formed again.

    bands.int64     raw: pairs of each band as `lower row * N + higher row`, sorted in each, one band after the other
    band_ends.npy   int64 [bands]: where those of each band end
    fresh.npy       int64: present rows that were not compared before, ascending
    gone.npy        uint8 [BINS, n]: sketches of documents that were compared and are no longer, byte by byte

Price: 2 nanoseconds per document and band, to find who shares a band's bytes with what is new or gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eclectus.tasks.compiled import compiled
from eclectus.tasks.disk_matrix import mapped
from eclectus.tasks.documents.shingles import BINS

BANDS, BAND_ENDS, FRESH, GONE = "bands.int64", "band_ends.npy", "fresh.npy", "gone.npy"
SLOTS_PER_KEY = 16
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
"""For hashes of a band's bytes."""


def write_band_pairs(out: Path, pairs: Iterable[np.ndarray]) -> None:
    """Writes the pairs of each band, int64, sorted, one band at a time."""
    ends = [0]
    with open(out / BANDS, "wb") as file:
        for each in pairs:
            each.tofile(file)
            ends.append(ends[-1] + len(each))
    np.save(out / BAND_ENDS, np.array(ends[1:], np.int64))


def read_band_pairs(folder: Path) -> list[np.ndarray]:
    """The pairs of each band, mapped."""
    ends = np.load(folder / BAND_ENDS)
    pairs = np.memmap(folder / BANDS, np.int64, "r") if ends[-1] else np.empty(0, np.int64)
    return np.split(pairs, ends[:-1])


def ascending(pairs: Sequence[np.ndarray]) -> np.ndarray:
    """All of these pairs, int64, sorted, each once. np.unique hashes them first, which costs 20 times a sort."""
    every = np.sort(np.concatenate([np.empty(0, np.int64), *pairs]))
    return every[np.concatenate([[True], every[1:] != every[:-1]])[: len(every)]]


def without(pairs: np.ndarray, rows: np.ndarray, count: int) -> np.ndarray:
    """Those of these pairs, `lower row * count + higher row`, of which the lower row is none of `rows`, ascending."""
    lower = pairs // count
    place = np.minimum(np.searchsorted(rows, lower), len(rows) - 1)
    return pairs[rows[place] != lower] if len(rows) else pairs


def read_bytes(columns: list[np.ndarray], wanted: Sequence[int], rows: np.ndarray | None = None) -> np.ndarray:
    """Up to 8 bytes of the sketches as one number, the first the lowest: uint64 [N], or of ascending `rows`."""
    ends = np.cumsum([part.shape[1] for part in columns])
    out = np.zeros(int(ends[-1]) if rows is None else len(rows), np.uint64)
    done = 0
    for part, end in zip(columns, ends.tolist(), strict=True):
        here = slice(None)
        count = part.shape[1]
        if rows is not None:
            last = int(np.searchsorted(rows, end))
            here, count = rows[done:last] - (end - part.shape[1]), last - done
        for place, each in enumerate(wanted):
            out[done : done + count] |= part[each % BINS][here].astype(np.uint64) << np.uint64(8 * place)
        done += count
    return out


@dataclass(frozen=True)
class Changed:
    """What is new and what is gone since an earlier comparison, and its pairs of some bands, in present rows."""

    fresh: np.ndarray
    gone: np.ndarray
    pairs: list[np.ndarray]

    @classmethod
    def load(cls, folder: Path, bands: Sequence[int], every: Sequence[int]) -> Changed:
        """bands, every: first bytes of the bands wanted, and of all."""
        pairs = read_band_pairs(folder)
        chosen = [pairs[list(every).index(band)] for band in bands]
        return cls(np.load(folder / FRESH), mapped(folder / GONE), chosen)

    def members(self, columns: list[np.ndarray], band: range, rank: np.ndarray) -> np.ndarray:
        """Ascending rows of the documents that share this band's bytes with one that is new or gone, these included.

        columns: of each part, uint8 [BINS, n]. rank: int [N], below 0 are documents that are not compared.
        """
        changed = read_bytes(columns, band, self.fresh), read_bytes([self.gone], band)
        keys = np.sort(np.concatenate(changed))
        bits = max(10, int(SLOTS_PER_KEY * len(keys)).bit_length())
        table = np.zeros(1 << bits, np.bool_)
        _mark(table, keys, np.uint64(64 - bits))
        found, begin = [np.empty(0, np.int64)], 0
        for part in columns:
            rows = begin + _maybe(table, part[band.start : band.stop], np.uint64(64 - bits))
            found.append(rows[rank[rows] >= 0])
            begin += part.shape[1]
        rows = np.concatenate(found)
        here = read_bytes(columns, band, rows)
        place = np.minimum(np.searchsorted(keys, here), max(len(keys) - 1, 0))
        return rows[keys[place] == here] if len(keys) else rows[:0]


@compiled
def _slot(key: np.uint64, shift: np.uint64) -> np.uint64:
    return (key * MULTIPLIER) >> shift


@compiled
def _mark(table: np.ndarray, keys: np.ndarray, shift: np.uint64) -> None:
    for key in keys:
        table[_slot(key, shift)] = True


@compiled
def _maybe(table: np.ndarray, columns: np.ndarray, shift: np.uint64) -> np.ndarray:
    """Ascending positions of the columns, uint8 [width, n], whose bytes are marked in the table, and a few more."""
    out = np.empty(columns.shape[1], np.int64)
    found = 0
    for at in range(columns.shape[1]):
        key = np.uint64(0)
        for place in range(columns.shape[0]):
            key |= np.uint64(columns[place, at]) << np.uint64(8 * place)
        if table[_slot(key, shift)]:
            out[found] = at
            found += 1
    return out[:found]
