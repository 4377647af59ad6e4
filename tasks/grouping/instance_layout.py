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
    return spans_of(begins, shuffled(instance_count(total, length, keep_remainder), seed), 0, length)


def instance_count(total: int, length: int, keep_remainder: bool) -> int:
    """Instances of this length in so many tokens."""
    return -(-total // length) if keep_remainder else total // length


def shuffled(count: int, seed: int) -> np.ndarray:
    """Which instance of the concatenation stands at each position of the shuffled stream, int64 [count]."""
    source = np.empty(count, np.int64)
    source[np.random.default_rng([seed, 2]).permutation(count)] = np.arange(count)
    return source


def spans_of(begins: np.ndarray, source: np.ndarray, first: int, length: int) -> Spans:
    """The spans of some instances that follow each other in the shuffled stream.

    begins: int64 [M + 1], where each document begins in the concatenation, and its end. source: int64 [count], which
    instances of the concatenation they are. first: position of the first of them in the shuffled stream.
    """
    total = int(begins[-1])
    start = source * length
    end = np.minimum(start + length, total)
    first_document = np.searchsorted(begins, start, side="right") - 1
    counts = np.searchsorted(begins, end, side="left") - first_document
    before = np.cumsum(counts) - counts
    position = np.repeat(first_document - before, counts) + np.arange(counts.sum())
    instance = np.repeat(np.arange(len(source)), counts)
    left = np.maximum(begins[position], start[instance])
    size = np.minimum(begins[position + 1], end[instance]) - left
    to = (first + instance) * length + left - start[instance]
    offset = left - begins[position]
    if not size.all():
        there = size > 0
        to, size, position, offset = to[there], size[there], position[there], offset[there]
    return Spans(to, size, position, offset, len(source), length, total)
