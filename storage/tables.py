"""The tables that people query, as SQL: views over the journals, live and compacted, and macros for the usual questions.

    runs          one row a run                      step_inputs   which artifacts and sources a step read
    steps         one row a step of a run            step_outputs  which artifact a step made or reused
    artifacts     one row an artifact                settings      one row a setting of a step
    metrics       one row a number                   documents     which document is in which instance, at which offset
    decisions     one row a promotion or refusal     champions     the last one promoted of each line
    routing       one row a layer, expert, language and domain of an evaluated model

    upstream(x), downstream(x)   what an artifact was made from, and what was made from it
    trace(x)                     what holds a document, and what was made from that
    difference(a, b)             what differs between two runs

Columns are documented in docs/lineage.md and frozen by a test. Everything is read through globs that always find at least an
empty file (`plant`), so a view that was opened before the first row sees every later one.
Every journal is read once, from the highest form of it that is seen: newline-delimited JSON, then Parquet parts, whose names
begin with their level. So compaction can write the next form beside the last one and needs nobody's permission.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import duckdb

from storage.artifact import EMPTY
from storage.home import Home
from storage.journal import DECISIONS, EVENTS, METRICS

OUTPUT = "STRUCT(kind VARCHAR, artifact VARCHAR, rows BIGINT, bytes BIGINT, created TIMESTAMP, path VARCHAR, statistics JSON)"
COLUMNS = {
    EVENTS: {
        "event": "VARCHAR",
        "logged": "TIMESTAMP",
        "started": "TIMESTAMP",
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
        "output": OUTPUT,
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
# Text columns without which a line is no row of its stream.
NEEDED = {EVENTS: ("run", "event"), METRICS: ("run", "name"), DECISIONS: ("line", "verdict", "checkpoint")}
# An index of who was made from whom. `node` is a 64-bit number of a digest: a walk joins numbers, not texts.
NODE = "md5_number_lower(artifact)"
EDGES = {"output": "UBIGINT", "input": "UBIGINT"}
NODES = {
    "node": "UBIGINT",
    "kind": "VARCHAR",
    "artifact": "VARCHAR",
    "made": "TIMESTAMP",
    "made_by": "VARCHAR",
    "step_name": "VARCHAR",
    "label": "VARCHAR",
    "run": "VARCHAR",
    "inputs": "MAP(VARCHAR, VARCHAR)",
}
DOCUMENTS = {
    "document": "VARCHAR",
    "name": "VARCHAR",
    "language": "VARCHAR",
    "domain": "VARCHAR",
    "source": "VARCHAR",
    "instance": "BIGINT",
    "instance_offset": "INTEGER",
    "tokens": "INTEGER",
    "document_offset": "INTEGER",
}
ROUTING = {
    "layer": "INTEGER",
    "expert": "INTEGER",
    "language": "VARCHAR",
    "domain": "VARCHAR",
    "share": "DOUBLE",
    "top_k_share": "DOUBLE",
    "routed": "BIGINT",
}
HELD = {"document": "VARCHAR", "name": "VARCHAR"}

# An input is written `kind-digest`: an artifact's kind, or `file`, `files`, `dataset` for what was read from outside.
_NAMED = "'^([a-z]+)-([0-9a-f]+)$'"
PARTS = (
    f"coalesce(nullif(regexp_extract(entry.value, {_NAMED}, 2), ''), entry.value) as artifact, "
    f"coalesce(nullif(regexp_extract(entry.value, {_NAMED}, 1), ''), 'source') as kind"
)

VIEWS = {
    "runs": """
        select run, flow, coalesce(state, 'unfinished') as state, started, if(event = 'run_ended', logged, null) as ended, seconds,
               parameters, code_version, host, python, packages, prefect_flow_run, error
        from events where event in ('run_started', 'run_ended')""",
    "steps": """
        select step, run, name, label, flow, key, version, coalesce(state, 'unfinished') as state, reason, started,
               if(event = 'step_ended', logged, null) as ended, seconds, peak_memory, seed, prefect_task_run
        from events where event in ('step_started', 'step_ended')""",
    "artifacts": """
        select kind || '-' || artifact[1:12] as name, artifact, kind, arg_min("rows", logged) as "rows",
               arg_min("bytes", logged) as "bytes", min(created) as created, arg_max(path, logged) as path,
               arg_min(statistics, logged) as statistics, arg_min(step, logged) filter (state = 'completed') as made_by
        from (select output.artifact as artifact, output.kind as kind, output."rows" as "rows", output."bytes" as "bytes",
                     output.created as created, output.path as path, output.statistics as statistics, step, state, logged
              from events where event = 'step_ended' and output is not null)
        group by artifact, kind""",
    "step_inputs": f"""
        select step, run, entry.key as name, {PARTS}
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

