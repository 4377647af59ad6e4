"""Earlier artifacts that a step can extend incrementally instead of starting over.

Cost: reading each manifest of the kind; only an artifact that is used is hashed again. If the home is mirrored to an
object store and this machine has no match, the newest match is downloaded.
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
    """Artifacts of this kind with these statistics in the run's home, newest first; none outside a run.

    They are not verified: call `is_whole` before using one.
    """
    run = current_run()
    if run is None:
        return
    store = run.home.store
    local = {path: text for path in (store.root / kind).glob(f"*/{MANIFEST}") if (text := _text(path)) is not None}
    found = _matching(local, statistics)
    if not found and store.mirror:
        listed = [path for path, _ in store.mirror.listing(store.root / kind, MANIFEST)]
        found = _matching({path: store.mirror.read(path) for path in listed if path not in local}, statistics)[:1]
        for path in found:
            store.mirror.pull(path.parent)
    for path in found:
        with contextlib.suppress(EclectusError):
            yield store.find(str(path.parent))


def is_whole(artifact: Artifact) -> bool:
    """Whether every byte is as it was committed; False outside a run."""
    run = current_run()
    return run is not None and run.home.store.faults(artifact) is None


def _text(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _matching(manifests: dict[Path, bytes], statistics: dict[str, Any]) -> list[Path]:
    """The manifests with these statistics, newest first."""
    found = []
    for path, text in manifests.items():
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            manifest = json.loads(text)
            if all(manifest["statistics"].get(name) == value for name, value in statistics.items()):
                found.append((manifest["created"], manifest["digest"], path))
    return [path for _, _, path in sorted(found, reverse=True)]
