"""Secrets stay out of the lineage: they are replaced by `***` before anything is written.

A secret is the value of an environment variable with a telling name (TOKEN, SECRET, PASSWORD, AUTH, CREDENTIAL,
API_KEY, ACCESS_KEY), the password in a URL (`s3://user:password@host`), or the value of a URL's signing parameter.
Every text of the journal, the keys, the manifests and the logs passes through here.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from typing import Any

HIDDEN = "***"
# Shorter values ("1", "true", "admin") are settings with such a name, and would hide half of a text.
SHORTEST = 8

_NAMES = re.compile(
    r"TOKEN(?!IZ)|SECRET|PASSW|CREDENTIAL|AUTH(?!OR)|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|CONNECTION_URL", re.I
)
_IN_URLS = re.compile(
    r"(?P<user>\b[a-z][a-z0-9+.-]*://[^\s:/@\"'\\]*:)[^\s@\"'\\]+(?=@)"
    r"|(?P<parameter>[?&](?:X-Amz-Signature|X-Amz-Credential|X-Amz-Security-Token|"
    r"sig|signature|token|access_token|api_key|key)=)"
    r"[^\s&\"'\\]+",
    re.I,
)


def scrubber() -> Callable[[str], str]:
    """A function that hides every secret of the current environment in plain text or JSON."""
    values = {value for name, value in os.environ.items() if len(value) >= SHORTEST and _NAMES.search(name)}
    # A path to a secret (AWS_WEB_IDENTITY_TOKEN_FILE) is not a secret.
    values = {value for value in values if not value.startswith("/")}
    forms = sorted(values | {json.dumps(value)[1:-1] for value in values}, key=len, reverse=True)
    known = re.compile("|".join(map(re.escape, forms))) if forms else None

    def scrub(text: str) -> str:
        if known is not None:
            text = known.sub(HIDDEN, text)
        return _IN_URLS.sub(lambda found: (found["user"] or found["parameter"]) + HIDDEN, text)

    return scrub


def scrub(text: str) -> str:
    """The text without the secrets of the current environment."""
    return scrubber()(text)


def scrubbed(value: Any) -> Any:
    """A JSON-ready value without the secrets of the current environment."""
    text = json.dumps(value, default=str)
    clean = scrub(text)
    return value if clean == text else json.loads(clean)