# Live journals are read once a walk, and edges are numbers in memory: a level of the walk then costs microseconds.
_GRAPH = """
    live as materialized (from live_events),
    live_nodes as materialized ({live_nodes}),
    e as materialized (select output, input from compacted_edges union all select output, input from ({live_edges})),
    n as not materialized (from compacted_nodes union all from live_nodes)"""
_MATCHES = """
    select distinct node from n
    where artifact >= regexp_extract(x, '[0-9a-f]+$') and artifact < regexp_extract(x, '[0-9a-f]+$') || 'g'
      and regexp_matches(x, '^([a-z]+-)?[0-9a-f]+$') and (not contains(x, '-') or starts_with(x, kind || '-'))"""
# What an artifact was made from is left out here: reading a million maps takes longer than the walk.
_SHOWN = """
    select kind || '-' || artifact[1:12] as name, kind, artifact, arg_min(made_by, made) as made_by,
           arg_min(step_name, made) as step_name, arg_min(label, made) as label, arg_min(run, made) as run, min(made) as made
    from n where node in (from reached) group by kind, artifact order by made nulls first, name"""

MACROS = {
    "upstream(x)": f"""
        with recursive {_GRAPH}, start as materialized ({_MATCHES}),
             reached(node) as (from start union select e.input from reached join e on e.output = reached.node)
        {_SHOWN}""",
    "downstream(x)": f"""
        with recursive {_GRAPH}, start as materialized ({_MATCHES}),
             reached(node) as (from start union select e.output from reached join e on e.input = reached.node)
        {_SHOWN}""",
    "trace(x)": f"""
        with recursive {_GRAPH},
             held as materialized (
                 select 'instances' as kind, instances as artifact, count(distinct instance) as instances, sum(tokens) as tokens
                 from documents where document = x or name = x group by instances
                 union all
                 select distinct 'documents', artifact, null, null from held_documents where document = x or name = x),
             learned(node) as (
                 select {NODE} from held where kind = 'instances'
                 union select e.output from learned join e on e.input = learned.node),
             reached(node) as (select {NODE} from held union select e.output from reached join e on e.input = reached.node),
             shown as materialized ({_SHOWN})
        select case when held.artifact is not null then 'holds it'
                    when shown.kind = 'checkpoint' and shown.node in (from learned) then 'learned from it'
                    else 'made from what holds it' end as relation,
               shown.name, shown.kind, shown.artifact, held.instances, held.tokens, made_by as step, label, run, made
        from (select *, {NODE} as node from shown) shown left join held using (artifact)
        union all
        select 'read it', s.label, 'step', null, null, null, s.step, s.label, s.run, s.ended
        from steps s where s.step in (select step from step_inputs semi join held using (artifact))
        order by made nulls first, relation""",
    "difference(a, b)": """
        with chosen as (from (values (a, 'a'), (b, 'b')) v(run, side)),
             facts as (
                 select side, 'run' as what, '' as label, 'code' as name, code_version as value from runs join chosen using (run)
                 union all select side, 'run', '', 'state', state from runs join chosen using (run)
                 union all select side, 'run', '', 'python', python from runs join chosen using (run)
                 union all select side, 'package', '', p.key, json_extract_string(p.value, '$')
                     from (select side, unnest(map_entries(cast(packages as map(varchar, json)))) as p
                           from runs join chosen using (run))
                 union all select side, 'step', s.label, 'version', s.version::varchar from steps s join chosen using (run)
                 union all select side, 'setting', s.label, t.name, t.value::varchar
                     from settings t join chosen using (run) join steps s using (step)
                 union all select side, 'input', s.label, i.name, i.kind || '-' || i.artifact[1:12]
                     from step_inputs i join chosen using (run) join steps s using (step)
                 union all select side, 'output', s.label, o.name, o.kind || '-' || o.artifact[1:12]
                     from step_outputs o join chosen using (run) join steps s using (step)
                 union all select side, 'metric', s.label,
                     m.name || coalesce(nullif(' ' || array_to_string(map_values(m.tags), ' '), ' '), ''),
                     last(m.value order by m.logged)::varchar
                     from metrics m join chosen using (run) join steps s using (step) group by all)
        select what, label, name, any_value(value) filter (side = 'a') as a, any_value(value) filter (side = 'b') as b
        from facts group by what, label, name having a is distinct from b
        order by array_position(['run', 'package', 'step', 'setting', 'input', 'output', 'metric'], what), label, name""",
}


