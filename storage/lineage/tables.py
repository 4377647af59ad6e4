"""The tables that users query, as SQL: views over the journals, live and compacted (macros: storage/lineage/macros.py).

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
an empty one (`create_placeholders`), so a view that was opened before the first row sees every later one.
Every journal is read once, from its highest form: newline-delimited JSON, then Parquet parts, whose names begin with
their level; `contents` lists the journals of each part. So compaction writes the next form without waiting for readers.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import duckdb

from eclectus.storage.artifact import EMPTY, hash_file
from eclectus.storage.atomic_write import replacing, temporary_path
from eclectus.storage.home import Home
from eclectus.storage.journal import DECISIONS, EVENTS, METRICS
from eclectus.storage.lineage.macros import EDGES, NODES, PARTS, edges, macros, nodes

_OUTPUT = {
    "kind": "VARCHAR",
    "artifact": "VARCHAR",
    "rows": "BIGINT",
    "bytes": "BIGINT",
    "created": "TIMESTAMP",
    "path": "VARCHAR",
    "statistics": "JSON",
}
OUTPUT = f"STRUCT({', '.join(f'{name} {kind}' for name, kind in _OUTPUT.items())})"
# How `json_transform` is told a nested type.
_SHAPES = {OUTPUT: _OUTPUT}
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
        "cpu_seconds": "DOUBLE",
        "seed": "BIGINT",
        "prefect_task_run": "VARCHAR",
        "settings": "MAP(VARCHAR, JSON)",
        "inputs": "MAP(VARCHAR, VARCHAR)",
        "output": OUTPUT,
        "forecast": "JSON",
        "by": "VARCHAR",
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
# Text columns that a line must have to be a row of its stream.
NEEDED = {EVENTS: ("run", "event"), METRICS: ("run", "name"), DECISIONS: ("line", "verdict", "checkpoint")}
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
# What `folded` needs to join the beginning and the end of a run or step.
FOLDED = ("event", "logged", "started", "run", "step", "seconds")
# Which journals are in which part; a part counts once it is listed here.
CONTENTS = {"stream": "VARCHAR", "part": "VARCHAR", "journal": "VARCHAR"}
ROUTING = {
    "layer": "INTEGER",
    "expert": "INTEGER",
    "language": "VARCHAR",
    "domain": "VARCHAR",
    "share": "DOUBLE",
    "top_k_share": "DOUBLE",
    "routed": "BIGINT",
}
FIRST_LOSSES = {"step": "VARCHAR", "instances": "VARCHAR", "span": "BIGINT", "loss": "FLOAT"}
HELD = {"document": "VARCHAR", "name": "VARCHAR"}


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


@dataclass(frozen=True)
class _Files:
    """Files of a home as they are named in views, with `root` in place of the home's path."""

    home: Home
    root: str

    def matching(self, folder: Path, pattern: str) -> str:
        # The root of the read-only file system is no path.
        root = self.root if "://" in self.root else glob.escape(self.root)
        return text(f"{root}/{folder.relative_to(self.home.root).as_posix()}/{pattern}")


def create_views(connection: duckdb.DuckDBPyConnection, home: Home, root: str | None = None) -> None:
    """Creates every view and macro in the connection's database. root: as in `definitions`."""
    for name, body in definitions(home, root):
        connection.execute(f"create {name} as {body}")


def definitions(home: Home, root: str | None = None) -> Iterator[tuple[str, str]]:
    """(`view NAME` or `macro NAME(x)`, SQL) of all that `create_views` creates, in order.

    root: what the home's folder is called in the views; its path where left out.
    """
    files = _Files(home, root or str(home.root))
    yield "view contents", _parquet(files, home.journal / "contents", CONTENTS)
    for stream in COLUMNS:
        yield f"view {stream}", _stream(files, stream, COLUMNS[stream])
    yield "view live_ended", f"with highest as materialized ({_highest(EVENTS)}) {_live_ends(files, ENDED.split())}"
    yield "view compacted_ended", _compacted_ends(files, ENDED.split())
    yield "view ended", "from compacted_ended union all from live_ended"
    yield "view compacted_edges", _parquet(files, home.journal / "edges", EDGES)
    yield "view compacted_nodes", _parquet(files, home.journal / "nodes", NODES)
    for name, view in VIEWS.items():
        columns = view.columns.split()
        if view.columns == ENDED:
            read = "ended"
        elif view.ends:
            read = f"({_compacted_ends(files, columns)} union all {_live_ends(files, columns)})"
        else:
            read = f"({_stream(files, EVENTS, columns)})"
        yield f"view {name}", view.sql.format(events=f"{read} events")
    yield "view champions", _CHAMPIONS
    yield "view instance_rows", _instance_rows(files)
    yield "view held_rows", _held_rows(files)
    yield "view documents", _with_whole_digest("instance_rows", DOCUMENTS, "instances", "instances")
    yield "view held_documents", _with_whole_digest("held_rows", HELD, "documents", "artifact")
    yield "view edges", f"select output, input from compacted_edges union all {edges('live_ended')}"
    yield "view live_nodes", nodes("live_ended")
    yield "view nodes", "from compacted_nodes union all from live_nodes"
    yield "view routing", _routing(files)
    yield "view first_losses", _first_losses(files)
    for name, body in macros().items():
        yield f"macro {name}", body


