"""The tables that users query, as SQL: views over journals, live and compacted (files.py); macros are in macros.py.

    runs          one row per run                    step_inputs   which artifacts and sources a step read
    steps         one row per step of a run          step_outputs  which artifact a step made or reused
    artifacts     one row per artifact               settings      one row per setting of a step
    metrics       one row per number                 documents     which document is in which instance, at which offset
    decisions     one row per promotion or refusal   champions     the last one promoted of each line
    forecasts     one row per training that was forecast, and what came true
    tags          one row per name that a user gave to an artifact
    adoptions     one row per artifact that a user accepted as a step's result
    routing       one row per layer, expert, language and domain of an evaluated model
    first_losses  one row per span of a document in a training instance: its loss when it was first trained on

Columns are documented in docs/lineage.md and frozen by a test. Files are read through globs that always match at least
an empty one (placeholders.py), so a view that was opened before the first row sees every later one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import duckdb

from eclectus.storage.home import Home
from eclectus.storage.journal import EVENTS
from eclectus.storage.lineage.sql.files import (
    Files,
    compacted_ends,
    first_losses,
    held_rows,
    highest,
    instance_rows,
    live_ends,
    parquet,
    routing_rows,
    stream_rows,
    with_whole_digest,
)
from eclectus.storage.lineage.sql.macros import EDGES, NODES, PARTS, edges, macros, nodes
from eclectus.storage.lineage.sql.schema import COLUMNS, CONTENTS, DOCUMENTS, HELD


@dataclass(frozen=True)
class View:
    """A view over events. columns: those that it reads, since DuckDB reads every column behind a materialised CTE.

    sql: with `{events}` where the events are read, once. ends: it reads `step_ended` only, which need no beginning.
    """

    columns: str
    sql: str
    ends: bool = False


# What most questions read of the steps that ended: a view of its own, so that a command can read it once (`read_once`).
ENDED = "run step name label state logged inputs output"
# Of the last event about something: which artifact, who, why and when.
_NOTED = """arg_max(output, logged) as output, arg_max("by", logged) as "by", arg_max(reason, logged) as reason,
                             max(logged) as logged"""
_NAMED = "output.kind || '-' || output.artifact[1:12] as name, output.kind as kind, output.artifact as artifact"
VIEWS = {
    "runs": View(
        "run flow state event logged started seconds parameters code_version host python packages prefect_flow_run "
        "error",
        """
        with of_runs as materialized (
                 from {events} where event in ('run_started', 'run_ended', 'run_kept', 'run_released')),
             keeping as (select run, arg_max(event = 'run_kept', logged) as kept
                         from of_runs where event in ('run_kept', 'run_released') group by run)
        select run, flow, coalesce(state, 'unfinished') as state, started,
               case when event = 'run_ended' then logged end as ended, seconds, parameters, code_version, host, python,
               packages, prefect_flow_run, error, coalesce(kept, false) as kept
        from of_runs left join keeping using (run) where event in ('run_started', 'run_ended')""",
    ),
    "steps": View(
        "step run name label flow key version state reason started event logged seconds peak_memory cpu_seconds seed "
        "prefect_task_run",
        """
        select step, run, name, label, flow, key, version, coalesce(state, 'unfinished') as state, reason, started,
               case when event = 'step_ended' then logged end as ended, seconds, peak_memory, cpu_seconds, seed,
               prefect_task_run
        from {events} where event in ('step_started', 'step_ended')""",
    ),
    "artifacts": View(
        ENDED,
        """
        select kind || '-' || artifact[1:12] as name, artifact, kind, arg_min("rows", logged) as "rows",
               arg_min("bytes", logged) as "bytes", min(created) as created, arg_max(path, logged) as path,
               arg_min(statistics, logged) as statistics, arg_min(step, logged) filter (state = 'completed') as made_by
        from (select unnest(output), step, state, logged from {events} where output is not null)
        group by artifact, kind""",
        ends=True,
    ),
    "step_inputs": View(
        ENDED,
        f"""
        select step, run, entry.key as name, {PARTS}
        from (select step, run, unnest(map_entries(inputs)) as entry from {{events}})""",
        ends=True,
    ),
    "step_outputs": View(
        ENDED,
        """
        select step, run, 'out' as name, output.artifact as artifact, output.kind as kind, state = 'reused' as reused
        from {events} where output is not null""",
        ends=True,
    ),
    "settings": View(
        "step run settings",
        """
        select step, run, entry.key as name, entry.value as value
        from (select step, run, unnest(map_entries(settings)) as entry from {events})""",
        ends=True,
    ),
    "forecasts": View(
        "event logged run step label forecast",
        """
        with by_step as (
                 select step, any_value(run) as run, any_value(label) as label,
                        min(logged) filter (event = 'forecast') as made,
                        arg_max(forecast, logged) filter (event = 'forecast') as forecast,
                        arg_max(forecast, logged) filter (event = 'came_true') as actual
                 from {events} where event in ('forecast', 'came_true') group by step),
             numbers as (
                 select *, (forecast->>'seconds')::double as seconds, (actual->>'seconds')::double as actual_seconds,
                        (forecast->>'memory')::bigint as memory, (actual->>'memory')::bigint as actual_memory,
                        (forecast->>'steps')::bigint as steps, (actual->>'steps')::bigint as actual_steps
                 from by_step where forecast is not null)
        select step, run, label, made, steps, actual_steps, seconds, actual_seconds,
               round((seconds / steps) / nullif(actual_seconds / nullif(actual_steps, 0), 0) - 1, 4) as seconds_error,
               memory, actual_memory, round(memory / nullif(actual_memory, 0) - 1, 4) as memory_error, forecast, actual
        from numbers""",
    ),
    "tags": View(
        "event logged run name reason output by",
        f"""
        with last as (select name, arg_max(event, logged) as event, {_NOTED}
                      from {{events}} where event in ('tagged', 'untagged') group by name)
        select name as tag, {_NAMED}, logged as since, "by", reason from last where event = 'tagged'""",
    ),
    "adoptions": View(
        "event logged run name label key reason output by",
        f"""
        with last as (select key, arg_max(event, logged) as event, arg_max(name, logged) as step_name,
                             arg_max(label, logged) as label, {_NOTED}
                      from {{events}} where event in ('adopted', 'unadopted') group by key)
        select label, step_name, key, {_NAMED}, logged as since, "by", reason from last where event = 'adopted'""",
    ),
}
_CHAMPIONS = """
    select line, arg_max(checkpoint, logged) as checkpoint, max(logged) as since, arg_max(reason, logged) as reason,
           arg_max("by", logged) as "by", arg_max(run, logged) as run
    from decisions where verdict = 'promoted' group by line"""


def create_views(connection: duckdb.DuckDBPyConnection, home: Home, root: str | None = None) -> None:
    """Creates every view and macro in the connection's database. root: as in `definitions`."""
    for name, body in definitions(home, root):
        connection.execute(f"create {name} as {body}")


