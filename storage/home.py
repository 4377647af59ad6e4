"""The home: one directory with a project's artifacts and lineage, here or on an object store (storage/mirror.py).

artifacts/   immutable results                keys/       which settings and inputs made which artifact
journal/     events, metrics and decisions    work/       unfinished training and parts, to resume
layout       the number of this layout        prefect/    the local Prefect server's data
eclectus.duckdb, report.html                  for users
"""

from __future__ import annotations

import difflib
import errno
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from eclectus.storage.artifact import ArtifactStore
from eclectus.storage.commands import DEFAULT_HOME, HOME_VARIABLE, quoted
from eclectus.storage.errors import EclectusError
from eclectus.storage.mirror import SCHEME, Mirror, cache_folder
from eclectus.storage.secrets import scrub

LAYOUT = 2


@dataclass(frozen=True)
class Home:
    """The directory `root` and its folders. mirror: the object store that it caches, if any."""

    root: Path
    mirror: Mirror | None = None

    @classmethod
    def open(cls, root: str | Path | None = None, reading: bool = False) -> Home:
        """The home at `root`, else at $ECLECTUS_HOME, else `./home`; created if missing. A folder, or a URL (`s3://bucket/prefix`).

        reading: accept a read-only home. Raises EclectusError when it cannot be created or written, or was written by a
        newer version.
        """
        named = str(root or os.environ.get(HOME_VARIABLE) or DEFAULT_HOME)
        if SCHEME in named:
            path = cache_folder(named)
            mirror = Mirror(named.rstrip("/"), path)
            home = cls(path, mirror)
            mirror.check()
        else:
            path = Path(named).absolute()
            if "\\" in str(path):
                raise EclectusError(f"home {path} has a backslash in its path, which DuckDB takes for a /; rename it")
            home = cls(path)
        if reading and home.journal.is_dir():
            home._check_layout()
            return home
        try:
            for folder in (home.store.root, home.journal, home.keys, home.work):
                folder.mkdir(parents=True, exist_ok=True)
            home._check_layout()
            if not os.access(home.journal, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            if not home._layout.exists():
                home._layout.write_text(f"{LAYOUT}\n")
        except OSError as error:
            raise EclectusError(
                f"home {path} cannot be written ({error.strerror}); set --home or ECLECTUS_HOME to another folder"
            ) from error
        return home

    @classmethod
    def existing(cls, root: str | Path | None = None, reading: bool = True) -> Home:
        """As `open`, for whoever asks about a home: none is created. Raises EclectusError where there is none."""
        home = cls.found(root, reading)
        if not home.mirror and not home.journal.is_dir():
            others = [path.parent.name for path in home.root.parent.glob("*/journal") if path.is_dir()]
            near = difflib.get_close_matches(home.root.name, others, n=1)
            hint = f"did you mean {near[0]}?" if near else "name one with --home or ECLECTUS_HOME"
            raise EclectusError(f"there is no home at {home.root} yet; {hint} (`eclectus run` and `up` make one)")
        return home

    @classmethod
    def found(cls, root: str | Path | None = None, reading: bool = False) -> Home:
        """As `open`, but a folder that is not there is not created; what asks for its artifacts finds none."""
        named = str(root or os.environ.get(HOME_VARIABLE) or DEFAULT_HOME)
        if SCHEME in named or Path(named, "journal").is_dir():
            return cls.open(named, reading)
        return cls(Path(named).absolute())

    def _check_layout(self) -> None:
        """Homes without a number have layout 1: journals only, which every later version reads."""
        found = self._layout.read_text().strip() if self._layout.exists() else "1"
        if not found.isdigit() or int(found) > LAYOUT:
            raise EclectusError(
                f"home {self.root} has layout {found[:20]}, newer than this eclectus knows ({LAYOUT}); update eclectus"
            )
        if int(found) < LAYOUT and os.access(self.root, os.W_OK):
            # Layout 2 adds Parquet parts and an index, which eclectus.storage.lineage.compact writes as it goes.
            self._layout.write_text(f"{LAYOUT}\n")

    @property
    def _layout(self) -> Path:
        return self.root / "layout"

    @property
    def name(self) -> str:
        """For messages: the URL, or the folder."""
        return self.mirror.url if self.mirror else str(self.root)

    @property
    def shown(self) -> str:
        """The same for a shell in the current folder: quoted, relative where that is shorter."""
        return shlex.quote(scrub(self.mirror.url)) if self.mirror else quoted(self.root)

    def refresh(self) -> None:
        """Downloads what queries read and is missing here: journals, documents of instances, routing of evaluations."""
        if self.mirror:
            self.mirror.pull_changed(self.journal, "")
            self.mirror.pull_changed(self.store.root / "instances", ".parquet")
            self.mirror.pull_changed(self.store.root / "evaluation", "routing.parquet")

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
