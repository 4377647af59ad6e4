"""Layout of documents in instances: concatenated, cut every L, the instances shuffled (docs/methods.md 1.6)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Spans:
    """Spans, each of one document inside one instance, in the order of the shuffled stream; int64 [S] each.

    to: start in that stream. size: length of the span. position: of the document, in the order. offset: start in its
    document. count, length: number of instances and their length. total: length of all documents.
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
        """The first span of each instance, int64 [count + 1]."""
        return np.searchsorted(self.to, np.arange(self.count + 1) * self.length)


def plan(sizes: np.ndarray, length: int, keep_remainder: bool, seed: int) -> Spans:
    """The spans of documents of these sizes, int64 [M], in their order; sizes and length are in the same unit.

    keep_remainder: whether the last, incomplete instance counts. There may be no instance at all.
    """
    begins = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    total = int(begins[-1])
    count = -(-total // length) if keep_remainder else total // length
    target = np.random.default_rng([seed, 2]).permutation(count)
    end = min(total, count * length)
    # Not `np.unique`, which hashes: 100 times slower for a million cuts.
    cuts = np.sort(np.concatenate([begins[begins < end], np.arange(0, end, length)]))
    cuts = cuts[np.diff(cuts, prepend=-1) > 0]
    position = np.searchsorted(begins, cuts, side="right") - 1
    to = target[cuts // length] * length + cuts % length
    sort = np.argsort(to)
    size, offset = np.diff(np.append(cuts, end)), cuts - begins[position]
    return Spans(to[sort], size[sort], position[sort], offset[sort], count, length, total)
