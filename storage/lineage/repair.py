"""Quarantines damaged files before the lineage database is opened, and logs each.

Checked each time: the first and last four bytes of every Parquet file that the views read, which shows what is
truncated, emptied or overwritten; `eclectus verify` reads every byte. A part of the journal goes to `journal/damaged/`
(put it back from a copy: its rows are missing meanwhile), its index is written again, and an artifact is quarantined
like any other damaged one. Cost: 30 us per file.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from eclectus.storage.artifact import EMPTY
from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.storage.lineage.compact import DAMAGED, INDEXES, repair_index
from eclectus.storage.lineage.sql.placeholders import create_placeholders
from eclectus.storage.lineage.sql.schema import COLUMNS

MAGIC = b"PAR1"
SMALLEST_BYTES = 12


def repair(home: Home) -> list[str]:
    """A message per quarantined file. Raises EclectusError where a file is damaged and the home cannot be written."""
    messages = []
    for path in _read_by_views(home):
        if _is_whole(path):
            continue
        try:
            messages.append(_quarantine(home, path))
        except OSError as error:
            raise EclectusError(
                f"{path} is damaged and cannot be quarantined ({error.strerror}); put it back from a copy"
            ) from error
    if messages:
        create_placeholders(home)
        repair_index(home)
    for message in messages:
        logging.getLogger("eclectus").warning("%s", message)
    return messages


def _read_by_views(home: Home) -> Iterator[Path]:
    for folder in (*COLUMNS, *INDEXES, "documents", "held"):
        yield from home.journal.glob(f"{folder}/*.parquet")
    for pattern in (
        "instances/*/documents*.parquet",
        "documents/*/documents/*.parquet",
        "evaluation/*/routing.parquet",
    ):
        yield from home.store.root.glob(pattern)


def _is_whole(path: Path) -> bool:
    try:
        with open(path, "rb") as handle:
            if os.fstat(handle.fileno()).st_size < SMALLEST_BYTES or handle.read(4) != MAGIC:
                return False
            handle.seek(-4, os.SEEK_END)
            return handle.read(4) == MAGIC
    except FileNotFoundError:
        return True


def _quarantine(home: Home, path: Path) -> str:
    if home.store.root in path.parents:
        kind, digits = path.relative_to(home.store.root).parts[:2]
        if digits.startswith(EMPTY):
            path.unlink()
            return f"{path} was damaged; it is a placeholder, and is written again"
        target = home.store.root / ".damaged" / f"{kind}-{digits}-{uuid.uuid4().hex[:6]}"
        target.parent.mkdir(exist_ok=True)
        os.rename(home.store.root / kind / digits, target)
        return (
            f"{kind}-{digits[:12]} is damaged ({path.name} cannot be read) and was quarantined; "
            "a run that needs it makes it again"
        )
    if path.stem.startswith(EMPTY) or path.parent.name in INDEXES:
        path.unlink()
        return f"{path} was damaged; it is written again from the journal"
    target = home.journal / DAMAGED / f"{path.parent.name}-{path.name}"
    target.parent.mkdir(exist_ok=True)
    os.rename(path, target)
    if path.parent.name in COLUMNS:
        for name in INDEXES:
            for index in (home.journal / name).glob(f"{path.stem}-*.parquet"):
                index.unlink()
    return f"journal part {path} is damaged and was quarantined as {target}; put it back from a copy"
