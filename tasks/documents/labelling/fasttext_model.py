"""Language identification models of fastText that a user brings (`.bin`, `.ftz`; GlotLID, OpenLID, lid.176).

fastText reads such a file without checks: one that is cut, or is something else, ends the process or takes all memory.
So every size in it is compared with the file's length before it is loaded, and every number that is used as an index.
Nothing is unpickled. Format, little endian (fastText 0.9.2, version 12; FastText::saveModel):

    magic, version int32; 12 settings int32, 1 float64
    dictionary: entries, words, labels int32; tokens, pruned int64; each entry: name, 0, count int64, type int8;
                each pruned n-gram: 2 x int32
    matrices of words and of labels: quantised bool, then rows, columns int64 and float32 [rows, columns], or
                norms bool, rows, columns int64, codes int32 and uint8 [codes], quantiser, and uint8 [rows] and a
                quantiser of the norms; a quantiser: 4 sizes int32, float32 [dimension, 256]

Price: a second for a million entries; fastText holds the whole file in the memory of each process.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Callable
from typing import Any

from eclectus.storage.errors import EclectusError
from eclectus.tasks.allowed_paths import hash_allowed, open_allowed

MAGIC, NEWEST_VERSION = 793712314, 12
SUPERVISED = 3
LOSSES = (1, 2, 3, 4)
LABEL = "__label__"
# Counts of labels make a tree, in which 1e15 stands for "none".
MOST_COUNT = 10**15
LARGEST = 10**5
WHAT = "setting 'language_model'"


def model_digest(path: str) -> str:
    """Hex SHA-256 of a model's file. Raises EclectusError if it cannot be read."""
    try:
        return hash_allowed(path, WHAT)
    except OSError as error:
        raise EclectusError(f"language_model '{path}' cannot be read ({error.strerror}); check the path") from error


def check_model(path: str) -> list[str]:
    """The labels of a model, without `__label__`. Raises EclectusError for a file that fastText should not load."""
    try:
        with open_allowed(path, WHAT) as file:
            return _checked(file.fileno(), path)
    except OSError as error:
        raise EclectusError(f"language_model '{path}' cannot be read ({error.strerror}); check the path") from error


Predict = Callable[[str, int], list[tuple[float, str]]]
"""`predict(line, k)`: the most probable labels of a text without line ends, as (probability, label)."""


def load_model(path: str, digest: str) -> Predict:
    """The model of a user. digest: its hex SHA-256.

    Raises EclectusError for a file that is damaged, or whose SHA-256 is another one.
    """
    if model_digest(path) != digest:
        raise EclectusError(f"language_model '{path}' changed while it was used; run again when it is written")
    with open_allowed(path, WHAT) as file:
        _checked(file.fileno(), path)
        # The file that was checked, even if another one has its name by now.
        opened = f"/proc/self/fd/{file.fileno()}"
        try:
            return load_unchecked(opened if os.path.exists(opened) else path)
        except (RuntimeError, ValueError, MemoryError) as error:
            raise EclectusError(f"language_model '{path}' cannot be loaded by fastText: {error}") from error


def load_unchecked(path: str) -> Predict:
    """A model of this installation."""
    import fasttext

    model: Any = fasttext.load_model(path).f

    def predict(line: str, k: int) -> list[tuple[float, str]]:
        try:
            found: list[tuple[float, str]] = model.predict(line + "\n", k, 0.0, "strict")
        except RuntimeError as error:
            raise EclectusError(f"the language model cannot classify a text: {error}") from error
        return found

    return predict


def _checked(file: int, path: str) -> list[str]:
    size = os.fstat(file).st_size
    if not size:
        raise EclectusError(_wrong(path, "it is empty"))
    with mmap.mmap(file, 0, access=mmap.ACCESS_READ) as content:
        reader = _Reader(content, path)
        labels = reader.model()
        if reader.at != size:
            raise EclectusError(_wrong(path, f"it has {size:,} bytes, but its sizes make {reader.at:,}"))
        return labels


def _wrong(path: str, why: str) -> str:
    return (
        f"language_model '{path}' is no whole fastText model: {why}; expected a .bin or .ftz file for language "
        "identification, as it was downloaded"
    )


