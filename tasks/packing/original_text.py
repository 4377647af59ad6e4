"""What the texts of the original languages hold: their pairs of neighbouring tokens, and their letters.

A new merge may join two tokens of the base only where that changes no original text (docs/methods.md 2.8):

    corpus      the pair stands in no document of an original language, held-out ones included
    letters     and it holds a letter that the original languages do not use, with another one beside it. So text of
                these languages that is not in the corpus keeps its tokens too, as far as it quotes no foreign words

The letters of the original languages are those of their scripts (a script is theirs from a share of SCRIPT of all
letters on) that are at least LETTER of all letters, and every letter of Latin-1: names carry those everywhere.

The documents are read part by part, over as many workers as there are; what was read is kept for the next run. Price:
tokenising the original languages, twice (the second time to compare).
"""

from __future__ import annotations

import functools
import hashlib
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from eclectus.storage.artifact import Artifact
from eclectus.tasks.documents.digest_set import distinct, positions_of
from eclectus.tasks.documents.table import labels_of, parts
from eclectus.tasks.over_parts import Done, Part, key_of, over_parts
from eclectus.tasks.packing.document_tokens import SECONDS_PER_BYTE, encoder_of, groups_and_training, texts_of
from eclectus.tasks.training.without_torch import without_torch

ORIGINAL = "original"
SCRIPT, LETTER = 5e-3, 1e-5
PAIRS_AT_ONCE = 2**24
COMMON_SYMBOLS = range(0x2000, 0x2900)
"""Punctuation, arrows, mathematical signs and boxes, which stand in texts of any language."""
Merges = Literal["letters", "corpus"]
IN_TEXT, NO_LETTER = "stands in an original text", "no letter of its own"


@functools.lru_cache(maxsize=1)
def _bytes() -> dict[str, int]:
    table: dict[str, int] = without_torch("checkpoints/byte_level.py").byte_alphabet()
    return table


@dataclass(frozen=True)
class Originals:
    """documents: of the original languages. pairs: those of the candidates that stand in them. letters: counts."""

    documents: int = 0
    pairs: frozenset[tuple[str, str]] = frozenset()
    letters: dict[str, int] = field(default_factory=dict)
    merges: Merges = "letters"

    def refused(self, left: str, right: str) -> str | None:
        """Why two tokens of the base must not be merged, None if they may. left, right: in byte-level letters."""
        if (left, right) in self.pairs:
            return IN_TEXT
        if self.merges == "corpus" or self._is_foreign(_as_bytes(left), _as_bytes(right)):
            return None
        return NO_LETTER

    def _is_foreign(self, left: bytes, right: bytes) -> bool:
        """Whether the pair holds a foreign letter and another letter, or joins the bytes of a foreign letter."""
        pieces = list(_characters(left + right))
        letters = [each for each in pieces if len(each) == 1 and is_letter(each)]
        foreign = any(self.is_foreign_letter(each) for each in letters)
        partial = any(each and len(each) > 1 and self._all_foreign(each) for each in pieces)
        inside = any(len(each) > 1 for each in [*_characters(left), *_characters(right)])
        return (foreign and (len(letters) > 1 or inside)) or (partial and len(left + right) > 1)

    def is_foreign_letter(self, letter: str) -> bool:
        """Whether the original languages do not use a letter."""
        if ord(letter) < 0x100:
            return False
        return script_of(letter) not in self._scripts or self.letters.get(letter, 0) < LETTER * self._total

    def _all_foreign(self, candidates: str) -> bool:
        """Whether none of the characters that incomplete bytes may belong to is common, or a letter of ours."""
        return not any(
            ord(each) in COMMON_SYMBOLS or (is_letter(each) and not self.is_foreign_letter(each)) for each in candidates
        )

    @functools.cached_property
    def _total(self) -> int:
        return sum(self.letters.values())

    @functools.cached_property
    def _scripts(self) -> frozenset[str]:
        counts: dict[str, int] = {}
        for letter, count in self.letters.items():
            counts[script_of(letter)] = counts.get(script_of(letter), 0) + count
        return frozenset(name for name, count in counts.items() if count >= SCRIPT * self._total)


def is_letter(character: str) -> bool:
    """Whether it is a letter, or a sign that belongs to letters, such as a vowel of Devanagari."""
    return unicodedata.category(character)[0] in "LM"


def script_of(letter: str) -> str:
    """The first word of its Unicode name: LATIN, GREEK, CJK, ..."""
    return unicodedata.name(letter, "?").partition(" ")[0]


def _as_bytes(token: str) -> bytes:
    table = _bytes()
    return bytes(table[each] for each in token if each in table)


def _characters(data: bytes) -> Iterator[str]:
    """The characters in UTF-8 bytes; for incomplete bytes the string of all characters that they may be part of."""
    place = 0
    while place < len(data):
        lead = data[place]
        size = 1 if lead < 0x80 else 0 if lead < 0xC2 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
        if size == 0:
            end = place + 1
            while end < len(data) and 0x80 <= data[end] < 0xC0:
                end += 1
            yield _with_tail(data[place:end])
            place = end
            continue
        piece = data[place : place + size]
        place += size
        try:
            yield piece.decode()
        except UnicodeDecodeError:
            yield _with_lead(piece, size)


def _with_lead(piece: bytes, size: int) -> str:
    """All characters whose encoding begins with these bytes. size: of the encoding."""
    number = piece[0] & (0xFF >> (size + 1))
    for each in piece[1:]:
        number = number << 6 | (each & 0x3F)
    missing = 6 * (size - len(piece))
    least = 0x80 if size == 2 else 0x800
    return _assigned(range(max(least, number << missing), (number + 1) << missing)) if size < 4 else ""


