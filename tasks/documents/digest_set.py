"""Lookup of ids in arrays, and a growing set of digests at 16 bytes per member (a Python set takes about 100).

Recent members of the set live in a Python set; when that is full it becomes a sorted array, and arrays of similar
size are merged (a log-structured merge tree), so that a member is moved log2(n / RECENT) times and found by as many
searches.
"""

from __future__ import annotations

import numpy as np

RECENT = 2**20
WIDTH = 16


def positions_of(wanted: np.ndarray, ids: np.ndarray, ascending: bool = False) -> np.ndarray:
    """Position in `ids` [m] of each of `wanted` [n], int64 [n]; -1 if it is not there.

    ascending: whether `ids` are sorted; if not, this costs a sort.
    """
    if not len(ids):
        return np.full(len(wanted), -1)
    order = None if ascending else np.argsort(ids, kind="stable")
    nearest = np.minimum(np.searchsorted(ids, wanted, sorter=order), len(ids) - 1)
    position = nearest if order is None else order[nearest]
    return np.where(ids[position] == wanted, position, -1)


class DigestSet:
    """A growing set of 16-byte digests. recent: how many are kept in a Python set (about 100 bytes each)."""

    def __init__(self, recent: int = RECENT) -> None:
        self._limit = recent
        self._recent: set[bytes] = set()
        self._sorted: list[np.ndarray] = []

    def add(self, digests: list[bytes]) -> list[bool]:
        """Adds the digests in order; returns for each whether it is new (the second of two equal ones is not)."""
        new = []
        for digest, known in zip(digests, self._in_sorted(digests), strict=True):
            is_new = not known and digest not in self._recent
            if is_new:
                self._recent.add(digest)
            new.append(is_new)
        if len(self._recent) >= self._limit:
            self._merge_recent()
        return new

    def __len__(self) -> int:
        return len(self._recent) + sum(map(len, self._sorted))

    def _in_sorted(self, digests: list[bytes]) -> list[bool]:
        known = np.zeros(len(digests), bool)
        if self._sorted and digests:
            wanted = np.array(digests, f"S{WIDTH}")
            for members in self._sorted:
                known |= positions_of(wanted, members, ascending=True) >= 0
        return known.tolist()

    def _merge_recent(self) -> None:
        members = np.sort(np.array(list(self._recent), f"S{WIDTH}"))
        self._recent = set()
        while self._sorted and len(self._sorted[-1]) <= 2 * len(members):
            members = np.sort(np.concatenate([self._sorted.pop(), members]), kind="stable")
        self._sorted.append(members)
