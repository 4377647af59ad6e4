"""Whether the model hub can be reached, asked once per process."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

HUB_SECONDS = 3.0


@contextmanager
def hub_within_reach() -> Iterator[bool]:
    """Yields whether the hub answers; if not, sets its client offline, which would else retry for 24 s per task."""
    import datasets
    import huggingface_hub.constants as hub

    if _answers(re.sub(r"^https?://|[:/].*$", "", hub.ENDPOINT)):
        yield True
        return
    previous = hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    hub.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield False
    finally:
        hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = previous


@cache
def _answers(host: str) -> bool:
    try:
        socket.create_connection((host, 443), timeout=HUB_SECONDS).close()
        return True
    except OSError:
        return False
