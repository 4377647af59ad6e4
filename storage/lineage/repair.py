"""Damage that would keep people from the books is set aside before they are opened, and told.

Looked at, each time: the first and last four bytes of every Parquet file that the views read, which shows what is cut off, emptied or
overwritten; `eclectus verify` reads every byte. A part of the journal goes to `journal/damaged/` (put it back from a copy: what it says is
not known meanwhile), the index beside it is made again, and an artifact is set aside like any other damaged one. Price: 30 us a file.
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
from eclectus.storage.lineage.compact import DAMAGED, INDEXES, mend_index
from eclectus.storage.lineage.tables import COLUMNS, plant

MAGIC = b"PAR1"
SMALLEST = 12


def heal(home: Home) -> list[str]:
    """What was set aside, in words. Raises EclectusError where something is damaged and the home cannot be written."""
    told = []
    for path in _read_by_views(home):
        if _sound(path):
            continue
        try:
            told.append(_set_aside(home, path))
        except OSError as error:
            raise EclectusError(
                f"{path} is damaged and cannot be set aside ({error.strerror}); put it back from a copy"
            ) from error
    if told:
        plant(home)
        mend_index(home)
    for each in told:
        logging.getLogger("eclectus").warning("%s", each)
    return told


def _read_by_views(home: Home) -> Iterator[Path]:
    for folder in (*COLUMNS, *INDEXES, "documents", "held"):
        yield from home.journal.glob(f"{folder}/*.parquet")
    for pattern in ("instances/*/documents.parquet", "documents/*/documents/*.parquet", "evaluation/*/routing.parquet"):
        yield from home.store.root.glob(pattern)


def _sound(path: Path) -> bool:
    try:
        with open(path, "rb") as handle:
            if os.fstat(handle.fileno()).st_size < SMALLEST or handle.read(4) != MAGIC:
                return False
            handle.seek(-4, os.SEEK_END)
            return handle.read(4) == MAGIC
    except FileNotFoundError:
        return True


def _set_aside(home: Home, path: Path) -> str:
    if home.store.root in path.parents:
        kind, digits = path.relative_to(home.store.root).parts[:2]
        if digits.startswith(EMPTY):
            path.unlink()
            return f"{path} was damaged; it holds nothing, and is written again"
        aside = home.store.root / ".damaged" / f"{kind}-{digits}-{uuid.uuid4().hex[:6]}"
        aside.parent.mkdir(exist_ok=True)
        os.rename(home.store.root / kind / digits, aside)
        return f"{kind}-{digits[:12]} is damaged ({path.name} cannot be read) and was set aside; a run that wants it makes it again"
    if path.stem.startswith(EMPTY) or path.parent.name in INDEXES:
        path.unlink()
        return f"{path} was damaged; it is made again from the journal"
    aside = home.journal / DAMAGED / f"{path.parent.name}-{path.name}"
    aside.parent.mkdir(exist_ok=True)
    os.rename(path, aside)
    if path.parent.name in COLUMNS:
        for name in INDEXES:
            for index in (home.journal / name).glob(f"{path.stem}-*.parquet"):
                index.unlink()
    return f"journal part {path} is damaged and was set aside as {aside}; put it back from a copy"
