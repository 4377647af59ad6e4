"""Lineage from another home: the runs of a bundle (storage/lineage/bundle.py) become journals of this one.

A bundle may come from anywhere. It is opened read-only by a DuckDB that can open no other file, only its tables are
read, what has not the form of a run, a step or a digest is refused, and nothing of it is executed. Runs that the home
has are left as they are; decisions on champions are not taken over.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import duckdb

from eclectus.storage.artifact import KINDS
from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.storage.journal import EVENTS, METRICS, Journal
from eclectus.storage.lineage.connection import connect

_RUN = re.compile(r"[A-Za-z0-9][\w.-]{0,99}")
_STEP = re.compile(r"[\w.-]{1,100}")
_DIGEST = re.compile(r"[0-9a-f]{8,64}")
_READ = ("runs", "steps", "step_inputs", "step_outputs", "settings", "metrics", "artifacts")
_LOCKED: dict[str, Any] = {"enable_external_access": "false", "autoinstall_known_extensions": "false",
           "autoload_known_extensions": "false"}  # fmt: skip
_OUTPUTS = """
    select o.step, a.kind, a.artifact, a."rows", a."bytes", a.created, a.path, a.statistics
    from step_outputs o join artifacts a using (artifact, kind)"""


def import_bundle(home: Home, file: Path) -> list[str]:
    """Adds the runs of a bundle that the home does not have; returns their names. Raises EclectusError."""
    try:
        with duckdb.connect(str(file), read_only=True, config=_LOCKED) as bundle:
            _check_tables(bundle)
            runs = _rows(bundle, "from runs")
            found = {
                name: _by(_rows(bundle, f"from {name}"), "step") for name in ("step_inputs", "settings", "metrics")
            }
            steps = _by(_rows(bundle, "from steps order by started"), "run")
            outputs = _by(_rows(bundle, _OUTPUTS), "step")
    except (duckdb.Error, OSError) as error:
        raise EclectusError(f"{file.name} is no bundle of lineage ({str(error).splitlines()[0][:200]})") from error
    _check_forms(runs, steps, outputs)
    with connect(home) as here:
        known = {run for (run,) in here.execute("select run from runs").fetchall()}
    new = [row for row in runs if row["run"] not in known]
    for row in new:
        with Journal(home.journal, row["run"], home.mirror) as journal:
            _write_run(journal, row, steps.get(row["run"], []), found, outputs)
    return [row["run"] for row in new]


def _write_run(
    journal: Journal,
    run: dict[str, Any],
    steps: list[dict[str, Any]],
    found: dict[str, dict[str, list[dict[str, Any]]]],
    outputs: dict[str, list[dict[str, Any]]],
) -> None:
    about = {name: run[name] for name in ("flow", "code_version", "host", "python")}
    about |= {name: _json(run[name]) for name in ("parameters", "packages")}
    _take(journal, EVENTS, {"event": "run_started", "logged": run["started"], "run": run["run"], **about})
    for step in steps:
        own = {name: step[name] for name in ("run", "step", "name", "label", "flow", "key")}
        _take(journal, EVENTS, {"event": "step_started", "logged": step["started"], **own})
        for row in found["metrics"].get(step["step"], []):
            _take(journal, METRICS, {**row, "tags": dict(row["tags"] or {})})
        ended = {name: step[name] for name in
                 ("version", "state", "reason", "seconds", "peak_memory", "cpu_seconds", "seed")}  # fmt: skip
        ended["settings"] = {row["name"]: _json(row["value"]) for row in found["settings"].get(step["step"], [])}
        ended["inputs"] = {
            row["name"]: f"{row['kind']}-{row['artifact']}" for row in found["step_inputs"].get(step["step"], [])
        }
        made = [{key: value for key, value in each.items() if key != "step"} for each in outputs.get(step["step"], [])]
        output = {**made[0], "statistics": _json(made[0]["statistics"])} if made else None
        last = step["ended"] or step["started"]
        _take(journal, EVENTS, {"event": "step_ended", "logged": last, **own, **ended, "output": output})
    end = {name: run[name] for name in ("run", "state", "seconds", "error")}
    _take(journal, EVENTS, {"event": "run_ended", "logged": run["ended"] or run["started"], **end})


def _take(journal: Journal, stream: str, row: dict[str, Any]) -> None:
    journal.take(stream, {name: value for name, value in row.items() if value is not None})


def _check_tables(bundle: duckdb.DuckDBPyConnection) -> None:
    """Raises duckdb.Error unless all that is read is a table: a view of a stranger could compute anything."""
    rows = bundle.execute("select table_name from duckdb_tables() where schema_name = 'main'").fetchall()
    if missing := sorted({*_READ} - {name for (name,) in rows}):
        raise duckdb.CatalogException(f"it has no table {missing[0]}")


def _check_forms(
    runs: list[dict[str, Any]], steps: dict[str, list[dict[str, Any]]], outputs: dict[str, list[dict[str, Any]]]
) -> None:
    """Raises EclectusError for names that are no names: they become names of files, and keys of queries."""
    wrong = [row["run"] for row in runs if not _RUN.fullmatch(str(row["run"]))]
    wrong += [row["step"] for each in steps.values() for row in each if not _STEP.fullmatch(str(row["step"]))]
    made = [row for each in outputs.values() for row in each]
    wrong += [
        row["artifact"] for row in made if row["kind"] not in KINDS or not _DIGEST.fullmatch(str(row["artifact"]))
    ]
    if wrong:
        raise EclectusError(f"the bundle names {str(wrong[0])[:60]!r}, which is no run, step or artifact")


def _rows(bundle: duckdb.DuckDBPyConnection, sql: str) -> list[dict[str, Any]]:
    answer = bundle.execute(sql)
    names = [column[0] for column in answer.description or []]
    return [dict(zip(names, row, strict=True)) for row in answer.fetchall()]


def _by(rows: list[dict[str, Any]], name: str) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        found[str(row[name])].append(row)
    return found


def _json(value: str | None) -> Any:
    return None if value is None else json.loads(value)
