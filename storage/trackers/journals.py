"""The rows of a run: as its journal grows, or as the lineage has them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eclectus.storage.home import Home
from eclectus.storage.journal import EVENTS, METRICS
from eclectus.storage.lineage.connection import connect

# At one time a step begins, logs, and ends.
_ORDER = {"run_started": 0, "step_started": 1, "metric": 2}
LAST = 3


class Tail:
    """Reads what is added to the journals of a run. Its files stay open, so compaction takes nothing away."""

    def __init__(self, home: Home, run: str) -> None:
        self._folders = [home.journal / EVENTS, home.journal / METRICS]
        self._run = run
        self._files: dict[Path, Any] = {}
        self._rests: dict[Path, bytes] = {}

    def read(self) -> list[dict[str, Any]]:
        """The rows that were added since the last call, in the order of their times."""
        rows: list[dict[str, Any]] = []
        # Events first: a metric that is read was logged after the beginning of its step, which is then read too, or
        # comes with the next call.
        for folder in self._folders:
            for path in sorted(folder.glob(f"{self._run}.*.ndjson")):
                rows += self._added(path)
        return sorted(rows, key=lambda row: (row["logged"], _ORDER.get(row.get("event", "metric"), LAST)))

    def close(self) -> None:
        for handle in self._files.values():
            handle.close()

    def _added(self, path: Path) -> Iterator[dict[str, Any]]:
        handle = self._files.get(path)
        if handle is None:
            handle = self._files[path] = path.open("rb")
        lines = (self._rests.get(path, b"") + handle.read()).split(b"\n")
        self._rests[path] = lines.pop()
        for line in lines:
            try:
                row = json.loads(line)
                row["logged"]
            except (ValueError, KeyError, TypeError):
                # Compaction quarantines it.
                continue
            yield row


def recorded(home: Home, run: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(stream, row) of a run as its journals had them: each step's beginning, numbers and end."""
    with connect(home) as connection:
        events = _rows(connection, "select * from events where run = $run order by started", {"run": run})
        metrics: dict[str, list[dict[str, Any]]] = {}
        for row in _rows(connection, "select * from metrics where run = $run order by logged", {"run": run}):
            metrics.setdefault(row["step"], []).append(row)
    whole = [row for row in events if row["event"] in ("run_started", "run_ended")]
    for row in whole:
        yield EVENTS, {**row, "event": "run_started", "logged": row["started"], "parameters": _read(row["parameters"])}
    for row in events:
        if row["event"] not in ("step_started", "step_ended"):
            continue
        settings = {name: _read(value) for name, value in dict(row["settings"] or {}).items()}
        begun = {**row, "event": "step_started", "logged": row["started"], "settings": settings}
        yield EVENTS, begun
        yield from ((METRICS, each) for each in metrics.get(row["step"], []))
        if row["event"] == "step_ended":
            yield EVENTS, row
    for row in whole:
        if row["event"] == "run_ended":
            yield EVENTS, row


def earlier_attempts(home: Home, row: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(beginnings, metrics) of the earlier attempts at a training that did not complete, oldest first.

    row: of the beginning of the attempt. It has the same key as they, and resumed from what they left.
    """
    if not row.get("key"):
        return [], []
    with connect(home, writes=os.access(home.journal, os.W_OK)) as connection:
        attempts: list[dict[str, Any]] = []
        for each in _rows(connection, _ATTEMPTS, {"key": row["key"], "step": row["step"], "before": row["logged"]}):
            if each["state"] in ("completed", "reused"):
                break
            attempts.insert(0, each)
        metrics = _rows(
            connection,
            "select * from metrics where list_contains($steps, step) and at_step is not null order by logged",
            {"steps": [each["step"] for each in attempts]},
        )
    return attempts, metrics


_ATTEMPTS = """
    select step, run, state, started as logged from steps
    where key = $key and step != $step and started < $before::timestamp order by started desc"""


def _rows(connection: Any, sql: str, values: dict[str, Any]) -> list[dict[str, Any]]:
    answer = connection.execute(sql, values)
    names = [column[0] for column in answer.description]
    return [dict(zip(names, row, strict=True)) for row in answer.fetchall()]


def _read(value: str | None) -> Any:
    return None if value is None else json.loads(value)