def create_views(connection: duckdb.DuckDBPyConnection, home: Home, prefix: str = "") -> None:
    """Creates every view and macro in the connection's database. prefix: of the file system through which files are read."""
    for name, body in definitions(home, prefix):
        connection.execute(f"create {name} as {body}")


def definitions(home: Home, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(`view NAME` or `macro NAME(x)`, SQL) of all that `create_views` makes, in order."""
    for stream in COLUMNS:
        compacted = _parquet(prefix, home.journal / stream, {**COLUMNS[stream], "journal": "VARCHAR"}, part=True)
        yield f"view compacted_{stream}", _highest(compacted)
        yield f"view live_{stream}", _live(prefix, home, stream)
        columns = _names(COLUMNS[stream])
        yield (
            f"view {stream}",
            f"select {columns} from compacted_{stream} union all select {columns} from live_{stream}",
        )
    yield "view compacted_edges", _parquet(prefix, home.journal / "edges", EDGES)
    yield "view compacted_nodes", _parquet(prefix, home.journal / "nodes", NODES)
    for name, body in VIEWS.items():
        yield f"view {name}", body
    yield "view documents", _documents(prefix, home)
    yield "view held_documents", _held_documents(prefix, home)
    yield "view routing", _routing(prefix, home)
    for name, body in MACROS.items():
        yield (
            f"macro {name}",
            "table " + body.replace("{live_nodes}", nodes("live")).replace("{live_edges}", edges("live")),
        )


def folded(source: str) -> str:
    """SQL: one event a run or step instead of two. What has ended keeps its end's event and time, and gains `started`."""
    pair = "left(event, 3) || run || coalesce(step, '') as pair"
    columns = ", ".join(
        "coalesce(s.logged, e.logged - to_microseconds(cast(coalesce(e.seconds, 0) * 1000000 as bigint))) as started"
        if name == "started"
        else f'coalesce(e."{name}", s."{name}") as "{name}"'
        for name in COLUMNS[EVENTS]
    )
    return (
        f"with source as materialized ({source}), "
        f"s as (select *, {pair} from source where event in ('run_started', 'step_started')), "
        f"e as (select *, {pair} from source where event in ('run_ended', 'step_ended')) "
        f"select {columns}, coalesce(e.journal, s.journal) as journal from s full join e using (pair) "
        f"union all select {_names(COLUMNS[EVENTS])}, journal from source "
        "where event not in ('run_started', 'run_ended', 'step_started', 'step_ended')"
    )


def edges(source: str) -> str:
    """SQL: an edge from every input of a step to its output. source: folded events."""
    return (
        f"select distinct md5_number_lower(output) as output, {NODE} as input from "
        f"(select output, {PARTS} from (select output.artifact as output, unnest(map_entries(inputs)) as entry "
        f"from {source} where event = 'step_ended' and output is not null))"
    )


def nodes(source: str) -> str:
    """SQL: every artifact with the step that made it (or else reused it), and every source outside. source: folded events."""
    made = (
        "select md5_number_lower(output.artifact) as node, output.kind as kind, output.artifact as artifact, "
        "arg_min(logged, order_) as made, arg_min(step, order_) as made_by, arg_min(name, order_) as step_name, "
        "arg_min(label, order_) as label, arg_min(run, order_) as run, arg_min(inputs, order_) as inputs "
        f"from (select *, (state <> 'completed', logged) as order_ from {source} "
        "where event = 'step_ended' and output is not null) group by all"
    )
    outside = (
        f"select distinct {NODE}, kind, artifact, null::timestamp, null, null, label, null, null "
        f"from (select entry.key as label, {PARTS} from (select unnest(map_entries(inputs)) as entry from {source} "
        "where event = 'step_ended')) where kind in ('file', 'files', 'dataset', 'source')"
    )
    return f"select * from ({made}) union all select * from ({outside})"


def plant(home: Home) -> bool:
    """Puts an empty file where a glob of the views might find none. False where the home cannot be written."""
    wanted = [(home.journal / stream / f"{EMPTY}.ndjson", None) for stream in COLUMNS]
    for stream in COLUMNS:
        wanted.append((home.journal / stream / f"{EMPTY}.parquet", {**COLUMNS[stream], "journal": "VARCHAR"}))
    wanted.append((home.journal / "edges" / f"{EMPTY}.parquet", EDGES))
    wanted.append((home.journal / "nodes" / f"{EMPTY}.parquet", NODES))
    wanted.append((home.journal / "documents" / f"{EMPTY}.parquet", DOCUMENTS))
    wanted.append((home.store.root / "instances" / EMPTY / "documents.parquet", DOCUMENTS))
    wanted.append((home.store.root / "documents" / EMPTY / "documents" / f"{EMPTY}.parquet", HELD))
    wanted.append((home.store.root / "evaluation" / EMPTY / "routing.parquet", ROUTING))
    missing = [(path, columns) for path, columns in wanted if not path.exists()]
    try:
        for path, columns in missing:
            path.parent.mkdir(parents=True, exist_ok=True)
            if columns is None:
                path.touch()
                continue
            beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:6]}")
            with duckdb.connect() as connection:
                connection.execute(f"copy ({_nothing(columns)}) to {text(beside)} (format parquet)")
            os.replace(beside, path)
    except (OSError, duckdb.IOException):
        return False
    return True


