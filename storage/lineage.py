"""Lineage as DuckDB views over the journals: what ran, from what, why, and what came of it.

`connect` opens an in-memory DuckDB with the views below; nothing is locked, and runs go on writing meanwhile. The same views
stand in `eclectus.duckdb` for people with the `duckdb` shell. The columns are frozen: a test fails when one goes.

    runs          one row a run                      step_inputs   which artifacts a step read
    steps         one row a step of a run            step_outputs  which artifact a step made or reused
    artifacts     one row an artifact                settings      one row a setting of a step
    metrics       one row a number                   documents     which document is in which instance, at which offset
    decisions     one row a promotion or refusal     champions     the last one promoted of each line
    routing       one row a layer, expert, language and domain of an evaluated model
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

import duckdb

from storage.errors import EclectusError
from storage.home import Home
from storage.journal import DECISIONS, EVENTS, METRICS

COLUMNS = {
    EVENTS: {
        "event": "VARCHAR",
        "logged": "TIMESTAMP",
        "run": "VARCHAR",
        "flow": "VARCHAR",
        "state": "VARCHAR",
        "parameters": "JSON",
        "code_version": "VARCHAR",
        "host": "VARCHAR",
        "python": "VARCHAR",
        "packages": "JSON",
        "prefect_flow_run": "VARCHAR",
        "error": "VARCHAR",
        "step": "VARCHAR",
        "name": "VARCHAR",
        "label": "VARCHAR",
        "key": "VARCHAR",
        "version": "INTEGER",
        "reason": "VARCHAR",
        "seconds": "DOUBLE",
        "peak_memory": "BIGINT",
        "seed": "BIGINT",
        "prefect_task_run": "VARCHAR",
        "settings": "MAP(VARCHAR, JSON)",
        "inputs": "MAP(VARCHAR, VARCHAR)",
        "output": "STRUCT(kind VARCHAR, artifact VARCHAR, rows BIGINT, bytes BIGINT, created TIMESTAMP, path VARCHAR, statistics JSON)",
    },
    METRICS: {
        "logged": "TIMESTAMP",
        "run": "VARCHAR",
        "step": "VARCHAR",
        "name": "VARCHAR",
        "value": "DOUBLE",
        "at_step": "BIGINT",
        "tags": "MAP(VARCHAR, VARCHAR)",
    },
    DECISIONS: {
        "logged": "TIMESTAMP",
        "run": "VARCHAR",
        "line": "VARCHAR",
        "verdict": "VARCHAR",
        "checkpoint": "VARCHAR",
        "reason": "VARCHAR",
        "evaluations": "JSON",
        "gate": "VARCHAR",
        "rules": "JSON",
        "by": "VARCHAR",
    },
}

VIEWS = {
    "runs": """
        select s.run, s.flow, coalesce(e.state, 'unfinished') as state, s.logged as started, e.logged as ended, e.seconds,
               s.parameters, s.code_version, s.host, s.python, s.packages, e.prefect_flow_run, e.error
        from events s left join (select * from events where event = 'run_ended') e using (run)
        where s.event = 'run_started'""",
    "steps": """
        select s.step, s.run, s.name, s.label, s.flow, coalesce(e.key, s.key) as key, e.version,
               coalesce(e.state, 'unfinished') as state, e.reason, s.logged as started, e.logged as ended, e.seconds, e.peak_memory,
               e.seed, e.prefect_task_run
        from events s left join (select * from events where event = 'step_ended') e using (step)
        where s.event = 'step_started'""",
    "artifacts": """
        select output.kind || '-' || output.artifact[1:12] as name, output.artifact as artifact, output.kind as kind,
               arg_min(output."rows", logged) as "rows", arg_min(output."bytes", logged) as "bytes", min(output.created) as created,
               arg_max(output.path, logged) as path, arg_min(output.statistics, logged) as statistics,
               arg_min(step, logged) filter (state = 'completed') as made_by
        from events where event = 'step_ended' and output is not null
        group by output.artifact, output.kind""",
    "step_inputs": """
        select step, run, entry.key as name, split_part(entry.value, '-', 2) as artifact, split_part(entry.value, '-', 1) as kind
        from (select step, run, unnest(map_entries(inputs)) as entry from events where event = 'step_ended')""",
    "step_outputs": """
        select step, run, 'out' as name, output.artifact as artifact, output.kind as kind, state = 'reused' as reused
        from events where event = 'step_ended' and output is not null""",
    "champions": """
        select line, arg_max(checkpoint, logged) as checkpoint, max(logged) as since, arg_max(reason, logged) as reason,
               arg_max("by", logged) as "by", arg_max(run, logged) as run
        from decisions where verdict = 'promoted' group by line""",
    "settings": """
        select step, run, entry.key as name, entry.value as value
        from (select step, run, unnest(map_entries(settings)) as entry from events where event = 'step_ended')""",
}


def connect(home: Home | str | Path | None = None) -> duckdb.DuckDBPyConnection:
    """A DuckDB connection with the views over a home's journals: `connect().sql("from runs").df()`.

    Read-only in effect: the views cannot be written, and files outside the home cannot be reached through it.
    """
    home = home if isinstance(home, Home) else Home.open(home)
    home.refresh()
    connection = duckdb.connect()
    connection.execute("set enable_progress_bar = false")
    _create_views(connection, home)
    allowed = str(home.root).replace("'", "''")
    connection.execute(f"set allowed_directories = ['{allowed}']")
    connection.execute("set enable_external_access = false")
    connection.execute("set lock_configuration = true")
    return connection


def write_database(home: Home) -> Path:
    """Writes `eclectus.duckdb`, a file with the same views, for the `duckdb` shell; replaces an older one."""
    beside = home.root / f".eclectus-{os.getpid()}-{uuid.uuid4().hex[:6]}.duckdb"
    with duckdb.connect(str(beside)) as connection:
        _create_views(connection, home)
    os.replace(beside, home.database)
    return home.database


def query(sql: str, home: Home | None = None) -> tuple[list[str], list[tuple[Any, ...]]]:
    """(column names, rows) of a query that a person typed. Raises EclectusError with DuckDB's own first line."""
    with connect(home) as connection:
        try:
            result = connection.sql(sql)
            return ([], []) if result is None else (result.columns, result.fetchall())
        except duckdb.Error as error:
            raise EclectusError(f"the query failed: {str(error).strip()}") from error


