"""One function applied to many parts: in this process while that is little work, as Ray tasks otherwise.

    a part      the arguments of one call, and a key: the digest of everything on which the result depends
    a result    a folder of files and a description, in the home's `work/parts/<key>`. It is written aside, hashed and
                renamed, so it is whole or absent; whoever needs the same part later finds it, in a run that resumes
                after a kill as in a run on a corpus that has grown
    a failure   a part is tried three times, on other workers if there are others; then the error names it. An
                EclectusError ends the work at once. After a worker that ran out of memory fewer run at a time

A function computes with one thread and gets nothing but its arguments, so its result does not depend on where it ran,
nor on how many ran beside it (one that imports faiss or torch sets their threads itself: they are read at the import).
Parts are as large as the caller cuts them, never cut by the number of workers.

Paths in the arguments that lie below the home are there when the function is called. With a home on an object store
and a cluster (RAY_ADDRESS) no disk is shared: the driver uploads what the store lacks of them, a worker downloads what
its machine lacks, and uploads its result. Ray's start costs 8 s and each of its processes about 1 s of imports, hence
the choice by CPU seconds.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eclectus.storage.artifact import hash_file, hash_unchanged, write_json
from eclectus.storage.atomic_write import temporary_path
from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.storage.mirror import Mirror
from eclectus.tasks.run import current_run, progress

FOLDER = "parts"
DESCRIPTION = "part.json"
TRIES = 3
SECONDS_FOR_RAY = 40.0
"""Work for which starting Ray pays: its start, and the imports of its processes."""
SECONDS_FOR_TASKS = 2.0
"""The same once Ray runs."""

Function = Callable[..., dict[str, Any]]
"""`function(out, **arguments)`: writes files into the empty folder `out`, returns a JSON-ready description. It stands
at the top level of a module, and its arguments are small: paths, numbers, settings."""


@dataclass(frozen=True)
class Part:
    """One call. key: of `key_of`. size: of the work, in the unit of the progress. name: for messages."""

    key: str
    arguments: Mapping[str, Any]
    size: float = 1
    name: str = ""


@dataclass(frozen=True)
class Done:
    """The result of one part: its folder, and what the function returned. found: whether it was there already."""

    folder: Path
    about: dict[str, Any] = field(default_factory=dict)
    found: bool = False

    def file(self, name: str) -> Path:
        return self.folder / name


def key_of(purpose: str, *what: Any) -> str:
    """Key of a part: hex SHA-256. purpose: function and its version. what: JSON-ready, digests rather than paths."""
    return hashlib.sha256(json.dumps([purpose, *what], sort_keys=True, default=str).encode()).hexdigest()


def over_parts(
    function: Function,
    parts: Sequence[Part],
    what: str,
    unit: str = "documents",
    seconds: float = 0.0,
    workers: int = 0,
    gpus: float = 0.0,
) -> list[Done]:
    """The results of all parts, in their order; only those that no earlier work left are computed.

    what, unit: for the progress ("embedding", "documents"). seconds: expected CPU seconds per unit of size.
    workers: calls at the same time; 1 computes in this process, 0 takes all of the cluster's CPUs where that pays.
    gpus: of each call.
    Raises EclectusError: of the function, or naming the part that failed in every try.
    """
    store = _Store.of_run()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = list(pool.map(store.find, [part.key for part in parts]))
    missing = [number for number, each in enumerate(done) if each is None]
    finished = sum(part.size for part, each in zip(parts, done, strict=True) if each)
    report_progress = progress(sum(part.size for part in parts), what, unit)
    report_progress(finished)
    work = seconds * sum(parts[number].size for number in missing)
    spread = _in_ray if _pays(len(missing), work, workers, gpus) else _here
    with contextlib.closing(spread(function, [parts[number] for number in missing], store, workers, gpus)) as results:
        for position, result in results:
            done[missing[position]] = result
            finished += parts[missing[position]].size
            report_progress(finished)
    return [each for each in done if each is not None]


def find(key: str) -> Done | None:
    """The whole result with this key, if some earlier work left one."""
    return _Store.of_run().find(key)


def forget(done: Sequence[Done]) -> None:
    """Removes results that no later run would look for."""
    for each in done:
        shutil.rmtree(each.folder, ignore_errors=True)


def link_or_copy(source: Path, target: Path) -> None:
    """`target` with the content of `source`, which is never written again: a hard link where the disk can."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


