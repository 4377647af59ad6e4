"""The home: one directory with everything that a project made and knows, or its like on an object store (storage/mirror.py).

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
from storage.mirror import SCHEME, Mirror, cache_folder

DEFAULT = "home"


@dataclass(frozen=True)
class Home:
    """The directory `root` and the rooms in it; `mirror`: the object store whose cache it is, if it is one."""

    root: Path
    mirror: Mirror | None = None

    @classmethod
    def open(cls, root: str | Path | None = None) -> Home:
        """The home at `root`, else at $ECLECTUS_HOME, else `./home`; made if missing. A folder, or a URL (`s3://bucket/prefix`).

        Raises EclectusError when it cannot be made or written.
        """
        named = str(root or os.environ.get("ECLECTUS_HOME") or DEFAULT)
        if SCHEME in named:
            place = cache_folder(named)
            home = cls(place, Mirror(named.rstrip("/"), place))
            home.mirror.check()
        else:
            place = Path(named).absolute()
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
    def name(self) -> str:
        """What a person calls it: the URL, or the folder."""
        return self.mirror.url if self.mirror else str(self.root)

    def refresh(self) -> None:
        """Brings what queries read, and is not here yet, from the object store: journals and the tables of instances."""
        if self.mirror:
            self.mirror.pull_changed(self.journal, "")
            self.mirror.pull_changed(self.store.root / "instances", "documents.parquet")

    @property
    def store(self) -> ArtifactStore:
        return ArtifactStore(self.root / "artifacts", self.mirror)

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
