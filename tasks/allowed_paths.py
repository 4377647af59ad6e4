"""Path allow-list for parameters submitted through a shared UI.

$ECLECTUS_ROOTS lists folders, separated by `:`. If it is set, a run opens no file outside them by a path of its
parameters. If unset, any path is allowed.

    check_roots     at the door: every path in a run's parameters, before anything is said about it
    check_path      one file or folder, by where it really lies (links and `..` resolved)
    check_tree      a folder and every link in it, before a library opens its files by name
    open_allowed    opens a file and checks the open file, so that a link swapped meanwhile leads nowhere else

A run's own files are not subject to it: flows put paths of artifacts, of the hub's cache and of the shipped corpus into
settings of steps. Only a path that begins there may lead there; a link of a user that leads there is refused.
"""

from __future__ import annotations

import glob
import hashlib
import io
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from eclectus.storage.artifact import hash_unchanged
from eclectus.storage.errors import EclectusError
from eclectus.tasks.run import current_run
from eclectus.tasks.settings import Settings

ROOTS = "ECLECTUS_ROOTS"
_PREFIX = "dataset:"
# What deployments and configs name, relative to the folder of prefect.yaml: the shipped corpus, and rules of the gate.
SHIPPED = ("data/corpus", "configs")
# Texts that are no paths, although they may begin with a dot.
_NO_PATHS = re.compile("text_suffixes|report_title|report_left_out|.*_field")


def check_roots(parameters: Settings) -> None:
    """Raises EclectusError naming the first parameter with a path outside the allowed folders.

    Not for the flows that an open run calls: what these get was checked, and the run's own paths are put into it.
    """
    if not _roots() or current_run() is not None:
        return
    fields = type(parameters).model_fields
    for name, value in parameters.model_dump(mode="json").items():
        if _NO_PATHS.fullmatch(name) or value == fields[name].default:
            continue
        for path in _paths(value):
            _check_inside(os.path.realpath(path), path, f"setting '{name}'", _shipped())


def check_path(path: str | Path, what: str) -> None:
    """Raises EclectusError for a path that leads outside the allowed folders, if set. what: its origin."""
    if _roots():
        _check_inside(os.path.realpath(path), str(path), what, _own())


def check_tree(path: str | Path, what: str, depth: int | None = None) -> None:
    """The same of a folder and all links below it. depth: levels of folders that are read; None: all."""
    if not _roots():
        return
    check_path(path, what)
    seen: set[str] = set()
    folders = [(os.path.abspath(path), 1)]
    while folders:
        folder, level = folders.pop()
        real = os.path.realpath(folder)
        if real in seen or not os.path.isdir(real) or not os.access(real, os.R_OK | os.X_OK):
            continue
        seen.add(real)
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_symlink():
                    check_path(entry.path, what)
                if os.path.isdir(entry.path) and (depth is None or level < depth):
                    folders.append((entry.path, level + 1))


def open_allowed(path: str | Path, what: str) -> io.FileIO:
    """Opens a file for reading, unbuffered. Raises EclectusError if what was opened lies outside the allowed folders.

    Raises OSError as `open` does, for a path that leads inside them.
    """
    check_path(path, what)
    file = open(path, "rb", buffering=0)  # noqa: SIM115  (the caller closes it)
    try:
        if _roots():
            _check_inside(_place_of(file.fileno(), path), str(path), what, _own())
    except BaseException:
        file.close()
        raise
    return file


def hash_allowed(path: str | Path, what: str) -> str:
    """Hex SHA-256 of a file that `open_allowed` opens."""
    if not _roots():
        return hash_unchanged(Path(path))
    with open_allowed(path, what) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_all_allowed(paths: list[Path], what: str) -> list[str]:
    """`hash_allowed` of each file, by all cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda path: hash_allowed(path, what), paths))


def copy_allowed(path: str | Path, target: str | Path, what: str) -> None:
    """Copies the content of a file that `open_allowed` opens."""
    with open_allowed(path, what) as file, open(target, "wb") as copy:
        shutil.copyfileobj(file, copy, 2**20)


def _check_inside(real: str, path: str, what: str, own: list[str]) -> None:
    """real: where `path` leads. own: folders that a path may lead to if it begins there."""
    named, roots = os.path.abspath(path), _roots()
    allowed = roots + (own if _below(named, own) else [])
    if _below(real, [os.path.realpath(each) for each in allowed]):
        return
    # Of what lies outside, nothing is said: neither whether it exists, nor where its links lead.
    how = ", a link," if _below(named, [*roots, *map(os.path.realpath, roots)]) else ""
    where = f"{named}{how} which leads outside" if how else f"{named}, which is outside"
    raise EclectusError(f"{what} leads to {where} {' and '.join(map(os.path.realpath, roots))} ({ROOTS})")


def _below(path: str, folders: list[str]) -> bool:
    return any(path == folder or path.startswith(folder.rstrip(os.sep) + os.sep) for folder in folders)


def _roots() -> list[str]:
    """The allowed folders as they are named, absolute."""
    return [os.path.abspath(os.path.expanduser(root)) for root in os.environ.get(ROOTS, "").split(os.pathsep) if root]


def _shipped() -> list[str]:
    top = os.environ.get("ECLECTUS_DIRECTORY") or os.getcwd()
    return [os.path.abspath(os.path.join(top, each)) for each in SHIPPED]


def _own() -> list[str]:
    """Folders of the run's own files: its artifacts, what it downloads from the hub, what the product ships."""
    run = current_run()
    artifacts = [os.path.abspath(run.home.store.root)] if run else []
    return [*artifacts, *_caches_of_the_hub(), *_shipped()]


def _caches_of_the_hub() -> list[str]:
    from huggingface_hub.constants import HF_HUB_CACHE

    return [os.path.abspath(HF_HUB_CACHE)]


def _place_of(handle: int, path: str | Path) -> str:
    """Where an open file lies; without /proc, where its path leads now if that is the same file, else nowhere."""
    try:
        return os.readlink(f"/proc/self/fd/{handle}")
    except OSError:
        real = os.path.realpath(path)
        return real if os.path.samestat(os.stat(real), os.fstat(handle)) else ""


def _paths(value: Any) -> Iterator[str]:
    """The paths in a parameter's value: strings that look like a path, or that name an existing file or folder."""
    if isinstance(value, list | dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _paths(each)
    elif isinstance(value, str):
        path = value.strip().removeprefix("file://")
        if path.startswith(_PREFIX):
            path = path.removeprefix(_PREFIX).removeprefix("file://").split("@")[0].split(":")[0]
        path = path.strip()
        # A name may end in a slash; `Path` drops it.
        path = path.rstrip("/") or path
        path = path if os.path.lexists(path) else os.path.expanduser(path)
        fixed = re.split(r"[*?\[]", path, maxsplit=1)[0] if glob.has_magic(path) else path
        if path.startswith(("/", "~", ".")) or ".." in path.split("/") or (fixed and os.path.lexists(fixed)):
            yield fixed
            # What follows a pattern may lead out of it again.
            yield os.path.normpath(path)
