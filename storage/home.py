"""The home: one directory with everything that a project made and knows.

artifacts/   immutable results                keys/       which settings and inputs made which artifact
journal/     what happened, as it happened    work/       unfinished training, so that it can go on
prefect/     the local Prefect server's data  eclectus.duckdb, report.html   for people
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from storage.artifact import ArtifactStore
from storage.errors import EclectusError

DEFAULT = "home"


@dataclass(frozen=True)
class Home:
    """The directory `root` and the rooms in it."""

    root: Path

    @classmethod
    def open(cls, root: str | Path | None = None) -> Home:
        """The home at `root`, else at $ECLECTUS_HOME, else `./home`; made if missing.

        Raises EclectusError when it cannot be made or written.
        """
        place = Path(root or os.environ.get("ECLECTUS_HOME") or DEFAULT).absolute()
        home = cls(place)
        try:
            for room in (home.store.root, home.journal, home.keys, home.work):
                room.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EclectusError(
                f"home {place} cannot be made ({error.strerror}); set --home or ECLECTUS_HOME"
            ) from error
        if not os.access(home.journal, os.W_OK):
            raise EclectusError(f"home {place} cannot be written; set --home or ECLECTUS_HOME to another folder")
        return home

    @property
    def store(self) -> ArtifactStore:
        return ArtifactStore(self.root / "artifacts")

    @property
    def journal(self) -> Path:
        return self.root / "journal"

    @property
    def keys(self) -> Path:
        return self.root / "keys"

    @property
    def work(self) -> Path:
        return self.root / "work"

    @property
    def database(self) -> Path:
        return self.root / "eclectus.duckdb"