def text(path: Path | str) -> str:
    """A path of our own as an SQL literal."""
    return "'" + str(path).replace("'", "''") + "'"


def _names(columns: dict[str, str]) -> str:
    return ", ".join(f'"{name}"' for name in columns)


def _nothing(columns: dict[str, str]) -> str:
    return "select " + ", ".join(f'null::{kind} as "{name}"' for name, kind in columns.items()) + " where false"


def _parquet(prefix: str, folder: Path, columns: dict[str, str], part: bool = False) -> str:
    """SQL over the Parquet files of a folder; a column that an older file lacks is null. part: adds the file's name."""
    if not any(folder.glob("*.parquet")):
        return _nothing({**columns, "part": "VARCHAR"} if part else columns)
    chosen = ", ".join(f'"{name}"::{kind} as "{name}"' for name, kind in columns.items())
    added = ", parse_filename(filename) as part" if part else ""
    glob = text(f"{prefix}{folder}/*.parquet")
    return f"select {chosen}{added} from read_parquet({glob}, union_by_name = true, filename = true)"


def _highest(source: str) -> str:
    """SQL: of each journal the rows of the part with the highest name only. Parts of a higher level replace lower ones."""
    return (
        f"with parts as ({source}) select parts.* exclude (part) from parts "
        "semi join (select journal, max(part) as part from parts group by journal) using (journal, part)"
    )


