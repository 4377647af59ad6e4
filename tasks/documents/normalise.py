"""One normalisation for everything that asks whether two texts are the same: exact duplicates, shingles, word n-grams,
and what is embedded. Texts are stored as they came.

    composed(text)      Unicode NFKC, without characters that no reader sees
    normalised(text)    composed, case folded, every run of white space one blank, none at the ends

NFKC rather than NFC: texts that were typed on one machine and extracted from a PDF on another differ in ligatures,
full-width forms, no-break spaces and presentation forms as often as in the order of accents, and read the same. What
NFKC folds too far (x² and x2) is no loss where texts are only compared. Both functions give canonically equivalent
texts (NFC and NFD twins) the same result, and change nothing when applied to it again.
Price: 20 to 100 MB/s; ASCII is not normalised.
"""

from __future__ import annotations

import re
import unicodedata

VERSION = "NFKC 1"
"""Of both functions: part of the keys of what is reused from earlier artifacts."""

# Soft hyphen, grapheme joiner, zero-width and bidirectional marks, word joiner and invisible operators, variation
# selectors, byte order mark.
INVISIBLE = re.compile("[\u00ad\u034f\u061c\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufe00-\ufe0f\ufeff]+")


def composed(text: str) -> str:
    """The text in NFKC without invisible characters: what is embedded. Case and white space stay, except that a
    no-break space becomes a blank."""
    if text.isascii():
        return text
    # Removing a character may bring two together that compose.
    return unicodedata.normalize("NFKC", INVISIBLE.sub("", text))


def normalised(text: str) -> str:
    """The text as it is compared with others."""
    folded = text.lower() if text.isascii() else composed(composed(text).casefold())
    return " ".join(folded.split())
