"""Lookup of ids in arrays, and a growing map of digests to digests at 32 bytes per entry (a dict takes about 200).

Recent entries live in a dict; when that is full it becomes two arrays sorted by key, and arrays of similar size are
merged (a log-structured merge tree), so that an entry is moved log2(n / RECENT) times and found by as many searches.
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


class DigestMap:
    """A growing map of 16-byte digests to the first value given with each. recent: how many are kept in a dict."""

    def __init__(self, recent: int = RECENT) -> None:
        self._limit = recent
        self._recent: dict[bytes, bytes] = {}
        self._sorted: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, keys: list[bytes], values: list[bytes]) -> list[bytes | None]:
        """Adds the keys in order, each with its value; returns the value of each that was there before, None if new."""
        earlier = []
        for key, value, known in zip(keys, values, self._in_sorted(keys), strict=True):
            known = known or self._recent.get(key)
            if known is None:
                self._recent[key] = value
            earlier.append(known)
        if len(self._recent) >= self._limit:
            self._merge_recent()
        return earlier

    def __len__(self) -> int:
        return len(self._recent) + sum(len(keys) for keys, _ in self._sorted)

    def _in_sorted(self, keys: list[bytes]) -> list[bytes | None]:
        known: list[bytes | None] = [None] * len(keys)
        if self._sorted and keys:
            wanted = np.array(keys, f"S{WIDTH}")
            for members, values in self._sorted:
                position = positions_of(wanted, members, ascending=True)
                for number in np.flatnonzero(position >= 0).tolist():
                    known[number] = values[position[number]].tobytes()
        return known

    def _merge_recent(self) -> None:
        keys = np.array(list(self._recent), f"S{WIDTH}")
        # Bytes of type S lose zeros at their end when they are read one by one.
        values = np.frombuffer(b"".join(self._recent.values()), f"V{WIDTH}")
        self._recent = {}
        while self._sorted and len(self._sorted[-1][0]) <= 2 * len(keys):
            more, theirs = self._sorted.pop()
            keys, values = np.concatenate([more, keys]), np.concatenate([theirs, values])
        order = np.argsort(keys, kind="stable")
        self._sorted.append((keys[order], values[order]))
