"""Questions on the lineage of a home in SQL, and their answers from its files by plain Python.

Journals are read line by line (and their Parquet parts row by row), runs and steps are put together here, lineage is
walked here: nothing of `eclectus.storage.lineage` is used.
"""

from __future__ import annotations

import collections
import contextlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

Rows = list[dict[str, Any]]


class Files:
    """What the journals of a home say: runs and steps by id (first and last event merged), metrics, decisions."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.runs: dict[str, dict[str, Any]] = {}
        self.steps: dict[str, dict[str, Any]] = {}
        for row in read_journals(home, "events"):
            event = row["event"]
            if event in ("run_started", "run_ended"):
                merge(self.runs.setdefault(row["run"], {"state": "unfinished"}), row, event == "run_ended")
            elif event in ("step_started", "step_ended"):
                merge(self.steps.setdefault(row["step"], {"state": "unfinished"}), row, event == "step_ended")
        self.metrics, self.decisions = list(read_journals(home, "metrics")), list(read_journals(home, "decisions"))
        self.decisions.sort(key=lambda row: row["logged"])
        # Artifact -> what it was made from: the inputs of every step that gave it.
        self.made_from: dict[str, set[str]] = collections.defaultdict(set)
        self.kinds: dict[str, str] = {}
        for step in self.steps.values():
            if output := step.get("output"):
                self.kinds[output["artifact"]] = output["kind"]
                self.made_from[output["artifact"]] |= {digest_of(each) for each in (step.get("inputs") or {}).values()}

    def ended(self) -> list[dict[str, Any]]:
        return [step for step in self.steps.values() if step["state"] != "unfinished"]

    def champion(self) -> str:
        promoted = [row for row in self.decisions if row["verdict"] == "promoted"]
        return promoted[-1]["checkpoint"] if promoted else ""

    def upstream(self, artifact: str) -> set[str]:
        found, left = {artifact}, [artifact]
        while left:
            for each in self.made_from.get(left.pop(), ()):
                if each not in found:
                    found.add(each)
                    left.append(each)
        return found

    def downstream(self, artifact: str) -> set[str]:
        return {each for each in [*self.made_from, artifact] if artifact in self.upstream(each)}

    def ingested(self) -> str:
        """The first documents artifact of all."""
        steps = [step for step in self.ended() if step["name"] == "ingest" and step.get("output")]
        return min(steps, key=lambda step: step["logged"])["output"]["artifact"]


def read_journals(home: Path, stream: str = "events") -> Iterator[dict[str, Any]]:
    """Rows of every journal once; a live one is read before its part is listed, so none is missed meanwhile."""
    folder = home / "journal" / stream
    live = {}
    for path in sorted(folder.glob("2*.ndjson")):
        with contextlib.suppress(FileNotFoundError):
            live[path.name] = path.read_bytes()
    compacted = set()
    for path in sorted(folder.glob("[0-9]*.parquet")):
        with contextlib.suppress(FileNotFoundError):
            rows = [row for row in pq.read_table(path).to_pylist() if row["journal"] not in compacted]
            compacted |= {row["journal"] for row in rows}
            yield from map(plain, rows)
    for name, content in live.items():
        for line in content.splitlines() if name not in compacted else ():
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and row.get("logged"):
                    yield row


def merge(known: dict[str, Any], row: dict[str, Any], is_end: bool) -> None:
    """The end's values win, whichever is read first; `started` is when the first was logged."""
    for name, value in row.items():
        if value is not None and (is_end or known.get(name) is None or (name == "state" and is_end)):
            known[name] = value
    known["has end"] = known.get("has end", False) or is_end
    if not is_end:
        known["started"] = row["logged"]


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """A row of Parquet as the journal wrote it."""
    given = {name: value for name, value in row.items() if value is not None}
    for name in ("inputs", "settings", "tags"):
        if isinstance(given.get(name), list):
            given[name] = dict(given[name])
    for name in ("parameters", "packages", "evaluations", "rules"):
        if isinstance(given.get(name), str):
            given[name] = json.loads(given[name])
    if name := given.get("settings"):
        given["settings"] = {key: json.loads(value) for key, value in name.items()}
    given["logged"] = str(given["logged"])
    return given


def digest_of(name: str) -> str:
    found = re.fullmatch(r"[a-z]+-([0-9a-f]+)", name)
    return found[1] if found else name


def counted(values: Any) -> Rows:
    """Rows (value, n), in the order of the values."""
    counts = collections.Counter(values)
    return [{"value": value, "n": counts[value]} for value in sorted(counts)]


def total(pairs: Any) -> Rows:
    """Rows (value, n): a sum by value."""
    sums: dict[str, float] = collections.defaultdict(float)
    for value, number in pairs:
        sums[value] += number
    return [{"value": value, "n": round(sums[value], 3)} for value in sorted(sums)]


def outputs(files: Files) -> list[dict[str, Any]]:
    return [step for step in files.ended() if step.get("output")]


def first_sizes(files: Files, field: str) -> Rows:
    """Of each artifact once, by kind."""
    first: dict[str, dict[str, Any]] = {}
    for step in sorted(outputs(files), key=lambda step: step["logged"]):
        first.setdefault(step["output"]["artifact"], step["output"])
    return total((each["kind"], each[field] or 0) for each in first.values())


def last_losses(files: Files) -> Rows:
    last: dict[str, tuple[int, float]] = {}
    for row in files.metrics:
        if row["name"] == "loss" and row["value"] is not None and row.get("at_step") is not None:
            last[row["step"]] = max(last.get(row["step"], (-1, 0.0)), (row["at_step"], row["value"]))
    return [{"value": step, "n": round(last[step][1], 6)} for step in sorted(last)]


