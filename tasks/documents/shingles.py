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

import numpy as np

from eclectus.tasks.compiled import compiled
from eclectus.tasks.documents.normalise import VERSION, normalised

SHINGLE = 5
BINS = 256
TRIES = 64
MEASURE = f"{SHINGLE} characters of {VERSION}"
"""How overlaps are measured; what was measured otherwise is not reused."""

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_MIXER = np.uint64(0xBF58476D1CE4E5B9)
_SHIFT = np.uint64(32)
_EMPTY = np.uint32(0xFFFFFFFF)


@compiled
def _hashes(points: np.ndarray) -> np.ndarray:
    """Hashes uint32 [n - 4] of the runs of 5 of these code points uint32 [n]."""
    out = np.empty(len(points) - SHINGLE + 1, np.uint32)
    for start in range(len(out)):
        total = np.uint64(SHINGLE)
        for at in range(SHINGLE):
            total = (total ^ np.uint64(points[start + at])) * _MULTIPLIER
        total = (total ^ (total >> _SHIFT)) * _MIXER
        out[start] = np.uint32(total >> _SHIFT)
    return out


@compiled
def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Size of the intersection of two ascending arrays."""
    i, j, shared = 0, 0, 0
    while i < len(a) and j < len(b):
        if a[i] == b[j]:
            shared += 1
            i += 1
            j += 1
        elif a[i] < b[j]:
            i += 1
        else:
            j += 1
    return shared


@compiled
def _sketch(hashes: np.ndarray, order: np.ndarray, out: np.ndarray) -> None:
    """Fills `out` uint8 [BINS]. order: int16 [BINS, TRIES]."""
    least = np.full(BINS, _EMPTY, np.uint32)
    for each in hashes:
        number = each >> np.uint32(24)
        if each < least[number]:
            least[number] = each
    for number in range(BINS):
        source = number
        if least[number] == _EMPTY:
            for turn in range(TRIES):
                source = order[number, turn]
                if least[source] != _EMPTY:
                    break
            while least[source] == _EMPTY:
                source = (source + 1) % BINS
        out[number] = np.uint8(least[source] & np.uint32(255))


@functools.cache
def _order() -> np.ndarray:
    """For each bin, the other bins that it tries to copy when it is empty: int16 [BINS, TRIES]."""
    return np.random.default_rng(2017).integers(0, BINS, (BINS, TRIES)).astype(np.int16)


def _all_hashes(text: str) -> np.ndarray:
    """The hash of every shingle of a text, repeats included: uint32 [n]."""
    points = np.frombuffer(normalised(text).encode("utf-32-le", "surrogatepass"), np.uint32)
    if len(points) < SHINGLE:
        points = np.concatenate([points, np.zeros(SHINGLE - len(points), np.uint32)])
    return _hashes(points)


def shingles(text: str) -> np.ndarray:
    """The set of a text's shingles, ascending, uint32 [n]."""
    return np.unique(_all_hashes(text))


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Jaccard similarity of two sets of shingles."""
    common = _common(a, b)
    return common / (len(a) + len(b) - common)


def sketch(text: str, out: np.ndarray) -> None:
    """Writes the text's sketch to `out` uint8 [BINS]."""
    _sketch(_all_hashes(text), _order(), out)