def _live(prefix: str, home: Home, stream: str) -> str:
    """SQL over the journals that are not compacted. Lines that are not whole come back as nulls and are left out."""
    folder, columns = home.journal / stream, COLUMNS[stream]
    if not any(folder.glob("*.ndjson")):
        return _nothing({**columns, "journal": "VARCHAR"})
    rows = raw(text(f"{prefix}{folder}/*.ndjson"), stream)
    new = f"select * from ({rows}) anti join compacted_{stream} using (journal)"
    return folded(new) if stream == EVENTS else new


def raw(files: str, stream: str) -> str:
    """SQL over journals as they were written, with the name of the journal. files: an SQL literal, path or list of paths."""
    types = ", ".join(f"'{name}': '{kind}'" for name, kind in COLUMNS[stream].items())
    needed = " and ".join(f"{name} is not null" for name in NEEDED[stream])
    return (
        f"select {_names(COLUMNS[stream])}, parse_filename(filename) as journal from read_json({files}, "
        f"format = 'newline_delimited', columns = {{{types}}}, ignore_errors = true, filename = true) where {needed}"
    )


def _documents(prefix: str, home: Home) -> str:
    """Of instances that are here, and of those whose table of documents alone was kept with the journal."""
    chosen = ", ".join(f'"{name}"::{kind} as "{name}"' for name, kind in DOCUMENTS.items())
    globs = [
        (home.store.root / "instances", "*/documents.parquet", "split_part(filename, '/', -2)"),
        (home.journal / "documents", "*.parquet", "split_part(parse_filename(filename), '.', 1)"),
    ]
    tables = [
        f"select {chosen}, {digits} as digits from read_parquet({text(f'{prefix}{folder}/{pattern}')}, "
        "union_by_name = true, filename = true)"
        for folder, pattern, digits in globs
        if any(folder.glob(pattern))
    ]
    rows = " union all ".join(tables) or _nothing({**DOCUMENTS, "digits": "VARCHAR"})
    whole = "select distinct artifact as instances from step_outputs where kind = 'instances'"
    return (
        f"select {_names(DOCUMENTS)}, coalesce(instances, digits) as instances from ({rows}) d "
        f"left join ({whole}) a on d.digits = a.instances[1:32]"
    )


def _held_documents(prefix: str, home: Home) -> str:
    folder, pattern = home.store.root / "documents", "*/documents/*.parquet"
    if not any(folder.glob(pattern)):
        return _nothing({**HELD, "artifact": "VARCHAR"})
    rows = (
        "select document, name, split_part(filename, '/', -3) as digits from "
        f"read_parquet({text(f'{prefix}{folder}/{pattern}')}, union_by_name = true, filename = true)"
    )
    whole = "select distinct artifact from step_outputs where kind = 'documents'"
    return (
        f"select document, name, coalesce(artifact, digits) as artifact from ({rows}) d "
        f"left join ({whole}) a on d.digits = a.artifact[1:32]"
    )


def _routing(prefix: str, home: Home) -> str:
    """What the routers of evaluated models did (tasks/evaluate.py)."""
    folder, pattern = home.store.root / "evaluation", "*/routing.parquet"
    if not any(folder.glob(pattern)):
        return _nothing({**ROUTING, "evaluation": "VARCHAR"})
    chosen = ", ".join(f'"{name}"::{kind} as "{name}"' for name, kind in ROUTING.items())
    rows = (
        f"select {chosen}, split_part(filename, '/', -2) as digits from "
        f"read_parquet({text(f'{prefix}{folder}/{pattern}')}, union_by_name = true, filename = true)"
    )
    whole = "select distinct artifact as evaluation from step_outputs where kind = 'evaluation'"
    return (
        f"select {_names(ROUTING)}, coalesce(evaluation, digits) as evaluation from ({rows}) r "
        f"left join ({whole}) a on r.digits = a.evaluation[1:32]"
    )