class _Reader:
    """Goes over the sizes and indices of a model. at: the next byte."""

    def __init__(self, content: mmap.mmap, path: str) -> None:
        self._content = content
        self._path = path
        self.at = 0

    def model(self) -> list[str]:
        magic, version = self._take("ii")
        self._expect(magic == MAGIC, "it does not begin as one")
        self._expect(version in (11, NEWEST_VERSION), f"its version is {version}, expected {NEWEST_VERSION}")
        dimension, _, _, _, _, word_ngrams, loss, kind, bucket, shortest, longest, _, _ = self._take("12id")
        self._expect(kind == SUPERVISED, "it holds word vectors and classifies nothing")
        self._expect(loss in LOSSES and 0 < dimension <= LARGEST, "its settings are out of range")
        self._expect(
            0 <= shortest <= LARGEST and 0 <= longest <= LARGEST and 1 <= word_ngrams <= LARGEST and bucket >= 0,
            "its settings are out of range",
        )
        self._expect(bucket > 0 or (longest == 0 and word_ngrams == 1), "it has n-grams, but no rows for them")
        words, labels, pruned = self._dictionary()
        rows = words + (bucket if pruned < 0 else pruned)
        quantised = self._flag()
        self._expect(quantised or pruned < 0, "it is pruned, but not quantised")
        self._matrix(quantised, rows, dimension)
        self._matrix(self._flag() and quantised, len(labels), dimension)
        return labels

    def _dictionary(self) -> tuple[int, list[str], int]:
        """Words, labels, and n-grams that were kept when others were pruned (-1: all)."""
        entries, words, count, _, pruned = self._take("3i2q")
        self._expect(entries == words + count and words >= 0 and count > 0, "its numbers of words and labels disagree")
        self._expect(-1 <= pruned <= 2**31, "its settings are out of range")
        labels, last = list[str](), MOST_COUNT
        for entry in range(entries):
            end = self._content.find(b"\0", self.at)
            self._expect(end >= 0, "it ends in its dictionary")
            name = self._content[self.at : end]
            self.at = end + 1
            occurrences, kind = self._take("qb")
            self._expect(kind == (entry >= words), "its words and labels are out of order")
            if entry >= words:
                self._expect(name.startswith(LABEL.encode()), f"its label {name[:40]!r} does not begin with {LABEL}")
                self._expect(0 <= occurrences <= last, "its labels are out of order")
                labels.append(name.decode("utf-8", "replace").removeprefix(LABEL))
                last = min(occurrences, MOST_COUNT - 1)
        for _ in range(max(0, pruned)):
            _, row = self._take("2i")
            self._expect(0 <= row < pruned, "its n-grams lead to rows that it does not have")
        return words, labels, pruned

    def _matrix(self, quantised: bool, rows: int, columns: int) -> None:
        if not quantised:
            self._expect(self._take("2q") == (rows, columns), "its matrices are of another size than it says")
            self._skip(4 * rows * columns)
            return
        with_norms = self._flag()
        found_rows, found_columns, codes = self._take("2qi")
        self._expect((found_rows, found_columns) == (rows, columns), "its matrices are of another size than it says")
        self._skip(codes)
        self._expect(codes == rows * self._quantiser(columns), "its codes are of another size than it says")
        if with_norms:
            self._skip(rows)
            self._quantiser(1)

    def _quantiser(self, dimension: int) -> int:
        """The codes per row."""
        found, parts, width, last = self._take("4i")
        right = found == dimension and 0 < width <= dimension and parts == math.ceil(dimension / width)
        self._expect(right and last == (dimension % width or width), "its quantiser is of another size than it says")
        self._skip(4 * dimension * 256)
        return parts

    def _flag(self) -> bool:
        (value,) = self._take("B")
        self._expect(value in (0, 1), "its settings are out of range")
        return bool(value)

    def _take(self, layout: str) -> tuple[Any, ...]:
        begin = self.at
        self._skip(struct.calcsize("<" + layout))
        return struct.unpack_from("<" + layout, self._content, begin)

    def _skip(self, size: int) -> None:
        self._expect(size >= 0 and self.at + size <= len(self._content), "it is cut, or its sizes are wrong")
        self.at += size

    def _expect(self, right: bool, why: str) -> None:
        if not right:
            raise EclectusError(_wrong(self._path, why))
