"""Results of parts (tasks/over_parts.py): folders `work/parts/<key>` of the home, whole or absent, found by their key.

A result is written aside, hashed and renamed, with its files and their digests in `part.json`. One that is damaged is
removed when it is looked for, with a message that names it, and made again.

With a home on an object store and a cluster (RAY_ADDRESS) no disk is shared: the driver uploads what the store lacks of
a call's files, a worker downloads what its machine lacks and checks it by the digests, and uploads its result.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eclectus.storage.artifact import MANIFEST, hash_file, hash_unchanged, link, write_json
from eclectus.storage.atomic_write import temporary_folder
from eclectus.storage.disk_full import no_room
from eclectus.storage.home import Home
from eclectus.storage.mirror import AT_A_TIME, Mirror
from eclectus.storage.unused import DOWNLOADED, PART, PARTS
from eclectus.tasks.run import current_run

DESCRIPTION = PART

Function = Callable[..., dict[str, Any]]
"""`function(out, **arguments)`: writes files into the empty folder `out`, returns a JSON-ready description. It stands
at the top level of a module, and its arguments are small: paths, numbers, settings."""


@dataclass(frozen=True)
class Done:
    """The result of one part: its folder, and what the function returned. found: whether it was there already."""

    folder: Path
    about: dict[str, Any] = field(default_factory=dict)
    found: bool = False

    def file(self, name: str) -> Path:
        return self.folder / name


class DamagedInput(Exception):
    """A file of a call that is not on the object store as the driver has it."""


@dataclass(frozen=True)
class PartStore:
    """Where the results are. mirror: the object store through which machines exchange files; None for one disk.

    damaged: a message per damaged result that `find` removed.
    """

    root: Path
    folder: Path
    mirror: Mirror | None = None
    damaged: list[str] = field(default_factory=list, compare=False)

    @classmethod
    def of_run(cls) -> PartStore:
        run = current_run()
        if run is None:
            folder = _temporary_folder()
            return cls(folder, folder)
        return cls.of_home(run.home)

    @classmethod
    def of_home(cls, home: Home) -> PartStore:
        return cls(home.root, home.work / PARTS, home.mirror if os.environ.get("RAY_ADDRESS") else None)

    def place(self, key: str) -> Path:
        return self.folder / key[:2] / key[:40]

    def find(self, key: str) -> Done | None:
        """The whole result of an earlier call, here or in the object store. A damaged one is removed."""
        place = self.place(key)
        if self.mirror and not place.exists() and self.mirror.has(place / DESCRIPTION):
            self.mirror.pull(place)
        about, fault = read_whole(place)
        if about is None:
            if place.exists():
                self.damaged.append(f"{place} is damaged: {fault}; it is made again")
                shutil.rmtree(place, ignore_errors=True)
            return None
        with contextlib.suppress(OSError):
            os.utime(place)
        return Done(place, about, found=True)

    def make(self, key: str, function: Function, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Calls the function, unless another process has made the same meanwhile. Returns its description.

        Raises NoRoom where a disk is full.
        """
        place = self.place(key)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with temporary_folder(place) as out:
                with _one_thread():
                    about = function(out, **arguments)
                files = {
                    path.relative_to(out).as_posix(): [path.stat().st_size, hash_file(path)]
                    for path in sorted(out.rglob("*"))
                    if path.is_file()
                }
                write_json(out / DESCRIPTION, {"about": about, "files": files})
                return self._put(out, place) or about
        except Exception as error:
            if full := no_room(error, self.folder):
                raise full from error
            raise

    def _put(self, out: Path, place: Path) -> dict[str, Any] | None:
        """Renames a result into place. Returns the description of a whole one that is there already."""
        try:
            os.rename(out, place)
            return None
        except OSError:
            there, _ = read_whole(place)
            if there is not None:
                return there
        # What is there was damaged after this call had begun, or lies on a machine that looked for nothing.
        shutil.rmtree(place, ignore_errors=True)
        os.rename(out, place)
        return None

    def forget(self, place: Path) -> None:
        """Removes a result that no later run would look for."""
        shutil.rmtree(place, ignore_errors=True)
        if self.mirror:
            self.mirror.remove(place)

    def local(self, value: Any, theirs: Path) -> Any:
        """`value` with the paths in it that lie below `theirs`, the driver's root, on this machine, and there.

        A part comes whole; files of artifacts go to a place of their own, since half an artifact would be none. Every
        byte is as it was made: raises DamagedInput otherwise.
        """
        here = {path: self.root / path.relative_to(theirs) for path in paths_in(value) if path.is_relative_to(theirs)}
        if self.mirror:
            _each({self._unit(path) for path in here.values()}, self._fetch)
        return _replaced(value, {path: self._found(mine) for path, mine in here.items()})

    def _unit(self, path: Path) -> Path:
        """What is uploaded and downloaded as one: the folder of a result, or the very file or folder."""
        if path.is_relative_to(self.folder):
            return self.folder.joinpath(*path.relative_to(self.folder).parts[:2])
        return path

    def _copy(self, path: Path) -> Path:
        """Where a downloaded file or folder of an artifact is."""
        return self.root / "work" / DOWNLOADED / path.relative_to(self.root)

    def _found(self, path: Path) -> Path:
        return path if self.mirror is None or path.exists() else self._copy(path)

    def _fetch(self, unit: Path) -> None:
        if unit.is_relative_to(self.folder):
            self._downloaded(unit, unit, lambda: read_whole(unit)[1])
        elif not unit.exists():
            kept = self._copy(unit)
            self._downloaded(unit, kept, lambda: self._fault_of_copy(unit, kept))

    def _downloaded(self, source: Path, kept: Path, fault: Callable[[], str]) -> None:
        """Downloads `source` to `kept` where it is missing or has a fault. Raises DamagedInput if that stays."""
        assert self.mirror is not None
        if kept.exists() and not fault():
            return
        shutil.rmtree(kept, ignore_errors=True)
        kept.unlink(missing_ok=True)
        self.mirror.pull(source, kept)
        if why := fault():
            raise DamagedInput(f"{source} on {self.mirror.name}: {why}")

    def _fault_of_copy(self, path: Path, kept: Path) -> str:
        """What is wrong with a copy of files of an artifact, by its manifest; empty if nothing is."""
        digests = _digests(self, self.root.joinpath(*path.relative_to(self.root).parts[:3]))
        if not kept.exists():
            return "it is not there"
        for name, digest in digests.items():
            file = kept / os.path.relpath(name, path)
            if Path(name).is_relative_to(path) and (not file.exists() or hash_unchanged(file) != digest):
                return f"{name} is not as it was made"
        return ""

    def share(self, value: Any, known: set[Path], again: bool = False) -> None:
        """Uploads the files and folders in `value` below the home that the object store lacks.

        known: those it has. again: also what it has, which may be damaged.
        """
        if self.mirror is None:
            return
        units = {self._unit(path) for path in paths_in(value) if path.is_relative_to(self.root)}
        _each(units if again else units - known, lambda unit: self._upload(unit, again))
        known |= units

    def _upload(self, unit: Path, again: bool) -> None:
        assert self.mirror is not None
        last = DESCRIPTION if unit.is_relative_to(self.folder) else None
        if again or not self.mirror.has(unit / last if last else unit):
            self.mirror.push(unit, last)