def folded(source: str, chosen: Collection[str] | None = None) -> str:
    """SQL: one event per run or step instead of two: the end's where it has ended, with `started` added.

    chosen: columns, which have FOLDED among them (default: all).
    """
    pair = "left(event, 3) || run || coalesce(step, '') as pair"
    names = [name for name in COLUMNS[EVENTS] if chosen is None or name in chosen]
    columns = ", ".join(
        "coalesce(s.logged, e.logged - to_microseconds(cast(coalesce(e.seconds, 0) * 1000000 as bigint))) as started"
        if name == "started"
        else f'coalesce(e."{name}", s."{name}") as "{name}"'
        for name in names
    )
    return (
        f"with source as materialized ({source}), "
        f"s as (select *, {pair} from source where event in ('run_started', 'step_started')), "
        f"e as (select *, {pair} from source where event in ('run_ended', 'step_ended')) "
        f"select {columns}, coalesce(e.journal, s.journal) as journal from s full join e using (pair) "
        f"union all select {_names(names)}, journal from source "
        "where event not in ('run_started', 'run_ended', 'step_started', 'step_ended')"
    )


def create_placeholders(home: Home) -> bool:
    """Creates placeholder files so that no view's glob fails. False where the home cannot be written."""
    wanted = [_empty(home.journal / stream, {**columns, "journal": "VARCHAR"}) for stream, columns in COLUMNS.items()]
    indexes = {"contents": CONTENTS, "edges": EDGES, "nodes": NODES, "documents": DOCUMENTS, "held": HELD}
    indexes["first_losses"] = FIRST_LOSSES
    wanted += [_empty(home.journal / name, columns) for name, columns in indexes.items()]
    wanted.append(_empty(home.store.root / "instances", DOCUMENTS, "/documents"))
    wanted.append(_empty(home.store.root / "documents", HELD, "/documents/none"))
    wanted.append(_empty(home.store.root / "evaluation", ROUTING, "/routing"))
    missing = [(path, columns) for path, columns in wanted if not path.exists()]
    try:
        if missing:
            _write_empty(missing)
        for stream in COLUMNS:
            if not (empty := home.journal / stream / f"{EMPTY}.ndjson").exists():
                empty.touch()
        for stream in COLUMNS:
            listed = {path.stem.rpartition("-")[0] for path in (home.journal / "contents").glob("*.parquet")}
            for part in (home.journal / stream).glob("[0-9]*.parquet"):
                if part.stem not in listed:
                    write_contents(home, stream, part)
    except (OSError, duckdb.IOException):
        return False
    return True


def _write_empty(tables: list[tuple[Path, dict[str, str]]]) -> None:
    with duckdb.connect() as connection:
        for path, columns in tables:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                connection.execute(f"copy ({_nothing(columns)}) to {text(temporary)} (format parquet)")


def _empty(folder: Path, columns: dict[str, str], below: str = "") -> tuple[Path, dict[str, str]]:
    """(path, columns) of an empty table, named by a hash of its columns, which older files may lack."""
    schema = hashlib.sha256(repr(columns).encode()).hexdigest()[:8]
    return folder / f"{EMPTY}-{schema}{below}.parquet", columns


def write_contents(home: Home, stream: str, part: Path) -> None:
    """Lists the journals of a part, which makes it count, in a file named after the part and its own bytes."""
    folder = home.journal / "contents"
    folder.mkdir(exist_ok=True)
    with temporary_path(folder / part.name) as temporary, duckdb.connect() as connection:
        rows = f"read_parquet({readable(part)})"
        journals = f"select distinct '{stream}' as stream, {text(part.name)} as part, journal from {rows}"
        connection.execute(f"copy ({journals} order by journal) to {text(temporary)} (format parquet)")
        temporary.replace(folder / f"{part.stem}-{hash_file(temporary)[:16]}.parquet")


