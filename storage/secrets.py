"""Secrets stay out of the lineage: they are replaced by `***` before anything is written.

A secret is the value of an environment variable with a telling name (TOKEN, SECRET, PASSWORD, AUTH, CREDENTIAL, names
that end in _KEY), also as URLs and JSON write it; the password in a URL (`s3://user:password@host`), or a URL's signing
parameter; what follows `secret=`, `AccountKey=` or `"password":`; what has the form of a token (hf_..., ghp_...).
Every text of the journal, the keys, the manifests and the logs passes through here.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import quote, quote_plus

HIDDEN = "***"
# Shorter values ("1", "true", "admin") are settings with such a name, and would hide half of a text.
SHORTEST = 8
# As the user of an object store, say; it stands in paths and addresses everywhere.
OURS = "eclectus"

_NAMES = re.compile(
    r"TOKEN(?!IZ)|SECRET|PASSW|PASSPHRASE|CREDENTIAL|AUTH(?!OR)|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|_KEY$|_PWD?$|"
    r"CONNECTION_(URL|STRING)",
    re.I,
)
# A path to a secret (AWS_WEB_IDENTITY_TOKEN_FILE) is not a secret.
_PATHS = re.compile(r"(FILE|PATH|DIR|SOCK|APPLICATION_CREDENTIALS)$", re.I)
_VALUE = r"[^\s&;,\"'\\]+"
# Everywhere, and only behind ?, & or ; of a URL or a list of options.
_ALWAYS = (
    r"(?:[\w-]{0,30}(?:secret|password|passwd|passphrase)(?:[_-]?(?:access)?[_-]?key)?|pwd|[\w-]{0,30}access[_-]?key(?:[_-]?id)?|"
    r"(?:account|shared[_-]?access)[_-]?(?:key|signature)|api[_-]?key|client[_-]?secret|"
    r"(?:access|session|security|refresh)[_-]?token)"
)
_IN_QUERIES = (
    r"(?:x-(?:amz|goog)-(?:signature|credential|security-token)|awsaccesskeyid|sig|signature|token|key|auth|sas|pwd)"
)
# A text without one of the needles, in lower case, is not searched: a journal has thousands of lines a second.
_HIDDEN: list[tuple[tuple[str, ...], str, str]] = [
    # user:password@ of a URL, to the last @: passwords may hold one, or a slash. Then a token as the user.
    (("://",), r"\b[a-z][a-z0-9+.-]{0,20}://[^\s:/@\"'\\]*:", r"(?:(?!://)[^\s\"'\\])+(?=@)"),
    (("://",), r"\b[a-z][a-z0-9+.-]{0,20}://", r"[\w.~%+-]{20,}(?=@)"),
    (("=",), rf"[?&;#]\s*{_IN_QUERIES}=", _VALUE),
    (("=",), r"(?<![\w-])key=", rf"{_VALUE}(?=[;&,]\s*secret=)"),
    (("=",), rf"(?<![\w-]){_ALWAYS}=", _VALUE),
    (
        ("secret", "passw", "passphrase", "key", "token"),
        rf"\\?[\"']{_ALWAYS}\\?[\"']\s*:\s*\\?[\"']",
        r"[^\"'\\]+",
    ),
    (
        ("uthorization",),
        r"authorization\\?[\"']?\s*[:=]\s*\\?[\"']?(?:bearer|basic|token)?\s*",
        r"[\w.~+/=-]{8,}",
    ),
    (
        ("hf_", "gh", "glpat", "sk-", "akia", "asia", "xox", "eyj"),
        r"(?<![A-Za-z0-9])",
        r"(?-i:hf_[A-Za-z0-9]{16,}|(?:gh[pousr]|github_pat)_\w{16,}|glpat-[\w-]{16,}|sk-[\w-]{20,}|"
        r"(?:AKIA|ASIA)[A-Z0-9]{16}|xox[abprs]-[\w-]{10,}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*)(?![A-Za-z0-9])",
    ),
]
_IN_TEXTS = [(needles, re.compile(f"({before}){secret}", re.I)) for needles, before, secret in _HIDDEN]


def scrubber() -> Callable[[str], str]:
    """A function that hides every secret of the current environment in plain text or JSON."""
    values = {value for name, value in os.environ.items() if len(value) >= SHORTEST and _is_secret(name, value)}
    forms = sorted({form for value in values for form in _forms(value)}, key=len, reverse=True)
    known = re.compile("|".join(map(re.escape, forms))) if forms else None

    def scrub(text: str) -> str:
        if known is not None:
            text = known.sub(HIDDEN, text)
        lower = text.lower()
        for needles, pattern in _IN_TEXTS:
            if any(needle in lower for needle in needles):
                text = pattern.sub(rf"\g<1>{HIDDEN}", text)
        return text

    return scrub


def scrub(text: str) -> str:
    """The text without the secrets of the current environment."""
    return scrubber()(text)


def scrubbed(value: Any) -> Any:
    """A JSON-ready value without the secrets of the current environment."""
    text = json.dumps(value, default=str)
    clean = scrub(text)
    return value if clean == text else json.loads(clean)


def _is_secret(name: str, value: str) -> bool:
    if value.lower() == OURS:
        return False
    return bool(_NAMES.search(name)) and not (value.startswith("/") and (_PATHS.search(name) or os.path.exists(value)))


def _forms(value: str) -> list[str]:
    """As texts, JSON and URLs write it."""
    as_json = [json.dumps(value, ensure_ascii=ascii_only)[1:-1] for ascii_only in (True, False)]
    return [value, *as_json, quote(value, safe=""), quote_plus(value)]
