"""Passages: the share of a text's windows of 50 bytes that stand word for word in the training text.

    normalised       text in the form in which texts are compared (tasks/documents/normalise.py)
    window           every run of `window` bytes of a normalised text, at every byte; windows cross no text's border
    hash             sum over the window of R[byte] * B^-j mod 2^64: one running sum over the text gives all of them
    seen_share       windows of a scored text whose hash occurs in a trained text / windows of the scored text

Near-duplicates, quotations and boilerplate count in proportion to their length, wherever they begin; a changed word
costs the windows that hold it. A text shorter than a window has none, and its share is NaN.

Only the scored windows are kept: a sorted array of their hashes behind a table of one bit each, 32 bits a window, which
answers for nearly all trained windows. Price: one pass over the training text, in blocks, 13 (half of it not ASCII) to
30 MB (ASCII) per CPU second, at least half of it normalisation; 30 bytes of memory per byte of scored text. Two windows
share a hash by chance once in 10^19 pairs.

Word n-grams are hashed here, too (hash_words, hash_grams): words are runs of letters or digits of the normalised text,
and a Chinese, Japanese or Thai character is a word of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from eclectus.tasks.documents.normalise import normalised

WINDOW = 50
# Bytes hashed at once: the arrays of a block stay in the processor's cache.
BLOCK = 2**16
# Bytes of short texts that are joined before they are hashed, to pay NumPy's cost of a call once.
JOINED = 2**20
BITS_PER_WINDOW = 32
BASE = 0x9E3779B97F4A7C15
# In no UTF-8 text, so that no scored window crosses a border.
BORDER = b"\xff"
VALUES = np.random.default_rng(20240501).integers(0, 2**64, 256, np.uint64)
_WORD = re.compile(r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W_]+")
# Odd multipliers keep a rolling polynomial hash of 64 bits invertible in each word.
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def seen_share(scored: Sequence[str | bytes], trained: Iterable[str | bytes], window: int = WINDOW) -> np.ndarray:
    """Share of each scored text's windows that occur in any trained text [D], NaN for texts without a window.

    scored: D texts, or their UTF-8 bytes. trained: is read once. window: bytes.
    """
    passages = Passages(scored, window)
    for _ in passages.look(trained):
        pass
    return passages.share()


class Passages:
    """The windows of the scored texts, and which of them were seen."""

    def __init__(self, scored: Sequence[str | bytes], window: int = WINDOW) -> None:
        """Raises ValueError if window is under 1."""
        if window < 1:
            raise ValueError(f"window is {window}; a passage has at least 1 byte")
        self.window = window
        steps = np.full(BLOCK + window, BASE, np.uint64)
        steps[0] = 1
        self._up = np.multiply.accumulate(steps)
        steps[1:] = pow(BASE, -1, 2**64)
        self._down = np.multiply.accumulate(steps)
        hashes = [np.concatenate([np.zeros(0, np.uint64), *self._hashes(_bytes(text))]) for text in scored]
        self.counts = np.array([len(each) for each in hashes], np.int64)
        every = np.concatenate([np.zeros(0, np.uint64), *hashes])
        self._known, self._which = np.unique(every, return_inverse=True)
        self._hit = np.zeros(len(self._known), bool)
        self._shift = np.uint64(64 - max(16, (BITS_PER_WINDOW * len(self._known)).bit_length()))
        places = self._known >> self._shift
        self._bits = np.zeros(2 ** (61 - int(self._shift)), np.uint8)
        np.bitwise_or.at(self._bits, places >> np.uint64(3), np.uint8(1) << (places & np.uint64(7)).astype(np.uint8))

    def look(self, trained: Iterable[str | bytes]) -> Iterator[int]:
        """Marks the windows that occur in these texts; yields the number of texts read so far, now and then."""
        for read, joined in _joined(trained):
            for hashes in self._hashes(joined):
                at = hashes >> self._shift
                bits = self._bits[(at >> np.uint64(3)).view(np.int64)] >> (at.astype(np.uint8) & np.uint8(7))
                likely = np.sort(hashes[np.flatnonzero(bits & np.uint8(1))])
                if len(likely):
                    found = np.minimum(np.searchsorted(self._known, likely), len(self._known) - 1)
                    self._hit[found[self._known[found] == likely]] = True
            yield read

    def share(self) -> np.ndarray:
        """Share of each scored text's windows that were seen so far [D], NaN for texts without a window."""
        owner = np.repeat(np.arange(len(self.counts)), self.counts)
        seen = np.bincount(owner, self._hit[self._which], len(self.counts))
        with np.errstate(invalid="ignore"):
            return seen / self.counts

    def _hashes(self, text: bytes) -> Iterator[np.ndarray]:
        """The hash of every window, in blocks: uint64 [up to BLOCK]."""
        numbers = np.frombuffer(text, np.uint8)
        sums = np.zeros(BLOCK + self.window, np.uint64)
        for first in range(0, len(numbers) - self.window + 1, BLOCK):
            block = numbers[first : first + BLOCK + self.window - 1]
            values = VALUES[block]
            values *= self._down[: len(block)]
            np.cumsum(values, out=sums[1 : len(block) + 1])
            hashes = sums[self.window : len(block) + 1] - sums[: len(block) + 1 - self.window]
            hashes *= self._up[: len(hashes)]
            yield hashes


def _joined(texts: Iterable[str | bytes]) -> Iterator[tuple[int, bytes]]:
    """(texts so far, normalised texts joined at their borders), of about JOINED bytes."""
    parts: list[bytes] = []
    size = read = 0
    for text in texts:
        parts.append(_bytes(text))
        size += len(parts[-1])
        read += 1
        if size >= JOINED:
            yield read, BORDER.join(parts)
            parts, size = [], 0
    if parts:
        yield read, BORDER.join(parts)


def _bytes(text: str | bytes) -> bytes:
    plain = text if isinstance(text, str) else text.decode("utf-8", "replace")
    # A lone surrogate has no bytes.
    return normalised(plain).encode("utf-8", "replace")


def hash_words(text: str) -> np.ndarray:
    """A 64-bit hash of each word [W]."""
    from pandas.util import hash_array

    words = _WORD.findall(normalised(text))
    if not words:
        return np.zeros(0, np.uint64)
    return hash_array(np.array(words, object), categorize=False)


def hash_grams(words: np.ndarray, length: int) -> np.ndarray:
    """A 64-bit hash of every n-gram of `length` words [W - length + 1]."""
    if len(words) < length or not length:
        return np.zeros(0, np.uint64)
    total = np.zeros(len(words) - length + 1, np.uint64)
    with np.errstate(over="ignore"):
        for at in range(length):
            total = total * MULTIPLIER + words[at : len(words) - length + 1 + at]
            total ^= total >> np.uint64(29)
    return total
