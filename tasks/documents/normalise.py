"""One normalisation for everything that asks whether two texts are the same: exact duplicates, shingles, word n-grams,
and what is embedded. Texts are stored as they came.

    composed(text)      Unicode NFKC, without characters that no reader sees
    normalised(text)    composed, case folded, every run of white space one blank, none at the ends

NFKC rather than NFC: texts that were typed on one machine and extracted from a PDF on another differ in ligatures,
full-width forms, no-break spaces and presentation forms as often as in the order of accents, and read the same. What
NFKC folds too far (x² and x2) is no loss where texts are only compared. Both functions give canonically equivalent
texts (NFC and NFD twins) the same result, and change nothing when applied to it again. Labels (language, domain,
source, work, name) are read by `label_of`.
Price: 20 to 100 MB/s; ASCII is not normalised.
"""

from __future__ import annotations

import datetime
import decimal
import math
import re
import unicodedata
import uuid
from typing import Any

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


def label_of(value: Any, numbers: bool = True) -> str | None:
    """A record's label as text in NFC, or None where there is none: null, empty, only white space.

    Text stays as it is otherwise, numbers and dates are written without loss, and binary ids as UUID or hexadecimal.
    Raises ValueError, with the reason, for what is no label: NaN, infinity, truth values, lists, objects; numbers
    where `numbers` is false.
    """
    text = id_of(value, numbers)
    return None if text is None else unicodedata.normalize("NFC", text)


def id_of(value: Any, numbers: bool = True) -> str | None:
    """As `label_of`, but kept as it is written: ids that differ are different ids."""
    if value is None:
        return None
    if isinstance(value, bytes):
        value = _text_of_bytes(value)
    if isinstance(value, str):
        return value.strip().encode("utf-8", "replace").decode() or None
    if isinstance(value, uuid.UUID):
        return str(value)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, bool) or not isinstance(value, int | float | decimal.Decimal):
        kinds = {bool: "a truth value", list: "a list", dict: "an object"}
        raise ValueError(kinds.get(type(value), f"a {type(value).__name__}"))
    if not math.isfinite(value):
        raise ValueError("not a finite number")
    if not numbers:
        raise ValueError("a number")
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) >= 2**53 else str(value)
    return format(value, "f") if isinstance(value, decimal.Decimal) else str(value)


def _text_of_bytes(value: bytes) -> str:
    """Text if it is UTF-8 without control characters, a UUID if it has 16 bytes, else hexadecimal digits."""
    try:
        text = value.decode()
    except UnicodeDecodeError:
        text = "\0"
    if all(each.isprintable() or each.isspace() for each in text):
        return text
    return str(uuid.UUID(bytes=value)) if len(value) == 16 else value.hex()
