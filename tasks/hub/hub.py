"""Talking to a model hub: names, the token, and errors as sentences."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from eclectus.storage.errors import EclectusError
from eclectus.storage.secrets import scrub

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

T = TypeVar("T")
HUB = "https://huggingface.co"
# What Eclectus adds to a repository, below this folder.
OURS = "eclectus"
MANIFEST_THERE = f"{OURS}/manifest.json"
DIGESTS_THERE = f"{OURS}/SHA256SUMS"
BUNDLE_THERE = f"{OURS}/lineage.duckdb"
TRIES = 4
FIRST_WAIT = 5.0
LONGEST_WAIT = 120.0
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def endpoint() -> str:
    """The hub's address: HF_ENDPOINT, or the public one."""
    return (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")


def api() -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(endpoint=endpoint())


def check_repository(name: str) -> None:
    """Raises EclectusError for what is no OWNER/NAME."""
    if not _NAME.fullmatch(name):
        raise EclectusError(f"'{name}' is no repository of a hub; expected OWNER/NAME, as in anna/greek-moe")


def check_token(what: str) -> None:
    """Raises EclectusError where there is no token to write, or to read what is private."""
    from huggingface_hub import get_token

    if not get_token():
        raise EclectusError(
            f"{what} needs a token of the hub at {endpoint()}, and there is none; set HF_TOKEN, or run: hf auth login"
        )


def on_hub(act: Callable[[], T], what: str, say: Callable[[str], None] = lambda text: None) -> T:
    """What `act` returns. A hub that has too many requests (429) is asked again after the time that it names.

    what: is done, for messages. say: told of waiting. Raises EclectusError with the reason and what to do.
    """
    from huggingface_hub.errors import HfHubHTTPError

    for attempt in range(TRIES):
        try:
            return act()
        except HfHubHTTPError as error:
            status = error.response.status_code
            wait = _named_wait(error) or FIRST_WAIT * 2**attempt
            if status != 429 or attempt + 1 == TRIES or wait > LONGEST_WAIT:
                raise EclectusError(f"{what}: {_sentence(error, wait)}") from error
            say(f"the hub has too many requests (429); asking again in {wait:g} s")
            time.sleep(wait)
        except EclectusError:
            raise
        except Exception as error:
            # The client's library of HTTP changes between its versions, and its errors are of no common class.
            raise EclectusError(
                f"{what}: the hub at {endpoint()} cannot be reached ({_first_line(error)}); check the network, "
                "HF_ENDPOINT and HF_HUB_OFFLINE"
            ) from error
    raise AssertionError("every attempt returns or raises")


def _named_wait(error: HfHubHTTPError) -> float | None:
    """Seconds after which the hub wants to be asked again."""
    named = error.response.headers.get("retry-after", "")
    return float(named) if named.replace(".", "", 1).isdigit() else None


def _sentence(error: HfHubHTTPError, wait: float) -> str:
    status = error.response.status_code
    at = endpoint()
    if status == 429:
        return f"the hub at {at} has too many requests (429); try again in {wait:g} s, or with a token of your own"
    if status == 401:
        return (
            f"the hub at {at} does not know you (401): the name does not exist or is private, or the token is not "
            "valid; set HF_TOKEN to one that is, or run: hf auth login"
        )
    if status == 403:
        return f"your token may not do this at {at} (403); take one with write access, or another owner"
    if status == 404:
        return f"there is no such repository, revision or file at {at} (404), or your token may not see it"
    return f"the hub at {at} answers {status} ({_first_line(error)})"


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line]
    return scrub(f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__)