def paths_in(value: Any) -> Iterator[Path]:
    """Every path in a value of paths, numbers, texts, lists and dicts."""
    if isinstance(value, Path):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from paths_in(each)
    elif isinstance(value, Mapping):
        yield from paths_in(list(value.values()))


def _replaced(value: Any, by: Mapping[Path, Path]) -> Any:
    if isinstance(value, Path):
        return by.get(value, value)
    if isinstance(value, list | tuple):
        return type(value)(_replaced(each, by) for each in value)
    if isinstance(value, dict):
        return {name: _replaced(each, by) for name, each in value.items()}
    return value


def _each(units: set[Path], act: Callable[[Path], None]) -> None:
    """Calls `act` for each, many at a time: on an object store most of it is waiting."""
    if units:
        with ThreadPoolExecutor(min(AT_A_TIME, len(units))) as pool:
            list(pool.map(act, sorted(units)))


def read_whole(place: Path) -> tuple[dict[str, Any] | None, str]:
    """What a result says of itself, or None and what is wrong unless every byte is as it was written."""
    try:
        told = json.loads((place / DESCRIPTION).read_text())
        for name, (size, digest) in told["files"].items():
            path = place / name
            if not path.is_file():
                return None, f"{name} is gone"
            if path.stat().st_size != size or hash_unchanged(path) != digest:
                return None, f"{name} changed"
        about: dict[str, Any] = told["about"]
        return about, ""
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return None, f"{DESCRIPTION} cannot be read ({error})"


def link_or_copy(source: Path, target: Path) -> None:
    """`target` with the content of `source`, which is never written again: a hard link where the disk can."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        link(source, target)
    except OSError:
        shutil.copyfile(source, target)


@functools.lru_cache(maxsize=64)
def _digests(store: PartStore, artifact: Path) -> dict[str, str]:
    """Path of each file of an artifact -> digest, by its manifest on the object store; empty for what has none."""
    assert store.mirror is not None
    if not store.mirror.has(artifact / MANIFEST):
        return {}
    manifest = json.loads(store.mirror.read(artifact / MANIFEST))
    return {str(artifact / file["name"]): file["sha256"] for file in manifest["files"]}


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Limits BLAS and OpenMP: sums in several threads may differ in their last bits."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        yield


@functools.cache
def _temporary_folder() -> Path:
    """For work outside a run; removed when the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="eclectus-parts-")
    atexit.register(folder.cleanup)
    return Path(folder.name)