@dataclass(frozen=True)
class _Store:
    """Where the results are. mirror: the object store through which machines exchange files; None for one disk."""

    root: Path
    folder: Path
    mirror: Mirror | None = None

    @classmethod
    def of_run(cls) -> _Store:
        run = current_run()
        if run is None:
            folder = _temporary_folder()
            return cls(folder, folder)
        return cls.of_home(run.home)

    @classmethod
    def of_home(cls, home: Home) -> _Store:
        return cls(home.root, home.work / FOLDER, home.mirror if os.environ.get("RAY_ADDRESS") else None)

    def place(self, key: str) -> Path:
        return self.folder / key[:2] / key[:40]

    def find(self, key: str) -> Done | None:
        """The whole result of an earlier call, here or in the object store. A damaged one is removed."""
        place = self.place(key)
        if self.mirror and not place.exists() and self.mirror.has(place / DESCRIPTION):
            self.mirror.pull(place)
        about = _read_whole(place)
        if about is None:
            shutil.rmtree(place, ignore_errors=True)
            return None
        with contextlib.suppress(OSError):
            os.utime(place)
        return Done(place, about, found=True)

    def make(self, key: str, function: Function, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Calls the function, unless another process has made the same meanwhile. Returns its description."""
        place = self.place(key)
        place.parent.mkdir(parents=True, exist_ok=True)
        with temporary_path(place) as out:
            out.mkdir()
            with _one_thread():
                about = function(out, **arguments)
            files = {
                path.relative_to(out).as_posix(): [path.stat().st_size, hash_file(path)]
                for path in sorted(out.rglob("*"))
                if path.is_file()
            }
            write_json(out / DESCRIPTION, {"about": about, "files": files})
            try:
                os.rename(out, place)
            except OSError:
                if (there := _read_whole(place)) is None:
                    raise
                return there
        return about

    def local(self, value: Any, theirs: Path) -> Any:
        """`value` with the paths in it that lie below `theirs`, the driver's root, on this machine, and there."""
        if isinstance(value, Path):
            if not value.is_relative_to(theirs):
                return value
            return self._here(self.root / value.relative_to(theirs))
        if isinstance(value, list | tuple):
            return type(value)(self.local(each, theirs) for each in value)
        if isinstance(value, dict):
            return {name: self.local(each, theirs) for name, each in value.items()}
        return value

    def _here(self, path: Path) -> Path:
        """This file or folder of the home on this machine, downloaded if it is not there.

        A part comes whole; files of artifacts go to a place of their own, since half an artifact would be none.
        """
        if self.mirror is None:
            return path
        if path.is_relative_to(self.folder):
            place = self.folder.joinpath(*path.relative_to(self.folder).parts[:2])
            if not (place / DESCRIPTION).is_file():
                self.mirror.pull(place)
            return path
        if path.exists():
            return path
        kept = self.root / "work" / "downloaded" / path.relative_to(self.root)
        if not kept.exists():
            self.mirror.pull(path, kept)
        return kept


def _share(value: Any, store: _Store, known: set[Path]) -> None:
    """Uploads the files and folders in `value` below the home that the object store lacks. known: those it has."""
    if isinstance(value, Path):
        if not store.mirror or value in known or not value.is_relative_to(store.root):
            return
        place, last = value, None
        if value.is_relative_to(store.folder):
            place, last = store.folder.joinpath(*value.relative_to(store.folder).parts[:2]), DESCRIPTION
        if not store.mirror.has(place / DESCRIPTION if last else place):
            store.mirror.push(place, last)
        known.add(value)
    elif isinstance(value, list | tuple):
        for each in value:
            _share(each, store, known)
    elif isinstance(value, Mapping):
        _share(list(value.values()), store, known)


def _read_whole(place: Path) -> dict[str, Any] | None:
    """What a result says of itself; None unless every byte is as it was written."""
    try:
        told = json.loads((place / DESCRIPTION).read_text())
        for name, (size, digest) in told["files"].items():
            path = place / name
            if path.stat().st_size != size or hash_unchanged(path) != digest:
                return None
        about: dict[str, Any] = told["about"]
        return about
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _pays(count: int, work: float, workers: int, gpus: float) -> bool:
    """Whether Ray is worth its start for this many parts of this many CPU seconds together."""
    if count == 0 or workers == 1:
        return False
    if gpus or workers > 1:
        return True
    ray = sys.modules.get("ray")
    running = ray is not None and ray.is_initialized()
    return count > 1 and work > (SECONDS_FOR_TASKS if running else SECONDS_FOR_RAY)


Results = Generator[tuple[int, Done]]


def _here(function: Function, parts: list[Part], store: _Store, workers: int, gpus: float) -> Results:
    for number, part in enumerate(parts):
        yield number, Done(store.place(part.key), store.make(part.key, function, part.arguments))


def _in_ray(function: Function, parts: list[Part], store: _Store, workers: int, gpus: float) -> Results:
    import ray

    from eclectus.tasks.ray_cluster import ensure_ray

    ensure_ray()
    slots = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    remote = ray.remote(_remotely).options(num_cpus=1, num_gpus=gpus, max_retries=0)
    shared: set[Path] = set()
    waiting, tries, running = deque(range(len(parts))), [0] * len(parts), dict[Any, int]()
    try:
        while waiting or running:
            while waiting and len(running) < slots:
                number = waiting.popleft()
                _share(parts[number].arguments, store, shared)
                running[remote.remote(function, parts[number].key, dict(parts[number].arguments), store)] = number
            reference = ray.wait(list(running))[0][0]
            number = running.pop(reference)
            tries[number] += 1
            try:
                about, seconds = ray.get(reference)
            except ray.exceptions.RayError as error:
                reason = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
                if isinstance(reason, EclectusError):
                    raise reason from None
                if tries[number] >= TRIES:
                    raise EclectusError(_failed(parts[number], reason)) from error
                if isinstance(error, ray.exceptions.OutOfMemoryError | ray.exceptions.WorkerCrashedError):
                    slots = max(1, slots // 2)
                waiting.append(number)
                continue
            if run := current_run():
                run.remote_seconds += seconds
            place = store.place(parts[number].key)
            if not (place / DESCRIPTION).is_file() and store.find(parts[number].key) is None:
                waiting.append(number)
                continue
            yield number, Done(place, about)
    finally:
        for reference in running:
            with contextlib.suppress(Exception):
                ray.cancel(reference, force=True)


def _remotely(function: Function, key: str, arguments: dict[str, Any], theirs: _Store) -> tuple[dict[str, Any], float]:
    """In a Ray worker: the same call with this machine's paths. Returns the description, and CPU seconds."""
    began = sum(os.times()[:4])
    if theirs.mirror:
        mine = _Store.of_home(_home_here(theirs.mirror.url))
        about = mine.make(key, function, mine.local(arguments, theirs.root))
        if mine.mirror:
            mine.mirror.push(mine.place(key), last=DESCRIPTION)
    else:
        about = theirs.make(key, function, arguments)
    return about, sum(os.times()[:4]) - began


@functools.cache
def _home_here(url: str) -> Home:
    return Home.open(url)


def _failed(part: Part, reason: BaseException) -> str:
    first = (str(reason).strip().splitlines() or [type(reason).__name__])[0]
    return f"{part.name or 'a part'} failed {TRIES} times ({type(reason).__name__}: {first}); run again to resume there"


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
