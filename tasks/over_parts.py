"""One function applied to many parts: in this process while that is little work, as Ray tasks otherwise.

    a part      the arguments of one call, and a key: the digest of everything on which the result depends
    a result    a folder of files and a description, in the home's `work/parts/<key>` (tasks/part_store.py). Whoever
                needs the same part later finds it, in a run that resumes after a kill as in a run on a corpus that has
                grown
    a failure   a part is tried three times, on other workers if there are others; then the error names it. An
                EclectusError ends the work at once, but for a full disk of one machine of several, which gets no more
                calls. After workers that died fewer calls run at a time, and more again when none dies

A function computes with one thread and gets nothing but its arguments, so its result does not depend on where it ran,
nor on how many ran beside it (one that imports faiss or torch sets their threads itself: they are read at the import).
Parts are as large as the caller cuts them, never cut by the number of workers.

Paths in the arguments that lie below the home are there when the function is called, also on machines that share an
object store and no disk. Ray's start costs 8 s and each of its processes about 1 s of imports, hence the choice by CPU
seconds.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import sys
import time
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from eclectus.storage.disk_full import NoRoom
from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.storage.unused import free_cache
from eclectus.tasks.part_store import DESCRIPTION, DamagedInput, Done, Function, PartStore, link_or_copy
from eclectus.tasks.run import current_run, notify, progress

__all__ = ["DESCRIPTION", "Done", "Part", "find", "forget", "key_of", "link_or_copy", "over_parts"]

TRIES = 3
SECONDS_FOR_RAY = 40.0
"""Work for which starting Ray pays: its start, and the imports of its processes."""
SECONDS_FOR_TASKS = 2.0
"""The same once Ray runs."""
LOOKUPS = 32
"""Results looked for at once on an object store, whose every answer may take 2 s."""
MOST_NAMED = 3
PATIENCE = 60.0
"""Seconds without a finished part, after which it is asked whether any node can compute one."""
NODE = "ray.io/node-id"


@dataclass(frozen=True)
class Part:
    """One call. key: of `key_of`. size: of the work, in the unit of the progress. name: for messages."""

    key: str
    arguments: Mapping[str, Any]
    size: float = 1
    name: str = ""


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
    store = PartStore.of_run()
    with ThreadPoolExecutor(LOOKUPS if store.mirror else os.cpu_count()) as pool:
        done = list(pool.map(store.find, [part.key for part in parts]))
    _report_damage(store)
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
    store = PartStore.of_run()
    found = store.find(key)
    _report_damage(store)
    return found


def forget(done: Sequence[Done]) -> None:
    """Removes results that no later run would look for."""
    store = PartStore.of_run()
    with ThreadPoolExecutor(LOOKUPS if store.mirror else 1) as pool:
        list(pool.map(store.forget, [each.folder for each in done]))


def _report_damage(store: PartStore) -> None:
    if store.damaged:
        more = len(store.damaged) - MOST_NAMED
        notify("damaged parts", "; ".join(store.damaged[:MOST_NAMED]) + (f"; and {more} more" if more > 0 else ""))


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


def _here(function: Function, parts: list[Part], store: PartStore, workers: int, gpus: float) -> Results:
    for number, part in enumerate(parts):
        yield number, Done(store.place(part.key), store.make(part.key, function, part.arguments))


def _in_ray(function: Function, parts: list[Part], store: PartStore, workers: int, gpus: float) -> Results:
    import ray

    from eclectus.tasks.ray_cluster import ensure_ray

    ensure_ray()
    calls = _Calls(function, parts, store, gpus)
    slots, waiting, running = _Slots(workers), deque(range(len(parts))), dict[Any, tuple[int, float]]()
    try:
        while waiting or running:
            while waiting and len(running) < slots.now():
                number = waiting.popleft()
                running[calls.begin(number)] = number, time.monotonic()
            ready = ray.wait(list(running), timeout=PATIENCE)[0]
            if not ready:
                calls.report_waiting()
                continue
            (reference,) = ready
            number, began = running.pop(reference)
            try:
                about, seconds = ray.get(reference)
            except ray.exceptions.RayError as error:
                calls.failed(number, error)
                if isinstance(error, ray.exceptions.OutOfMemoryError | ray.exceptions.WorkerCrashedError):
                    slots.died(began)
                waiting.append(number)
                continue
            slots.went_well()
            if run := current_run():
                run.remote_seconds += seconds
            if calls.arrived(number):
                yield number, Done(store.place(parts[number].key), about)
            else:
                waiting.append(number)
    finally:
        for reference in running:
            with contextlib.suppress(Exception):
                ray.cancel(reference, force=True)


class _Slots:
    """How many calls run at a time: half as many after workers that died, twice as many after a while without."""

    def __init__(self, workers: int) -> None:
        """workers: at most; 0: as many as the cluster has CPUs, also of nodes that join or leave meanwhile."""
        self._workers = workers
        self._fewer = 1
        self._lowered = float("-inf")
        self._well = 0

    def now(self) -> int:
        return max(1, (self._workers or _cluster_cpus()) // self._fewer)

    def died(self, began: float) -> None:
        """A worker died in a call that began then; calls that died together with an earlier one count as one."""
        if began > self._lowered:
            self._fewer = min(2 * self._fewer, 2**10)
            self._lowered, self._well = time.monotonic(), 0

    def went_well(self) -> None:
        self._well += 1
        if self._fewer > 1 and self._well >= 8 * self.now():
            self._fewer, self._well = self._fewer // 2, 0


def _cluster_cpus() -> int:
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 1)))


@dataclass
class _Calls:
    """Calls of one function as Ray tasks, and what became of them. full: nodes whose disk is, by their Ray names."""

    function: Function
    parts: list[Part]
    store: PartStore
    gpus: float
    tries: dict[int, int] = field(default_factory=dict)
    shared: set[Any] = field(default_factory=set)
    full: set[str] = field(default_factory=set)
    incomplete: set[int] = field(default_factory=set)
    waited: bool = False

    @property
    def _resource(self) -> str:
        return "GPU" if self.gpus else "CPU"

    def begin(self, number: int) -> Any:
        import ray

        part = self.parts[number]
        self.tries[number] = self.tries.get(number, 0) + 1
        self.store.share(part.arguments, self.shared, again=number in self.incomplete)
        others = {NODE: f"!in({','.join(sorted(self.full))})"} if self.full else None
        remote = ray.remote(_remotely).options(
            num_cpus=1,
            num_gpus=self.gpus,
            max_retries=0,
            name=part.name or self.function.__name__,
            label_selector=others,
        )
        return remote.remote(self.function, part.key, dict(part.arguments), self.store)

    def failed(self, number: int, error: Any) -> None:
        """Returns if the part is to be tried again. Raises EclectusError otherwise."""
        import ray

        part = self.parts[number]
        reason = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
        if isinstance(reason, NoRoom) and self.store.mirror:
            # Each machine has a disk of its own.
            if reason.node not in self.full:
                self.full.add(reason.node)
                self.tries[number] -= 1
                notify("full disk", f"{part.name or 'a part'}: {reason}; this machine gets no more parts of this step")
            if self._others_have_room() and self.tries[number] < TRIES:
                return
        if isinstance(reason, EclectusError):
            raise reason from None
        if isinstance(reason, DamagedInput):
            self.incomplete.add(number)
        if self.tries[number] >= TRIES:
            raise EclectusError(_failed(part, reason)) from error

    def _others_have_room(self) -> bool:
        import ray

        nodes = {node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get(self._resource)}
        return bool(nodes - self.full)

    def report_waiting(self) -> None:
        """Says once that no call can run."""
        if not self.waited and not self._others_have_room():
            self.waited = True
            notify("waiting", f"no node of the Ray cluster has a {self._resource}; waiting for one to join")

    def arrived(self, number: int) -> bool:
        """Whether the result is here, downloaded if need be. Raises EclectusError if it is not after every try."""
        part = self.parts[number]
        place = self.store.place(part.key)
        if (place / DESCRIPTION).is_file() or self.store.find(part.key) is not None:
            return True
        if self.tries[number] >= TRIES:
            raise EclectusError(
                f"{part.name or 'a part'} was computed {TRIES} times by workers of the cluster, and its result is not "
                f"in {place} of this machine; put the home where all nodes see it: on a shared disk, or s3://"
            )
        return False


def _remotely(
    function: Function, key: str, arguments: dict[str, Any], theirs: PartStore
) -> tuple[dict[str, Any], float]:
    """In a Ray worker: the same call with this machine's paths. Returns the description, and CPU seconds."""
    began = sum(os.times()[:4])
    try:
        if theirs.mirror:
            mine = PartStore.of_home(_home_here(theirs.mirror.url))
            about = mine.make(key, function, mine.local(arguments, theirs.root))
            if mine.mirror:
                mine.mirror.push(mine.place(key), last=DESCRIPTION)
        else:
            about = theirs.make(key, function, arguments)
    except NoRoom as full:
        import ray

        full.node = ray.get_runtime_context().get_node_id()
        raise
    return about, sum(os.times()[:4]) - began


@functools.cache
def _home_here(url: str) -> Home:
    home = Home.open(url)
    free_cache(home)
    return home


def _failed(part: Part, reason: BaseException) -> str:
    import ray

    first = (str(reason).strip().splitlines() or [type(reason).__name__])[0]
    memory = ""
    if isinstance(reason, ray.exceptions.OutOfMemoryError | ray.exceptions.WorkerCrashedError):
        memory = "if memory was short, set fewer curation_workers or a smaller part_megabytes; "
    return (
        f"{part.name or 'a part'} failed {TRIES} times ({type(reason).__name__}: {first}); {memory}"
        "run again to resume there"
    )