def text(path: Path | str) -> str:
    """A path of our own as an SQL literal."""
    return "'" + str(path).replace("'", "''") + "'"


def readable(*paths: Path | str) -> str:
    """Files of our own as DuckDB's readers take them, which would read `[`, `*` and `?` in a path as a pattern."""
    return "[" + ", ".join(text(glob.escape(str(path))) for path in paths) + "]"


def matching(folder: Path, pattern: str) -> str:
    """The files of a folder that match a pattern, for DuckDB's readers."""
    return text(f"{glob.escape(str(folder))}/{pattern}")


def _names(columns: Iterable[str]) -> str:
    return ", ".join(f'"{name}"' for name in columns)


def _cast(columns: dict[str, str]) -> str:
    return ", ".join(f'"{name}"::{kind} as "{name}"' for name, kind in columns.items())


def _nothing(columns: dict[str, str]) -> str:
    return "select " + ", ".join(f'null::{kind} as "{name}"' for name, kind in columns.items()) + " where false"


def _parquet(files: _Files, folder: Path, columns: dict[str, str], part: bool = False) -> str:
    """SQL over the Parquet files of a folder; a column that an older file lacks is null. part: adds the file's name."""
    if not any(folder.glob("*.parquet")):
        return _nothing({**columns, "part": "VARCHAR"} if part else columns)
    chosen = _cast(columns)
    added = ", parse_filename(filename) as part" if part else ""
    glob = files.matching(folder, "*.parquet")
    return f"select {chosen}{added} from read_parquet({glob}, union_by_name = true, filename = true)"


# Only journals that no process writes any more are compacted: what began there and has no end is dead.
_STATE = """case when ends_with(event, '_started') then coalesce(state, 'crashed') else state end as state"""


def _stream(files: _Files, stream: str, chosen: Collection[str]) -> str:
    """SQL: the chosen columns of a stream's compacted rows, of each journal from its highest part, and its live rows.

    The contents are read once and first: of a part that appears later, the journals are read instead.
    """
    return (
        f"with highest as materialized ({_highest(stream)}) {_compacted(files, stream, chosen)} "
        f"union all select {_names(chosen)} from ({_live(files, stream, chosen)})"
    )


def _compacted(files: _Files, stream: str, chosen: Collection[str], where: str = "true") -> str:
    """SQL: the chosen columns of the rows that meet a condition, of each journal from its highest part."""
    columns = {**COLUMNS[stream], "journal": "VARCHAR"}
    parts = _parquet(files, files.home.journal / stream, columns, part=True)
    names = _names(chosen)
    whole = names.replace('"state"', _STATE) if "event" in chosen else names
    return f"select {whole} from ({parts}) semi join highest using (journal, part) where {where}"


def _compacted_ends(files: _Files, chosen: Collection[str]) -> str:
    """SQL: the chosen columns of the steps that ended, of compacted journals."""
    compacted = _compacted(files, EVENTS, chosen, "event = 'step_ended'")
    return f"with highest as materialized ({_highest(EVENTS)}) {compacted}"


def _live_ends(files: _Files, chosen: Collection[str]) -> str:
    """SQL: the chosen columns of the steps that ended, of journals that are not in `highest`."""
    rows = _live_rows(files, EVENTS, {*chosen, "event"})
    return f"select {_names(chosen)} from ({rows}) where event = 'step_ended'"


def _highest(stream: str) -> str:
    return f"select journal, max(part) as part from contents where stream = '{stream}' group by journal"


def _live(files: _Files, stream: str, chosen: Collection[str]) -> str:
    """SQL over the journals that are not in `highest`; one event per run or step."""
    if stream != EVENTS:
        return _live_rows(files, stream, chosen)
    chosen = {*chosen, *FOLDED}
    return folded(_live_rows(files, stream, chosen), chosen)


def _live_rows(files: _Files, stream: str, chosen: Collection[str]) -> str:
    """SQL over the journals that are not in `highest`. Incomplete lines are read as nulls and left out."""
    folder = files.home.journal / stream
    if not any(folder.glob("*.ndjson")):
        return _nothing({**COLUMNS[stream], "journal": "VARCHAR"})
    rows = raw(files.matching(folder, "*.ndjson"), stream, chosen)
    return f"select * from ({rows}) anti join highest using (journal)"


