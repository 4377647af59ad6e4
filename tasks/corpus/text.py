"""Documents of natural size: cutting long texts at paragraph borders, dropping repeats, keeping to a byte budget.

Price: linear in the text. A repeat is a document more than half of whose word 8-grams stand in earlier documents
(licence families, plays that quote each other): such a pair, one in training and one held out, would flatter every
model.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from eclectus.tasks.documents.normalise import normalised

SHINGLE_WORDS = 8
SHINGLE_STEP = 2
SENTENCE_END = re.compile(r"(?<=[.!?;:。！？；])\s+")
WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Document:
    """One line of the corpus. id is stable: it names the position in the source, not the text.

    work: of which the document is a piece: a play, a speech, a licence, a module; where it names neighbouring messages,
    the source file that they come from.
    """

    id: str
    work: str
    text: str
    language: str
    domain: str
    source: str

    @property
    def bytes(self) -> int:
        return len(self.text.encode())


def cut(text: str, maximum: int) -> list[str]:
    """Pieces of about equal length, each at most `maximum` characters, cut between paragraphs where that is possible.

    A paragraph longer than `maximum` is cut between sentences, and a sentence longer than that between words.
    """
    target = math.ceil(len(text) / math.ceil(len(text) / maximum)) if text else maximum
    pieces: list[str] = []
    piece = ""
    for part, joint in _parts(text, maximum):
        grown = piece + joint + part if piece else part
        if piece and (len(grown) > maximum or len(piece) >= target):
            pieces.append(piece)
            piece = part
        else:
            piece = grown
    return [*pieces, piece] if piece else pieces


def _parts(text: str, maximum: int) -> Iterator[tuple[str, str]]:
    """The smallest units that `cut` keeps whole, each with the separator before it."""
    for paragraph in re.split(r"\n\s*\n", text):
        if len(paragraph) <= maximum:
            if paragraph.strip():
                yield paragraph.rstrip(), "\n\n"
            continue
        joint = "\n\n"
        for sentence in SENTENCE_END.split(paragraph):
            while len(sentence) > maximum:
                end = sentence.rfind(" ", 0, maximum)
                end = end if end > 0 else maximum
                yield sentence[:end], joint
                sentence, joint = sentence[end:].lstrip(), " "
            yield sentence, joint
            joint = " "


def merge_short(pieces: Iterable[str], minimum: int, joint: str = "\n\n") -> list[str]:
    """Joins a piece shorter than `minimum` characters to the previous one (the first, to the next)."""
    merged: list[str] = []
    for piece in pieces:
        if merged and (len(piece) < minimum or len(merged[-1]) < minimum):
            merged[-1] += joint + piece
        else:
            merged.append(piece)
    return merged


def without_repeats(documents: Iterable[Document], share: float) -> list[Document]:
    """Drops documents whose text, or more than `share` of whose word 8-grams, stands in documents kept earlier."""
    seen: set[int] = set()
    texts: set[str] = set()
    kept = []
    for document in documents:
        text = normalised(document.text)
        if text in texts:
            continue
        words = WORD.findall(text)
        starts = range(max(1, len(words) - SHINGLE_WORDS + 1))
        shingles = [hash(tuple(words[start : start + SHINGLE_WORDS])) for start in starts]
        # Every second shingle is looked up, all are stored: the same answer at half the price.
        probe = shingles[::SHINGLE_STEP]
        if sum(shingle in seen for shingle in probe) > share * len(probe):
            continue
        seen.update(shingles)
        texts.add(text)
        kept.append(document)
    return kept


def within_budget(documents: list[Document], budget: int) -> list[Document]:
    """A sample of at most `budget` bytes spread over the whole list, in the list's order, the same on every machine."""
    chosen: set[str] = set()
    room = budget
    for document in sorted(documents, key=lambda document: hashlib.sha256(document.id.encode()).digest()):
        if document.bytes <= room:
            chosen.add(document.id)
            room -= document.bytes
    return [document for document in documents if document.id in chosen]
