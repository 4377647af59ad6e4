"""A set of digests that stays small: 16 bytes a member, so a billion documents take 16 GB where Python's set takes 100.

Young members live in a Python set; when it is full they become a sorted array, and arrays of like size are merged (a
log-structured merge tree), so a member is moved log2(n / YOUNG) times and looked up by as many binary searches.
"""

from __future__ import annotations

import numpy as np

YOUNG = 2**20
WIDTH = 16


class DigestSet:
    """A growing set of 16-byte digests. young: how many are kept in a Python set (about 100 bytes each)."""

    def __init__(self, young: int = YOUNG) -> None:
        self._limit = young
        self._young: set[bytes] = set()
        self._sorted: list[np.ndarray] = []

    def add(self, digests: list[bytes]) -> list[bool]:
        """Adds the digests in order and says of each whether it is new; the second of two equal ones is not."""
        old = self._in_sorted(digests)
        new = []
        for digest, known in zip(digests, old, strict=True):
            fresh = not known and digest not in self._young
            if fresh:
                self._young.add(digest)
            new.append(fresh)
        if len(self._young) >= self._limit:
            self._settle()
        return new

    def __len__(self) -> int:
        return len(self._young) + sum(map(len, self._sorted))

    def _in_sorted(self, digests: list[bytes]) -> list[bool]:
        known = np.zeros(len(digests), bool)
        if self._sorted and digests:
            wanted = np.array(digests, f"S{WIDTH}")
            for members in self._sorted:
                place = np.minimum(np.searchsorted(members, wanted), len(members) - 1)
                known |= members[place] == wanted
        return known.tolist()

    def _settle(self) -> None:
        members = np.sort(np.array(list(self._young), f"S{WIDTH}"))
        self._young = set()
        while self._sorted and len(self._sorted[-1]) <= 2 * len(members):
            members = np.sort(np.concatenate([self._sorted.pop(), members]), kind="stable")
        self._sorted.append(members)