def raw(files: str, stream: str, chosen: Collection[str] | None = None) -> str:
    """SQL over journals as they were written: the chosen columns (default: all), with the journal's name.

    files: an SQL literal, a path or a list. Lines are read as JSON and only the chosen columns converted, which takes
    half to a quarter of the time of `read_json` with columns. What cannot be read or converted is null. The list of
    one keeps DuckDB from converting a line again for every condition.
    """
    columns = COLUMNS[stream]
    read = [*columns] if chosen is None else [name for name in columns if name in {*chosen, *NEEDED[stream]}]
    shape = json.dumps({name: _SHAPES.get(columns[name], columns[name]) for name in read})
    needed = " and ".join(f"{name} is not null" for name in NEEDED[stream])
    return (
        f"select {_names(read)}, parse_filename(filename) as journal from (select unnest(line), filename from ("
        f"select unnest([json_transform(json, {text(shape)})]) as line, filename from read_json_objects({files}, "
        f"format = 'newline_delimited', ignore_errors = true, filename = true))) where {needed}"
    )


def _instance_rows(files: _Files) -> str:
    """Documents of the instances in the store, and of freed ones whose table was kept in the journal."""
    globs = [
        (files.home.store.root / "instances", "*/documents*.parquet", "split_part(filename, '/', -2)"),
        (files.home.journal / "documents", "*.parquet", "split_part(parse_filename(filename), '.', 1)"),
    ]
    return _of_artifacts(files, globs, DOCUMENTS)


def _held_rows(files: _Files) -> str:
    """The documents of artifacts of kind `documents`: those in the store, and freed ones whose list was kept."""
    globs = [
        (files.home.store.root / "documents", "*/documents/*.parquet", "split_part(filename, '/', -3)"),
        (files.home.journal / "held", "*.parquet", "split_part(parse_filename(filename), '.', 1)"),
    ]
    return _of_artifacts(files, globs, HELD)


def _of_artifacts(files: _Files, globs: list[tuple[Path, str, str]], columns: dict[str, str]) -> str:
    """SQL over files of artifacts of a kind, with the first 32 `digits` of the artifact.

    globs: (folder, pattern, SQL of these digits in `filename`).
    """
    chosen = _cast(columns)
    tables = [
        f"select {chosen}, {digits} as digits from read_parquet({files.matching(folder, pattern)}, "
        "union_by_name = true, filename = true)"
        for folder, pattern, digits in globs
        if any(folder.glob(pattern))
    ]
    return " union all ".join(tables) or _nothing({**columns, "digits": "VARCHAR"})


def _with_whole_digest(rows: str, columns: dict[str, str], kind: str, column: str) -> str:
    """SQL over a view of `_of_artifacts`, with the artifact's whole digest as `column`."""
    whole = f"select distinct artifact as {column} from step_outputs where kind = '{kind}'"
    return (
        f"select {_names(columns)}, coalesce({column}, digits) as {column} from {rows} d "
        f"left join ({whole}) a on d.digits = a.{column}[1:32]"
    )


def _routing(files: _Files) -> str:
    """Routing statistics of evaluated models (tasks/evaluation/evaluate.py)."""
    folder, pattern = files.home.store.root / "evaluation", "*/routing.parquet"
    if not any(folder.glob(pattern)):
        return _nothing({**ROUTING, "evaluation": "VARCHAR"})
    chosen = _cast(ROUTING)
    rows = (
        f"select {chosen}, split_part(filename, '/', -2) as digits from "
        f"read_parquet({files.matching(folder, pattern)}, union_by_name = true, filename = true)"
    )
    whole = "select distinct artifact as evaluation from step_outputs where kind = 'evaluation'"
    return (
        f"select {_names(ROUTING)}, coalesce(evaluation, digits) as evaluation from ({rows}) r "
        f"left join ({whole}) a on r.digits = a.evaluation[1:32]"
    )


def _first_losses(files: _Files) -> str:
    """The losses of spans (models/training/first_losses.py) with the documents; spans are in the instances' order."""
    return f"""
        with losses as ({_parquet(files, files.home.journal / "first_losses", FIRST_LOSSES)}),
             spans as (
                 select *, row_number() over (partition by digits order by instance, instance_offset) - 1 as span,
                        lag(document) over (partition by digits, instance order by instance_offset) as document_before
                 from instance_rows where digits in (select instances[1:32] from losses))
        select l.step, o.run, o.artifact as checkpoint, s.document, s.name, s.language, s.domain, s.source, s.instance,
               s.instance_offset, s.tokens, s.document_before, l.loss
        from losses l join spans s on l.instances[1:32] = s.digits and l.span = s.span
        left join step_outputs o on o.step = l.step"""
