"""Word n-grams as 64-bit hashes: of texts [W] and of their n-grams [W - n + 1].

Words are runs of letters or digits of the normalised text (tasks/documents/normalise.py); a Chinese, Japanese or Thai
character is a word of its own.
"""

from __future__ import annotations

import re

import numpy as np

from eclectus.tasks.documents.normalise import normalised

_WORD = re.compile(r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W_]+")
# Odd multipliers keep a rolling polynomial hash of 64 bits invertible in each word.
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


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
