"""Shingles: a text as the set of its runs of 5 characters, the overlap of two such sets, and a sketch to find overlaps.

    shingle    5 neighbouring characters of the normalised text (tasks/documents/normalise.py), as a 32-bit hash; a
               shorter text is one shingle
    overlap    shingles that both texts have / shingles that one of them has (Jaccard), exact
    sketch     256 bytes: the shingles fall into 256 bins by their hash, and a bin keeps 8 bits of its smallest hash
               (one permutation MinHash; an empty bin copies the first filled one in an order of its own, the same for
               every text: "optimal densification", Shrivastava 2017). Two texts agree in a byte with a probability of
               their overlap, plus 1/256 of the rest

Price per core: shingles 6 to 10 MB/s, sketches 11 to 80 MB/s, most of it normalisation; an overlap 10 to 70
microseconds.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np

from eclectus.tasks.compiled import compiled
from eclectus.tasks.documents.normalise import VERSION, normalised

SHINGLE = 5
BINS = 256
TRIES = 64
CHARACTERS = 2**22
MEASURE = f"{SHINGLE} characters of {VERSION}"
"""How overlaps are measured; what was measured otherwise is not reused."""

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_MIXER = np.uint64(0xBF58476D1CE4E5B9)
_SHIFT = np.uint64(32)
_EMPTY = np.uint32(0xFFFFFFFF)


@compiled
def _hashes(points: np.ndarray, begins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hashes uint32 of the runs of 5 of these texts' code points, text after text, and where each text's begin [N + 1].

    points: uint32, of all texts. begins: int64 [N + 1], each text of 5 code points or more.
    """
    firsts = begins - (SHINGLE - 1) * np.arange(len(begins))
    out = np.empty(firsts[-1], np.uint32)
    for text in range(len(begins) - 1):
        for number in range(firsts[text + 1] - firsts[text]):
            total = np.uint64(SHINGLE)
            for at in range(SHINGLE):
                total = (total ^ np.uint64(points[begins[text] + number + at])) * _MULTIPLIER
            total = (total ^ (total >> _SHIFT)) * _MIXER
            out[firsts[text] + number] = np.uint32(total >> _SHIFT)
    return out, firsts


@compiled
def _overlaps(
    ones: np.ndarray, one_begins: np.ndarray, others: np.ndarray, other_begins: np.ndarray, pairs: np.ndarray
) -> np.ndarray:
    """Jaccard similarity float64 [P] of pairs [P, 2] of sets: of the first and of the second collection."""
    out = np.empty(len(pairs), np.float64)
    for number in range(len(pairs)):
        one, other = pairs[number, 0], pairs[number, 1]
        i, end_i, j, end_j = one_begins[one], one_begins[one + 1], other_begins[other], other_begins[other + 1]
        total, shared = end_i - i + end_j - j, 0
        while i < end_i and j < end_j:
            a, b = ones[i], others[j]
            shared += a == b
            i += a <= b
            j += b <= a
        out[number] = shared / (total - shared)
    return out


@compiled
def _sketches(hashes: np.ndarray, firsts: np.ndarray, order: np.ndarray, out: np.ndarray) -> None:
    """Fills `out` uint8 [N, BINS]. order: int16 [BINS, TRIES]."""
    least = np.empty(BINS, np.uint32)
    for text in range(len(out)):
        least[:] = _EMPTY
        for at in range(firsts[text], firsts[text + 1]):
            number = hashes[at] >> np.uint32(24)
            if hashes[at] < least[number]:
                least[number] = hashes[at]
        for number in range(BINS):
            source = number
            if least[number] == _EMPTY:
                for turn in range(TRIES):
                    source = order[number, turn]
                    if least[source] != _EMPTY:
                        break
                while least[source] == _EMPTY:
                    source = (source + 1) % BINS
            out[text, number] = np.uint8(least[source] & np.uint32(255))


@functools.cache
def _order() -> np.ndarray:
    """For each bin, the other bins that it tries to copy when it is empty: int16 [BINS, TRIES]."""
    return np.random.default_rng(2017).integers(0, BINS, (BINS, TRIES)).astype(np.int16)


def _all_hashes(texts: Iterable[str | None]) -> tuple[np.ndarray, np.ndarray]:
    """The hash of every shingle of the texts, repeats included: uint32, and where those of each begin int64 [N + 1]."""
    normal = [normalised(text or "").ljust(SHINGLE, "\0") for text in texts]
    begins = np.zeros(len(normal) + 1, np.int64)
    np.cumsum([len(text) for text in normal], out=begins[1:])
    points = np.frombuffer("".join(normal).encode("utf-32-le", "surrogatepass"), np.uint32)
    hashes, firsts = _hashes(points, begins)
    return hashes, firsts


def batches_of(texts: Sequence[str | None]) -> Iterator[slice]:
    """Slices of the texts, each of at most CHARACTERS together or of one text: memory of one call."""
    begin = size = 0
    for number, text in enumerate(texts):
        if size and size + len(text or "") > CHARACTERS:
            yield slice(begin, number)
            begin, size = number, 0
        size += len(text or "")
    if begin < len(texts):
        yield slice(begin, len(texts))


def shingle_sets(texts: Sequence[str | None]) -> tuple[np.ndarray, np.ndarray]:
    """The sets of the texts' shingles, each ascending, uint32 in one array, and where each begins int64 [N + 1]."""
    parts, sizes = [np.empty(0, np.uint32)], [np.zeros(1, np.int64)]
    for batch in batches_of(texts):
        hashes, firsts = _all_hashes(texts[batch])
        for begin, end in pairwise(firsts.tolist()):
            hashes[begin:end].sort()
        first = np.concatenate([[True], hashes[1:] != hashes[:-1]])
        first[firsts[:-1]] = True
        parts.append(hashes[first])
        sizes.append(np.add.reduceat(first, firsts[:-1], dtype=np.int64))
    return np.concatenate(parts), np.cumsum(np.concatenate(sizes))


def shingles(text: str) -> np.ndarray:
    """The set of a text's shingles, ascending, uint32 [n]."""
    return shingle_sets([text])[0]


def overlaps(
    ones: tuple[np.ndarray, np.ndarray], others: tuple[np.ndarray, np.ndarray], pairs: np.ndarray
) -> np.ndarray:
    """Jaccard similarity float64 [P] of pairs int64 [P, 2]: numbers of a set of `ones` and of one of `others`, both as
    `shingle_sets` gives them."""
    return _overlaps(*ones, *others, pairs)


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Jaccard similarity of two sets of shingles."""
    ones, others = ((each, np.array([0, len(each)])) for each in (a, b))
    return float(overlaps(ones, others, np.zeros((1, 2), np.int64))[0])


def sketches(texts: Sequence[str | None]) -> np.ndarray:
    """The texts' sketches, uint8 [N, BINS]."""
    out = np.empty((len(texts), BINS), np.uint8)
    for batch in batches_of(texts):
        _sketches(*_all_hashes(texts[batch]), _order(), out[batch])
    return out