def _with_tail(piece: bytes) -> str:
    """All characters of three bytes whose encoding ends with these two; with one, too many to tell."""
    if len(piece) != 2:
        return ""
    low = (piece[0] & 0x3F) << 6 | (piece[1] & 0x3F)
    return _assigned(range(low if low >= 0x800 else low + 0x1000, 0x10000, 0x1000))


def _assigned(points: range) -> str:
    """These characters, with a sign in front so that the result is never taken for a whole character."""
    named = [chr(each) for each in points if unicodedata.category(chr(each)) not in ("Cn", "Cs")]
    return "\0" + "".join(named) if named else ""


def read_originals(
    documents: Artifact,
    tokenizer: Artifact,
    candidates: Sequence[tuple[str, str]],
    vocabulary: dict[str, int],
    merges: Merges,
    workers: int,
) -> Originals:
    """What the documents of the original languages hold. candidates: pairs to look for. vocabulary: ids by token."""
    codes = np.array([vocabulary[left] << 32 | vocabulary[right] for left, right in candidates], np.int64)
    there, letters, count = np.zeros(len(codes), bool), np.zeros(0x110000, np.int64), 0
    digests, arguments = [tokenizer.digest], {"tokenizer": Path(tokenizer.path)}
    for part in _over_originals(original_pairs, "pairs of originals 1", documents, digests, workers, arguments):
        there |= positions_of(codes, np.load(part.file("pairs.npy")), ascending=True) >= 0
        points, counts = np.load(part.file("letters.npy"))
        letters[points] += counts
        count += part.about["documents"]
    known = {chr(point): int(letters[point]) for point in np.flatnonzero(letters) if is_letter(chr(point))}
    found = frozenset(pair for pair, seen in zip(candidates, there.tolist(), strict=True) if seen)
    return Originals(count, found, known, merges)


def changed_by(
    documents: Artifact, tokenizer: Artifact, extended: Done, key: str, workers: int
) -> tuple[int, set[int]]:
    """(original documents whose tokens an extended tokenizer changes, the new ids in them). key: of `extended`."""
    found: set[int] = set()
    changed = 0
    arguments = {"before": Path(tokenizer.path), "after": extended.folder}
    for part in _over_originals(
        compare_encodings, "changed originals 1", documents, [tokenizer.digest, key], workers, arguments
    ):
        changed += part.about["changed"]
        found.update(part.about["new"])
    return changed, found


def _over_originals(
    function: Any, purpose: str, documents: Artifact, digests: list[str], workers: int, arguments: dict[str, Any]
) -> list[Done]:
    wanted, size, sources = [], 0, documents.digests()
    for path in parts(documents):
        chosen = _chosen(path)
        if not chosen.any():
            continue
        rows = hashlib.sha256(np.packbits(chosen).tobytes()).hexdigest()
        key = key_of(purpose, sources[f"documents/{path.name}"], len(chosen), rows, *digests)
        here = {"path": path, "labels": labels_of(path), **arguments}
        wanted.append(Part(key, here, int(chosen.sum()), f"the original documents of {path.name}"))
        size += path.stat().st_size
    seconds = 3 * SECONDS_PER_BYTE * size / max(1, sum(int(part.size) for part in wanted))
    return over_parts(function, wanted, "reading original text", "documents", seconds, workers)


def _chosen(path: Path) -> np.ndarray:
    """Which documents of a part are of an original language, held-out ones and copies included."""
    groups, names, _ = groups_and_training(path)
    return groups == names.index(ORIGINAL) if ORIGINAL in names else np.zeros(len(groups), bool)


def original_pairs(out: Path, path: Path, labels: Path | None, tokenizer: Path) -> dict[str, Any]:
    """Writes the pairs of neighbouring tokens in the original documents of a part, and counts of their characters.

    labels: of the part, which must be here when it is read.
    """
    encode, chosen = encoder_of(tokenizer), _chosen(path)
    pairs, held = [np.empty(0, np.int64)], 0
    letters = np.zeros(0x110000, np.int64)
    for texts in texts_of(path, chosen):
        ids, sizes, _ = encode.flat(texts, np.dtype(np.uint32))
        owner = np.repeat(np.arange(len(sizes)), sizes)
        codes = ids[:-1].astype(np.int64) << 32 | ids[1:]
        pairs.append(distinct(codes[owner[1:] == owner[:-1]]))
        held += len(pairs[-1])
        if held > PAIRS_AT_ONCE:
            pairs = [distinct(np.concatenate(pairs))]
            held = len(pairs[0]) // 2
        points = np.frombuffer("".join(texts).encode("utf-32-le", "replace"), np.uint32)
        letters += np.bincount(points, minlength=len(letters))
    np.save(out / "pairs.npy", distinct(np.concatenate(pairs)))
    seen = np.flatnonzero(letters)
    np.save(out / "letters.npy", np.stack([seen, letters[seen]]))
    return {"documents": int(chosen.sum())}


def compare_encodings(out: Path, path: Path, labels: Path | None, before: Path, after: Path) -> dict[str, Any]:
    """Counts the original documents of a part that two tokenizers encode differently, with the ids that are new."""
    old, new = encoder_of(before), encoder_of(after)
    changed, found = 0, set[int]()
    for texts in texts_of(path, _chosen(path)):
        for was, now in zip(old(texts), new(texts), strict=True):
            if was != now:
                changed += 1
                found.update(set(now) - set(was))
    return {"changed": changed, "new": sorted(found)}