def definitions(home: Home, root: str | None = None) -> Iterator[tuple[str, str]]:
    """(`view NAME` or `macro NAME(x)`, SQL) of all that `create_views` creates, in order.

    root: what the home's folder is called in the views; its path where left out.
    """
    files = Files(home, root or str(home.root))
    yield "view contents", parquet(files, home.journal / "contents", CONTENTS)
    for stream in COLUMNS:
        yield f"view {stream}", stream_rows(files, stream, COLUMNS[stream])
    yield "view live_ended", f"with highest as materialized ({highest(EVENTS)}) {live_ends(files, ENDED.split())}"
    yield "view compacted_ended", compacted_ends(files, ENDED.split())
    yield "view ended", "from compacted_ended union all from live_ended"
    yield "view compacted_edges", parquet(files, home.journal / "edges", EDGES)
    yield "view compacted_nodes", parquet(files, home.journal / "nodes", NODES)
    for name, view in VIEWS.items():
        columns = view.columns.split()
        if view.columns == ENDED:
            read = "ended"
        elif view.ends:
            read = f"({compacted_ends(files, columns)} union all {live_ends(files, columns)})"
        else:
            read = f"({stream_rows(files, EVENTS, columns)})"
        yield f"view {name}", view.sql.format(events=f"{read} events")
    yield "view champions", _CHAMPIONS
    yield "view instance_rows", instance_rows(files)
    yield "view held_rows", held_rows(files)
    yield "view documents", with_whole_digest("instance_rows", DOCUMENTS, "instances", "instances")
    yield "view held_documents", with_whole_digest("held_rows", HELD, "documents", "artifact")
    yield "view edges", f"select output, input from compacted_edges union all {edges('live_ended')}"
    yield "view live_nodes", nodes("live_ended")
    yield "view nodes", "from compacted_nodes union all from live_nodes"
    yield "view routing", routing_rows(files)
    yield "view first_losses", first_losses(files)
    for name, body in macros().items():
        yield f"macro {name}", body