def by(name: str, table: str, where: str = "true") -> str:
    return f'select {name} as "value", count(*) as n from {table} where {where} group by all order by all'


def sums(name: str, number: str, table: str) -> str:
    return f'select {name} as "value", round(sum({number}), 3) as n from {table} group by all order by 1'


def names(rows: Any) -> Rows:
    return [{"value": each} for each in sorted(rows)]


# What is asked, in SQL, and the answer from the files.
QUESTIONS: dict[str, tuple[str, Callable[[Files], Rows]]] = {
    "how did the runs end": (by("state", "runs"), lambda files: counted(run["state"] for run in files.runs.values())),
    "which flows ran": (by("flow", "runs"), lambda files: counted(run["flow"] for run in files.runs.values())),
    "which runs were there": (
        'select run as "value" from runs order by 1', lambda files: names(files.runs)),
    "which runs were killed": (
        "select run as \"value\" from runs where state = 'crashed' order by 1",
        lambda files: names(name for name, run in files.runs.items() if run["state"] == "crashed")),
    "which runs have no end": (
        'select run as "value" from runs where ended is null order by 1',
        lambda files: names(name for name, run in files.runs.items() if not run["has end"])),
    "why did runs fail": (
        by("error", "runs", "error is not null"),
        lambda files: counted(run["error"] for run in files.runs.values() if run.get("error"))),
    "which flow runs of Prefect completed": (
        "select prefect_flow_run as \"value\" from runs where state = 'completed' and prefect_flow_run is not null "
        "order by 1",
        lambda files: names(run["prefect_flow_run"] for run in files.runs.values()
                            if run["state"] == "completed" and run.get("prefect_flow_run"))),
    "how long did completed runs take": (
        "select run as \"value\", round(seconds, 3) as n from runs where state = 'completed' order by 1",
        lambda files: [{"value": name, "n": round(run["seconds"], 3)} for name, run in sorted(files.runs.items())
                       if run["state"] == "completed"]),
    "how did the steps end": (
        by("state", "steps"), lambda files: counted(step["state"] for step in files.steps.values())),
    "which steps were reused": (
        by("label", "steps", "state = 'reused'"),
        lambda files: counted(step["label"] for step in files.steps.values() if step["state"] == "reused")),
    "why were steps run or reused": (
        by("reason", "steps", "reason is not null"),
        lambda files: counted(step["reason"] for step in files.steps.values() if step.get("reason"))),
    "what took the time": (
        sums("name", "coalesce(seconds, 0)", "steps"),
        lambda files: total((step["name"], step.get("seconds") or 0) for step in files.steps.values())),
    "how many artifacts are there": (
        by("kind", "artifacts"), lambda files: counted(files.kinds[each] for each in files.kinds)),
    "how much do artifacts take": (
        sums("kind", "coalesce(bytes, 0)", "artifacts"), lambda files: first_sizes(files, "bytes")),
    "what was read": (
        by("kind", "step_inputs", "kind in ('documents', 'checkpoint', 'tokenizer', 'grouping', 'instances')"),
        lambda files: counted(each.rpartition("-")[0] for step in files.ended()
                              for each in (step.get("inputs") or {}).values()
                              if re.fullmatch(r"(documents|checkpoint|tokenizer|grouping|instances)-[0-9a-f]+", each))),
    "what was written": (
        by("kind", "step_outputs", "not reused"),
        lambda files: counted(step["output"]["kind"] for step in outputs(files) if step["state"] != "reused")),
    "which thresholds were set": (
        "select cast(value as varchar) as \"value\", count(*) as n from settings where name = 'retrain_documents' "
        "group by all order by all",
        lambda files: counted(str(step["settings"]["retrain_documents"]) for step in files.ended()
                              if "retrain_documents" in (step.get("settings") or {}))),
    "how many numbers were measured": (
        by("name", "metrics"), lambda files: counted(row["name"] for row in files.metrics)),
    "where did each training's loss end": (
        "select step as \"value\", round(arg_max(value, at_step), 6) as n from metrics "
        "where name = 'loss' and at_step is not null group by step order by 1", last_losses),
    "what did the gate decide": (
        by("verdict", "decisions"), lambda files: counted(row["verdict"] for row in files.decisions)),
    "which model is champion": (
        'select checkpoint as "value" from champions', lambda files: names(filter(None, [files.champion()]))),
    "what was the champion made from": (
        "select artifact as \"value\" from upstream((select 'checkpoint-' || any_value(checkpoint) from champions)) "
        "order by 1",
        lambda files: names(files.upstream(files.champion()) if files.champion() else ())),
    "what was made from the first documents": (
        "select artifact as \"value\" from downstream((select 'documents-' || arg_min(artifact, s.ended) "
        "from step_outputs join steps s using (step) where s.name = 'ingest')) order by 1",
        lambda files: names(files.downstream(files.ingested()))),
}  # fmt: skip


def wrong_answers(home: Path, ask: Callable[[str], Rows]) -> list[str]:
    """Complaints, one for each question that SQL (`ask`) answers otherwise than the files."""
    files, complaints = Files(home), []
    for question, (sql, answer) in QUESTIONS.items():
        found, expected = ask(sql), answer(files)
        if found != expected:
            complaints.append(f"'{question}': {differing(found, expected)}: {sql}")
    return complaints


def differing(found: Rows, expected: Rows) -> str:
    more = [row for row in found if row not in expected]
    less = [row for row in expected if row not in found]
    return f"only in SQL {str(more)[:300]}, only in the files {str(less)[:300]}"
