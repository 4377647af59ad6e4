"""From rows of the journal to what trackers are told of a run.

Numbers with a training step are told as they come, to a run of their own for each training; everything else a step has
to say when it ends, to the Eclectus run: numbers as `LABEL/NAME`, the scores and the load of each expert by layer of an
evaluation, tables and page of a report.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb

from eclectus.storage.home import Home
from eclectus.storage.lineage.sql.files import readable
from eclectus.storage.trackers.journals import earlier_attempts
from eclectus.storage.trackers.sink import Sink
from eclectus.storage.trackers.tracker import Page, Point, Table, TrackedRun

# Tags that say what a number is of; others are named with their value.
PLAIN = ("language", "domain", "task")
SURROUNDINGS = ("flow", "code_version", "host", "python")
_SCORES = """
    select level, language, domain, round(bits_per_byte::double, 4) as bits_per_byte,
           round(perplexity::double, 2) as perplexity, documents, tokens
    from read_parquet({files}) order by level, language, domain"""
_LOAD = """
    select layer, expert, round((sum(share * routed) / sum(routed))::double, 4) as share,
           round((sum(top_k_share * routed) / sum(routed))::double, 4) as top_k_share
    from read_parquet({files}) group by layer, expert order by layer, expert"""


@dataclass
class _Step:
    """A step that has begun. training: its run in the trackers, once it has logged a number with a step."""

    row: dict[str, Any]
    points: list[Point] = field(default_factory=list)
    training: TrackedRun | None = None


class Rows:
    """Takes the rows of one run and feeds the sinks."""

    def __init__(self, home: Home, run: str, sinks: Sequence[Sink]) -> None:
        self._home, self._sinks = home, sinks
        self._run = TrackedRun(run)
        self._steps: dict[str, _Step] = {}

    def knows(self, step: str) -> bool:
        return step in self._steps

    def event(self, row: dict[str, Any]) -> None:
        """A row of the journal's events."""
        kind = row["event"]
        if kind == "run_started":
            about = {name: row[name] for name in SURROUNDINGS if row.get(name)}
            config = {**(row.get("parameters") or {}), **about}
            self._run = TrackedRun(row["run"], "", config, seconds_of(row["logged"]))
        elif kind == "step_started":
            self._steps[row["step"]] = _Step(row)
        elif kind == "step_ended" and (step := self._steps.pop(row["step"], None)):
            self._step_ended(step, row)
        elif kind == "run_ended":
            self.end(row["state"])

    def metric(self, row: dict[str, Any]) -> None:
        """A row of the journal's metrics, of a step that has begun."""
        step, point = self._steps[row["step"]], point_of(row)
        if point is None:
            return
        if point.step is None:
            step.points.append(point)
            return
        if step.training is None:
            step.training = self._begin(step.row)
        for sink in self._sinks:
            sink.log(step.training, point)

    def end(self, state: str) -> None:
        """The run has ended, and with it what had begun."""
        for step in self._steps.values():
            self._end_training(step, state)
        self._steps.clear()
        for sink in self._sinks:
            sink.end(self._run, state)

    def _begin(self, row: dict[str, Any]) -> TrackedRun:
        """The run of a training. One that was begun before keeps its name, and its earlier numbers come first."""
        attempts, metrics = earlier_attempts(self._home, row)
        first = attempts[0] if attempts else row
        config = {**(row.get("settings") or {}), "run": self._run.run}
        for sink in self._sinks:
            sink.open(self._run)
        training = TrackedRun(first["run"], row["label"], config, seconds_of(first["logged"]))
        for each in metrics:
            for sink in self._sinks:
                if point := point_of(each):
                    sink.log(training, point)
        return training

    def _step_ended(self, step: _Step, row: dict[str, Any]) -> None:
        self._end_training(step, row["state"])
        if row["state"] != "completed":
            return
        label, output = step.row["label"], row.get("output") or {}
        points = [Point(f"{label}/{each.name}", each.value, None, each.at) for each in step.points]
        tables, pages = _shown(label, output)
        if points or tables or pages:
            for sink in self._sinks:
                sink.part(self._run, row["step"], points, tables, pages)

    def _end_training(self, step: _Step, state: str) -> None:
        if step.training is not None:
            for sink in self._sinks:
                sink.end(step.training, state)


def point_of(row: dict[str, Any]) -> Point | None:
    """The number of a row of metrics; None for one that is no number, of which its tags say what it was."""
    tags, value = dict(row.get("tags") or {}), row["value"]
    if value is None:
        return None
    parts = [value if name in PLAIN else f"{name} {value}" for name, value in tags.items()]
    return Point("/".join([row["name"], *parts]), float(value), row["at_step"], seconds_of(row["logged"]))


def seconds_of(logged: str | datetime.datetime) -> float:
    """Seconds since 1970 of a time of the journal, which is UTC."""
    moment = datetime.datetime.fromisoformat(logged) if isinstance(logged, str) else logged
    return moment.replace(tzinfo=datetime.UTC).timestamp()


def _shown(label: str, output: dict[str, Any]) -> tuple[list[Table], list[Page]]:
    """Tables and pages of a step's output, if its files are still there."""
    folder = Path(output.get("path") or "")
    if output.get("kind") == "evaluation":
        found = [_query(f"{label}/scores", folder / "scores.parquet", _SCORES),
                 _query(f"{label}/expert load", folder / "routing.parquet", _LOAD)]  # fmt: skip
        return [table for table in found if table is not None], []
    page = folder / "report.html"
    if output.get("kind") != "report" or not page.is_file():
        return [], []
    text = folder / "report.md"
    markdown = text.read_text("utf-8") if text.is_file() else ""
    return list(_tables_of_report(label, folder / "tables.json")), [Page(label, page, markdown)]


def _query(name: str, file: Path, sql: str) -> Table | None:
    if not file.is_file():
        return None
    try:
        with duckdb.connect() as connection:
            answer = connection.execute(sql.format(files=readable(file)))
            columns, rows = [column[0] for column in answer.description or []], answer.fetchall()
    except duckdb.Error:
        # An evaluation of another kind has other columns.
        return None
    return (name, columns, rows) if rows else None


def _tables_of_report(label: str, file: Path) -> Iterable[Table]:
    tables = json.loads(file.read_text("utf-8")) if file.is_file() else []
    for table in tables:
        if table["rows"]:
            columns = list(table["rows"][0])
            yield f"{label}/{table['title']}", columns, [[row.get(name) for name in columns] for row in table["rows"]]
