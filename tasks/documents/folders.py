"""The files below a folder, and why others are passed over: every file is read or listed with a reason.

Linked folders are followed after the real ones, so that a file has the name of its real place if that is below the
folder as well. Every folder is entered once, which ends loops of links.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from eclectus.storage.errors import EclectusError
from eclectus.tasks.allowed_paths import check_path

PassedOver = dict[str, str]
"""Name -> why, as the end of a sentence: {"old/.cache/": "is hidden"}."""

HIDDEN = "is hidden"
OUTSIDE = "is a link to a folder outside those that are allowed"
READ_ALREADY = "is a link to a folder that is read already or holds this one"
LINKED = (OUTSIDE, READ_ALREADY)


def files_below(folder: Path, passed: PassedOver | None = None) -> list[Path]:
    """All files that are not hidden, sorted by their path. passed: gets what is not entered or listed, and why."""
    passed = {} if passed is None else passed
    above = {_identity(each) for each in (folder.resolve(), *folder.resolve().parents)}
    entered: set[tuple[int, int] | str] = set()
    files: list[Path] = []
    links = [folder]
    while links:
        link = links.pop(0)
        if link != folder:
            why = _why_not_entered(link, entered | above)
            if why:
                passed[f"{name_of(link, folder)}/"] = why
                continue
        links += _walk(link, folder, entered, files, passed)
    return sorted(files, key=lambda file: file.relative_to(folder).as_posix())


def _walk(
    start: Path, folder: Path, entered: set[tuple[int, int] | str], files: list[Path], passed: PassedOver
) -> list[Path]:
    """Adds the files below `start`; returns the linked folders."""

    def cannot_be_listed(error: OSError) -> None:
        passed[f"{name_of(Path(error.filename), folder)}/"] = f"cannot be listed ({error.strerror})"

    links: list[Path] = []
    for parent, folders, names in os.walk(start, onerror=cannot_be_listed):
        entered.add(_identity(Path(parent)))
        inner: list[Path] = []
        for name in sorted(folders):
            path = Path(parent) / name
            if name.startswith("."):
                passed[f"{name_of(path, folder)}/"] = HIDDEN
            else:
                (links if path.is_symlink() else inner).append(path)
        folders[:] = [path.name for path in inner if _identity(path) not in entered]
        for name in sorted(names):
            if name.startswith("."):
                passed[name_of(Path(parent) / name, folder)] = HIDDEN
            else:
                files.append(Path(parent) / name)
    return links


def _why_not_entered(link: Path, entered: set[tuple[int, int] | str]) -> str:
    if _identity(link) in entered:
        return READ_ALREADY
    try:
        check_path(str(link), "the link")
    except EclectusError:
        return OUTSIDE
    return ""


def _identity(folder: Path) -> tuple[int, int] | str:
    try:
        status = os.stat(folder)
    except OSError:
        return str(folder)
    return status.st_dev, status.st_ino


def why_no_file(path: Path) -> str:
    """Why a path is not read: pipes and devices would never end. Empty for a file, or what cannot be accessed."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return ""
    return "" if stat.S_ISREG(mode) else "is no regular file"


def name_of(path: Path, top: Path) -> str:
    """The path below `top`, as text: bytes that are not UTF-8 are written as \\xe9."""
    return readable(path.relative_to(top).as_posix())


def readable(name: str) -> str:
    """A file's name as text."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
