"""Artifacts of before, from which a step may go on instead of beginning again.

Price: one look at each manifest of the kind; only what is used is hashed again. Where the home is on an object store and this
machine has none of the kind, the newest one that fits is brought here.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eclectus.storage.artifact import MANIFEST, Artifact
from eclectus.storage.errors import EclectusError
from eclectus.tasks.run import current_run


def earlier(kind: str, **statistics: Any) -> Iterator[Artifact]:
    """Artifacts of this kind in the home of the run, newest first, with these statistics; none outside a run.

    They are not hashed yet: ask `is_whole` before what is in one is used.
    """
    run = current_run()
    if run is None:
        return
    store = run.home.store
    here = {path: text for path in (store.root / kind).glob(f"*/{MANIFEST}") if (text := _text(path)) is not None}
    found = _fitting(here, statistics)
    if not found and store.mirror:
        there = {path: store.mirror.read(path) for path, _ in store.mirror.listing(store.root / kind, MANIFEST)}
        found = _fitting({path: text for path, text in there.items() if path not in here}, statistics)[:1]
        for path in found:
            store.mirror.pull(path.parent)
    for path in found:
        with contextlib.suppress(EclectusError):
            yield store.find(str(path.parent))


def is_whole(artifact: Artifact) -> bool:
    """Whether every byte is as committed."""
    run = current_run()
    return run is not None and run.home.store.faults(artifact) is None


def _text(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _fitting(manifests: dict[Path, bytes], statistics: dict[str, Any]) -> list[Path]:
    """The manifests with these statistics, newest first."""
    found = []
    for path, text in manifests.items():
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            told = json.loads(text)
            if all(told["statistics"].get(name) == value for name, value in statistics.items()):
                found.append((told["created"], told["digest"], path))
    return [path for _, _, path in sorted(found, reverse=True)]
