"""Files of fastText models (format: tasks/documents/labelling/fasttext_model.py), written from words of each label."""

from __future__ import annotations

import struct

import numpy as np

MAGIC, SOFTMAX, SUPERVISED = 793712314, 3, 3
WORDS = {
    "ell_Grek": "το ποτάμι διασχίζει την παλιά πόλη και την άνοιξη τα λιβάδια",
    "eng_Latn": "the river runs through old town and in spring meadows on both sides are",
    "yue_Hant": "呢條 河 穿過 舊城",
    "xyz": "qwx zzq vvk",
}


def written(words=None, prefix="__label__"):
    """A model that gives a label the share of its words in a line. words: label -> its words, separated by blanks."""
    words = WORDS if words is None else words
    vocabulary = [(each, number) for number, text in enumerate(words.values()) for each in text.split()]
    labels = len(words)
    head = struct.pack("<2i", MAGIC, 12)
    # Dimension, window, epochs, least count, negatives, word n-grams, loss, kind, buckets, n-grams of 0 to 0, rate, t.
    head += struct.pack("<12id", labels, 5, 5, 1, 5, 1, SOFTMAX, SUPERVISED, 0, 0, 0, 100, 1e-4)
    entries = [(word, 0) for word, _ in vocabulary] + [(prefix + label, 1) for label in words]
    dictionary = struct.pack("<3i2q", len(entries), len(vocabulary), labels, len(vocabulary), -1)
    for name, kind in entries:
        dictionary += name.encode() + b"\0" + struct.pack("<qb", 10, kind)
    inputs = np.zeros((len(vocabulary), labels), np.float32)
    inputs[np.arange(len(vocabulary)), [number for _, number in vocabulary]] = 10
    return head + dictionary + matrix(inputs) + matrix(np.eye(labels, dtype=np.float32))


def matrix(values):
    return struct.pack("<B2q", 0, *values.shape) + values.astype("<f4").tobytes()
