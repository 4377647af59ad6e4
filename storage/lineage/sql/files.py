"""SQL over the files of the lineage: journals from their highest form, and tables that stand beside artifacts.

Every journal is read once, from its highest form: newline-delimited JSON, then Parquet parts, whose names begin with
their level; `contents` lists the journals of each part. So compaction writes the next form without waiting for readers.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from eclectus.storage.home import Home
from eclectus.storage.journal import EVENTS
from eclectus.storage.lineage.sql.schema import (
    COLUMNS,
    DOCUMENTS,
    FIRST_LOSSES,
    FOLDED,
    HELD,
    NEEDED,
    ROUTING,
    SHAPES,
)


@dataclass(frozen=True)
class Files:
    """Files of a home as they are named in views, with `root` in place of the home's path."""

    home: Home
    root: str

    def matching(self, folder: Path, pattern: str) -> str:
        # The root of the read-only file system is no path.
        root = self.root if "://" in self.root else glob.escape(self.root)
        return text(f"{root}/{folder.relative_to(self.home.root).as_posix()}/{pattern}")


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


def nothing(columns: dict[str, str]) -> str:
    return "select " + ", ".join(f'null::{kind} as "{name}"' for name, kind in columns.items()) + " where false"


def parquet(files: Files, folder: Path, columns: dict[str, str], part: bool = False) -> str:
    """SQL over the Parquet files of a folder; a column that an older file lacks is null. part: adds the file's name."""
    if not any(folder.glob("*.parquet")):
        return nothing({**columns, "part": "VARCHAR"} if part else columns)
    chosen = _cast(columns)
    added = ", parse_filename(filename) as part" if part else ""
    glob = files.matching(folder, "*.parquet")
    return f"select {chosen}{added} from read_parquet({glob}, union_by_name = true, filename = true)"


# Only journals that no process writes any more are compacted: what began there and has no end is dead.
_STATE = """case when ends_with(event, '_started') then coalesce(state, 'crashed') else state end as state"""


def stream_rows(files: Files, stream: str, chosen: Collection[str]) -> str:
    """SQL: the chosen columns of a stream's compacted rows, of each journal from its highest part, and its live rows.

    The contents are read once and first: of a part that appears later, the journals are read instead.
    """
    return (
        f"with highest as materialized ({highest(stream)}) {_compacted(files, stream, chosen)} "
        f"union all select {_names(chosen)} from ({_live(files, stream, chosen)})"
    )


def _compacted(files: Files, stream: str, chosen: Collection[str], where: str = "true") -> str:
    """SQL: the chosen columns of the rows that meet a condition, of each journal from its highest part."""
    columns = {**COLUMNS[stream], "journal": "VARCHAR"}
    parts = parquet(files, files.home.journal / stream, columns, part=True)
    names = _names(chosen)
    whole = names.replace('"state"', _STATE) if "event" in chosen else names
    return f"select {whole} from ({parts}) semi join highest using (journal, part) where {where}"


def compacted_ends(files: Files, chosen: Collection[str]) -> str:
    """SQL: the chosen columns of the steps that ended, of compacted journals."""
    compacted = _compacted(files, EVENTS, chosen, "event = 'step_ended'")
    return f"with highest as materialized ({highest(EVENTS)}) {compacted}"


def live_ends(files: Files, chosen: Collection[str]) -> str:
    """SQL: the chosen columns of the steps that ended, of journals that are not in `highest`."""
    rows = _live_rows(files, EVENTS, {*chosen, "event"})
    return f"select {_names(chosen)} from ({rows}) where event = 'step_ended'"


def highest(stream: str) -> str:
    return f"select journal, max(part) as part from contents where stream = '{stream}' group by journal"


def _live(files: Files, stream: str, chosen: Collection[str]) -> str:
    """SQL over the journals that are not in `highest`; one event per run or step."""
    if stream != EVENTS:
        return _live_rows(files, stream, chosen)
    chosen = {*chosen, *FOLDED}
    return folded(_live_rows(files, stream, chosen), chosen)


def _live_rows(files: Files, stream: str, chosen: Collection[str]) -> str:
    """SQL over the journals that are not in `highest`. Incomplete lines are read as nulls and left out."""
    folder = files.home.journal / stream
    if not any(folder.glob("*.ndjson")):
        return nothing({**COLUMNS[stream], "journal": "VARCHAR"})
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
    shape = json.dumps({name: SHAPES.get(columns[name], columns[name]) for name in read})
    needed = " and ".join(f"{name} is not null" for name in NEEDED[stream])
    return (
        f"select {_names(read)}, parse_filename(filename) as journal from (select unnest(line), filename from ("
        f"select unnest([json_transform(json, {text(shape)})]) as line, filename from read_json_objects({files}, "
        f"format = 'newline_delimited', ignore_errors = true, filename = true))) where {needed}"
    )


def instance_rows(files: Files) -> str:
    """Documents of the instances in the store, and of freed ones whose table was kept in the journal."""
    globs = [
        (files.home.store.root / "instances", "*/documents*.parquet", "split_part(filename, '/', -2)"),
        (files.home.journal / "documents", "*.parquet", "split_part(parse_filename(filename), '.', 1)"),
    ]
    return _of_artifacts(files, globs, DOCUMENTS)


def held_rows(files: Files) -> str:
    """The documents of artifacts of kind `documents`: those in the store, and freed ones whose list was kept."""
    globs = [
        (files.home.store.root / "documents", "*/documents/*.parquet", "split_part(filename, '/', -3)"),
        (files.home.journal / "held", "*.parquet", "split_part(parse_filename(filename), '.', 1)"),
    ]
    return _of_artifacts(files, globs, HELD)


def _of_artifacts(files: Files, globs: list[tuple[Path, str, str]], columns: dict[str, str]) -> str:
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
    return " union all ".join(tables) or nothing({**columns, "digits": "VARCHAR"})


def with_whole_digest(rows: str, columns: dict[str, str], kind: str, column: str) -> str:
    """SQL over a view of `_of_artifacts`, with the artifact's whole digest as `column`."""
    whole = f"select distinct artifact as {column} from step_outputs where kind = '{kind}'"
    return (
        f"select {_names(columns)}, coalesce({column}, digits) as {column} from {rows} d "
        f"left join ({whole}) a on d.digits = a.{column}[1:32]"
    )


def routing_rows(files: Files) -> str:
    """Routing statistics of evaluated models (tasks/evaluation/evaluate.py)."""
    folder, pattern = files.home.store.root / "evaluation", "*/routing.parquet"
    if not any(folder.glob(pattern)):
        return nothing({**ROUTING, "evaluation": "VARCHAR"})
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


def first_losses(files: Files) -> str:
    """The losses of spans (models/training/first_losses.py) with the documents; spans are in the instances' order."""
    return f"""
        with losses as ({parquet(files, files.home.journal / "first_losses", FIRST_LOSSES)}),
             spans as (
                 select *, row_number() over (partition by digits order by instance, instance_offset) - 1 as span,
                        lag(document) over (partition by digits, instance order by instance_offset) as document_before
                 from instance_rows where digits in (select instances[1:32] from losses))
        select l.step, o.run, o.artifact as checkpoint, s.document, s.name, s.language, s.domain, s.source, s.instance,
               s.instance_offset, s.tokens, s.document_before, l.loss
        from losses l join spans s on l.instances[1:32] = s.digits and l.span = s.span
        left join step_outputs o on o.step = l.step"""
