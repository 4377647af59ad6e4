"""Tags: names that users give to artifacts, `greek@2`, accepted wherever an artifact is named.

One small file per name and version under `artifacts/.tags`, so that a look-up is one read. A version never moves to
another artifact; `greek@latest` is the highest version. The journal gets who tagged what, and why (the view `tags`).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eclectus.storage.atomic_write import write_atomically
from eclectus.storage.errors import EclectusError
from eclectus.storage.mirror import Mirror

NAME = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,63})@([1-9][0-9]{0,8}|latest)")
LATEST = "latest"
SUFFIX = ".json"


@dataclass(frozen=True)
class Tags:
    """The tags under a folder. mirror: the object store that has them too, where there is one."""

    root: Path
    mirror: Mirror | None = None

    def find(self, tag: str) -> str | None:
        """The `KIND-DIGEST` that a tag names; None for text that is no tag. Raises EclectusError for an unknown one."""
        parts = NAME.fullmatch(tag)
        if parts is None:
            return None
        name, version = parts.groups()
        known = self.versions(name)
        found = known.get(max(known, default=0) if version == LATEST else int(version))
        if found is None:
            versions = ", ".join(f"{name}@{each}" for each in sorted(known)) or "none of that name"
            raise EclectusError(f"there is no tag '{tag}'; known tags: {versions}")
        return found

    def add(self, tag: str, artifact: str) -> str:
        """Names an artifact (`KIND-DIGEST`) and returns the tag. tag: `greek@2`, or `greek` for the next version.

        Raises EclectusError for a name that cannot be one, and for a version that names another artifact.
        """
        parts = NAME.fullmatch(tag if "@" in tag else f"{tag}@{LATEST}")
        if parts is None:
            raise EclectusError(
                f"'{tag}' cannot be a tag; expected NAME or NAME@VERSION, such as greek@2: a name of up to 64 letters, "
                "digits, '.', '_' and '-', and a version from 1"
            )
        name, version = parts.groups()
        known = self.versions(name)
        if version != LATEST:
            number = int(version)
        elif artifact in known.values():
            number = max(each for each, named in known.items() if named == artifact)
        else:
            number = max(known, default=0) + 1
        if known.get(number, artifact) != artifact:
            raise EclectusError(
                f"{name}@{number} is {_short(known[number])}, and a version never moves; tag with "
                f"{name}@{max(known) + 1}, or remove the old one with untag"
            )
        path = self._path(name, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({"artifact": artifact}), sync=True)
        if self.mirror:
            self.mirror.push(path)
        return f"{name}@{number}"

    def remove(self, tag: str) -> str:
        """Removes a tag and returns the `KIND-DIGEST` that it named. Raises EclectusError for an unknown one."""
        found = self.find(tag)
        if found is None or tag.endswith(f"@{LATEST}"):
            raise EclectusError(f"'{tag}' is no tag with a version; expected one such as greek@2")
        name, version = tag.split("@")
        path = self._path(name, int(version))
        if self.mirror:
            self.mirror.remove(path)
        path.unlink(missing_ok=True)
        return found

    def versions(self, name: str) -> dict[int, str]:
        """The `KIND-DIGEST` of each version of a name."""
        folder = self.root / name
        paths = sorted(folder.glob(f"*{SUFFIX}"))
        if self.mirror:
            # A tag that was removed from another machine may still have its file here.
            self.mirror.pull_changed(folder, SUFFIX)
            paths = [path for path, _ in self.mirror.listing(folder, SUFFIX)]
        return {int(path.stem): artifact for path in paths if (artifact := _read(path))}

    def all(self) -> dict[str, str]:
        """The `KIND-DIGEST` of every tag."""
        names = {path.name for path in self.root.glob("*")}
        if self.mirror:
            names |= {path.parent.name for path, _ in self.mirror.listing(self.root, SUFFIX)}
        return {f"{name}@{number}": found for name in sorted(names) for number, found in self.versions(name).items()}

    def _path(self, name: str, version: int) -> Path:
        return self.root / name / f"{version}{SUFFIX}"


def is_tag(text: str) -> bool:
    """Whether a text can be a tag's name with a version."""
    return NAME.fullmatch(text) is not None


def _read(path: Path) -> str | None:
    """The artifact in a tag's file; None if it is not readable."""
    try:
        content: Any = json.loads(path.read_text())
        return str(content["artifact"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _short(artifact: str) -> str:
    kind, _, digest = artifact.partition("-")
    return f"{kind}-{digest[:12]}"
