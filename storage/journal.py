"""The journal: each process appends events to files of its own, so that none ever waits for a lock.

Three streams of newline-delimited JSON, `events/` (runs and steps), `metrics/` and `decisions/` (champions), with one
file per run and process. An event is one line, written with one `write` and synced: a kill loses at most the line being
written. Metrics go to the operating system line by line and are synced at close. A writer holds a lock on its own file,
which the system releases when the process ends in any way: so `eclectus.storage.lineage.compact` knows which journals
are finished and may become Parquet. `eclectus.storage.lineage.connection` reads both forms.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import math
import os
import socket
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from eclectus.storage.errors import EclectusError
from eclectus.storage.mirror import Mirror
from eclectus.storage.secrets import scrubber

EVENTS = "events"
METRICS = "metrics"
DECISIONS = "decisions"


def now() -> str:
    """UTC, ISO 8601 with microseconds, as DuckDB reads it into a TIMESTAMP."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S.%f")


class Journal:
    """The journal of this process for one run. A file is created with its first line.

    Secrets of the environment are hidden (`eclectus.storage.secrets`). Raises EclectusError when a line cannot be
    written.
    """

    def __init__(self, root: Path, run: str, mirror: Mirror | None = None) -> None:
        """mirror: the object store to which the journal is uploaded at every event, and at the end."""
        self.root = root
        self.mirror = mirror
        self.run = run
        self._name = f"{run}.{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:4]}.ndjson"
        self._handles: dict[str, int] = {}
        self._scrub = scrubber()
        self._steps: dict[str, dict[str, Any]] = {}

    def event(self, event: str, sync: bool = True, **columns: Any) -> None:
        """One event (`run_started`, `run_ended`, `step_started`, `step_ended`), on disk when this returns.

        sync: False leaves that to the next event: a run that reuses many steps waits for the disk once.
        """
        row = {"event": event, "logged": now(), "run": self.run, **columns}
        handle = self._write(EVENTS, row)
        if event == "step_started":
            self._steps[row["step"]] = row
        elif event == "step_ended":
            self._steps.pop(row["step"], None)
        if sync:
            os.fsync(handle)
            self._push(EVENTS)

    def end_steps(self, state: str, reason: str) -> None:
        """Ends the steps that have none yet: a signal may arrive between the two events of a step."""
        for row in list(self._steps.values()):
            self.event("step_ended", **cut_short(row, state, reason, now()))

    def metric(
        self, step: str, name: str, value: float, at_step: int | None = None, tags: dict[str, str] | None = None
    ) -> None:
        """One number of a step: `loss`, 2.31, at training step 40. tags: what it was measured on (language, expert)."""
        self._write(
            METRICS,
            {
                "logged": now(),
                "run": self.run,
                "step": step,
                "name": name,
                "value": value,
                "at_step": at_step,
                "tags": tags or {},
            },
        )

    def decision(self, **columns: Any) -> None:
        """One decision on a model (storage/lineage/champions.py), on disk when this returns."""
        os.fsync(self._write(DECISIONS, {"logged": now(), "run": self.run, **columns}))
        self._push(DECISIONS)

    def take(self, stream: str, row: dict[str, Any]) -> None:
        """A row as another home's journal had it, with its own times."""
        self._write(stream, row)

    def close(self) -> None:
        for stream, handle in self._handles.items():
            os.fsync(handle)
            os.close(handle)
            self._push(stream)
        self._handles.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _push(self, stream: str) -> None:
        if self.mirror:
            self.mirror.push(self.root / stream / self._name)

    def _write(self, stream: str, row: dict[str, Any]) -> int:
        if stream != METRICS:
            # A Prefect block or a login may have added a secret; checking at every metric would be too slow.
            self._scrub = scrubber()
        try:
            line = json.dumps(row, allow_nan=False, default=str)
        except ValueError:
            line = json.dumps(_without_nan(row), default=str)
        try:
            handle = self._handles.get(stream)
            if handle is None:
                handle = self._handles[stream] = _open_held(self.root / stream, self._name)
            self._append(handle, self._scrub(line).encode() + b"\n")
        except OSError as error:
            raise EclectusError(
                f"the journal {self.root / stream / self._name} cannot be written: {error.strerror}; "
                "free space, or set --home to another folder"
            ) from error
        return handle

    def _append(self, handle: int, line: bytes) -> None:
        """One whole line, or none: what a full disk took of it is taken back."""
        written = 0
        try:
            while written < len(line):
                written += os.write(handle, line[written:])
        except OSError:
            if written:
                os.ftruncate(handle, os.fstat(handle).st_size - written)
            raise


def cut_short(started: dict[str, Any], state: str, reason: str, last: str) -> dict[str, Any]:
    """Columns of the event `step_ended` of a step of which only the start was journaled. last: time heard of it."""
    known = {name: started.get(name) for name in ("step", "name", "label", "flow", "key")}
    return {**known, "state": state, "reason": reason, "seconds": seconds_between(started["logged"], last)}


def seconds_between(first: str, last: str) -> float:
    """Seconds between two times of the journal."""
    passed = datetime.datetime.fromisoformat(last) - datetime.datetime.fromisoformat(first)
    return round(passed.total_seconds(), 3)


def _open_held(folder: Path, name: str) -> int:
    """A new journal, locked by this process before it has its name."""
    folder.mkdir(parents=True, exist_ok=True)
    opening = folder / f"{name}.opening"
    handle = os.open(opening, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    # Without locks in the file system, a journal counts as finished when it has not grown for a day.
    with contextlib.suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.rename(opening, folder / name)
    return handle


def _without_nan(row: dict[str, Any]) -> dict[str, Any]:
    """Null for numbers that JSON does not have; a metric keeps in its tags which it was."""
    value = row.get("value")
    if isinstance(value, float) and not math.isfinite(value):
        row = {**row, "tags": {**row.get("tags", {}), "value": str(value)}}
    return _nulls(row)


def _nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _nulls(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_nulls(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
