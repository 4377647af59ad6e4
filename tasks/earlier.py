"""Artifacts of before, from which a step may go on instead of beginning again.

Price: one look at each manifest of the kind; only what is used is hashed again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from storage.artifact import Artifact
from storage.errors import EclectusError
from tasks.run import current_run


def earlier(kind: str, **statistics: Any) -> Iterator[Artifact]:
    """Artifacts of this kind in the home of the run, newest first, with these statistics; none outside a run.

    They are not hashed yet: ask `is_whole` before what is in one is used.
    """
    run = current_run()
    if run is None:
        return
    found = []
    for manifest in (run.home.store.root / kind).glob("*/manifest.json"):
        with contextlib.suppress(EclectusError):
            artifact = run.home.store.find(str(manifest.parent))
            told = artifact.manifest()
            if all(told["statistics"].get(name) == value for name, value in statistics.items()):
                found.append((told["created"], artifact.digest, artifact))
    for _, _, artifact in sorted(found, key=lambda each: each[:2], reverse=True):
        yield artifact


def is_whole(artifact: Artifact) -> bool:
    """Whether every byte is as committed."""
    run = current_run()
    return run is not None and run.home.store.faults(artifact) is None