def _create_views(connection: duckdb.DuckDBPyConnection, home: Home) -> None:
    for stream in COLUMNS:
        connection.execute(f"create view {stream} as {_stream(home, stream)}")
    for name, body in VIEWS.items():
        connection.execute(f"create view {name} as {body}")
    connection.execute(f"create view documents as {_documents(home)}")
    connection.execute(f"create view routing as {_routing(home)}")


def _stream(home: Home, stream: str) -> str:
    """SQL over a stream's live journals and what was compacted of it; an empty table of the same columns while there is none."""
    columns = COLUMNS[stream]
    folder = home.journal / stream
    names = ", ".join(f'"{name}"' for name in columns)
    sources = []
    if any(folder.glob("*.ndjson")):
        types = ", ".join(f"'{name}': '{kind}'" for name, kind in columns.items())
        sources.append(
            f"select {names}, parse_filename(filename) as journal from read_json({_text(folder / '*.ndjson')}, "
            f"format = 'newline_delimited', columns = {{{types}}}, ignore_errors = true, filename = true)"
        )
    if any(folder.glob("*.parquet")):
        compacted = f"read_parquet({_text(folder / '*.parquet')})"
        if sources:
            sources[0] += f" where parse_filename(filename) not in (select distinct journal from {compacted})"
        sources.append(f"select {names}, journal from {compacted}")
    if not sources:
        return "select " + ", ".join(f'null::{kind} as "{name}"' for name, kind in columns.items()) + " where false"
    return f"select {names} from ({' union all by name '.join(sources)})"


def _documents(home: Home) -> str:
    tables = home.store.root / "instances" / "*" / "documents.parquet"
    columns = "document name language domain source instance instance_offset tokens document_offset".split()
    if not any(home.store.root.glob("instances/*/documents.parquet")):
        return "select " + ", ".join(f"null::VARCHAR as {name}" for name in [*columns, "instances"]) + " where false"
    chosen = ", ".join(f"d.{name}" for name in columns)
    return (
        f"select {chosen}, a.artifact as instances from read_parquet({_text(tables)}, filename = true) d "
        "join artifacts a on a.kind = 'instances' and split_part(d.filename, '/', -2) = a.artifact[1:32]"
    )


def _routing(home: Home) -> str:
    """What the routers of evaluated models did (tasks/evaluate.py)."""
    columns = "layer expert language domain share top_k_share routed".split()
    if not any(home.store.root.glob("evaluation/*/routing.parquet")):
        return "select " + ", ".join(f"null::VARCHAR as {name}" for name in [*columns, "evaluation"]) + " where false"
    tables = home.store.root / "evaluation" / "*" / "routing.parquet"
    return (
        f"select {', '.join(f'r.{name}' for name in columns)}, a.artifact as evaluation "
        f"from read_parquet({_text(tables)}, filename = true) r "
        "join artifacts a on a.kind = 'evaluation' and split_part(r.filename, '/', -2) = a.artifact[1:32]"
    )


def _text(path: Path) -> str:
    """A path of our own as an SQL literal."""
    return "'" + str(path).replace("'", "''") + "'"
