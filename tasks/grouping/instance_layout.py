"""Where documents lie in instances: laid end to end, cut at every L, the instances shuffled (docs/methods.md 1.6)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Spans:
    """Stretches of one document inside one instance, in the order of the shuffled stream; int64 [S] each.

    to: start in that stream. size: length of the stretch. position: of the document, in the order. offset: of the stretch, in
    its document. count, length: instances and their length. total: length of all documents.
    """

    to: np.ndarray
    size: np.ndarray
    position: np.ndarray
    offset: np.ndarray
    count: int
    length: int
    total: int

    @property
    def firsts(self) -> np.ndarray:
        """Where each instance begins among the spans, int64 [count + 1]."""
        return np.searchsorted(self.to, np.arange(self.count + 1) * self.length)


def plan(sizes: np.ndarray, length: int, keep_remainder: bool, seed: int) -> Spans:
    """Which stretch goes where. sizes: int64 [M], of the documents in their order, in whatever unit `length` has.

    keep_remainder: whether the last stretch shorter than an instance is one too. No instance at all is a plan as well.
    """
    begins = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    total = int(begins[-1])
    count = -(-total // length) if keep_remainder else total // length
    place = np.random.default_rng([seed, 2]).permutation(count)
    end = min(total, count * length)
    # Not `np.unique`, which hashes: a hundred times as long for a million cuts.
    cuts = np.sort(np.concatenate([begins[begins < end], np.arange(0, end, length)]))
    cuts = cuts[np.diff(cuts, prepend=-1) > 0]
    position = np.searchsorted(begins, cuts, side="right") - 1
    to = place[cuts // length] * length + cuts % length
    sort = np.argsort(to)
    columns = (to, np.diff(np.append(cuts, end)), position, cuts - begins[position])
    return Spans(*(column[sort] for column in columns), count, length, total)
