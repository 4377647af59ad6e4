"""Lineage as DuckDB views over the journals: what ran, from what, why, and with what result.

`connect` opens a read-only DuckDB with the views and macros of `eclectus.storage.lineage.tables`; nothing is locked,
and runs go on writing meanwhile. `eclectus.duckdb` has the same views for the `duckdb` shell. docs/lineage.md has the
columns.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb

from eclectus.storage.atomic_write import creating, replacing
from eclectus.storage.commands import command
from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.storage.lineage.compact import GRACE, replaced
from eclectus.storage.lineage.dead_runs import end_dead_runs
from eclectus.storage.lineage.repair import repair
from eclectus.storage.lineage.sql.files import text
from eclectus.storage.lineage.sql.placeholders import create_placeholders
from eclectus.storage.lineage.sql.tables import create_views, definitions

if TYPE_CHECKING:
    from eclectus.storage.lineage.read_only_files import ReadOnlyFiles

# The format of DuckDB 1.0; DuckDB 2.0's own cannot be read by any shell on PyPI.
STORAGE_VERSION = "v1.0.0"
ROWS_AT_ONCE = 2_000


def connect(
    home: Home | str | Path | None = None, writes: bool = True, runs: Collection[str] | None = None
) -> duckdb.DuckDBPyConnection:
    """A read-only DuckDB connection with the views over a home's journals: `connect().sql("from runs").df()`.

    Only lineage can be read through it, and nothing can be written: DuckDB itself refuses COPY, ATTACH, EXPORT, INSTALL
    and other files. Temporary tables are allowed. writes: whether the home is repaired and its views are kept for the
    next time. runs: those that are asked about; of runs that are not compacted yet, no other is read. Raises
    EclectusError when there is no home.
    """
    from eclectus.storage.lineage.read_only_files import PREFIX, ROOT, ReadOnlyFiles

    home = home if isinstance(home, Home) else Home.existing(home)
    home.refresh()
    if writes:
        create_placeholders(home)
        end_dead_runs(home)
        repair(home)
    folders = [home.journal, *(home.store.root / kind for kind in ("instances", "documents", "evaluation"))]
    files = ReadOnlyFiles(home.root, folders, partial(replaced, home, GRACE / 2), runs)
    cached = home.journal / "views" / f"{_digest(home, ROOT)}.duckdb"
    # DuckDB is read-only for a file only. This one holds the views alone, and is removed once it is open.
    with tempfile.TemporaryDirectory(prefix="eclectus-") as scratch:
        path = Path(scratch) / "lineage.duckdb"
        try:
            _copy_views(home, path, files, ROOT, cached, writes)
            connection = _open(path)
        except duckdb.Error:
            # A cached file that cannot be opened is damaged, and made again.
            path.unlink(missing_ok=True)
            if writes:
                cached.unlink(missing_ok=True)
            try:
                _copy_views(home, path, files, ROOT, cached if writes else None, writes)
                connection = _open(path)
            except duckdb.Error as error:
                why = str(error).splitlines()[0]
                raise EclectusError(
                    f"the lineage of {home.name} cannot be opened ({why}); see: {command('verify', home=home.name)}"
                ) from error
    connection.register_filesystem(files)
    connection.execute("set enable_progress_bar = false")
    connection.execute(f"set allowed_directories = [{text(PREFIX)}]")
    connection.execute("set enable_external_access = false")
    connection.execute("set disabled_filesystems = 'LocalFileSystem'")
    connection.execute("set lock_configuration = true")
    return connection


def read_once(connection: duckdb.DuckDBPyConnection) -> None:
    """Keeps the ends of steps in a table of the connection, for one that asks several questions about them."""
    connection.execute("create temp table live_ended as from live_ended")


def walk(name: str, home: Home | None = None) -> list[dict[str, Any]]:
    """What an artifact was made from (direction `up`), `this`, and what was made from it (`down`), nearest first.

    name: as in the macro `upstream`. A row: direction, steps_away, the other columns of `upstream`, and note: the
    artifact's tags, and who adopted it as what. Empty when the lineage does not know the name. Raises EclectusError
    when it is the start of several. Cost: docs/benchmarks.md.
    """
    with connect(home) as connection:
        read_once(connection)
        answer = connection.execute(
            "select 'up' as direction, * from upstream($1) union all select 'down', * from downstream($1)", [name]
        )
        columns = [column[0] for column in answer.description]
        rows = [dict(zip(columns, row, strict=True)) for row in answer.fetchall()]
        notes = _notes(connection)
    named = {row["artifact"]: row for row in rows if row["steps_away"] == 0}
    if len(named) > 1:
        names = ", ".join(f"{row['kind']}-{row['artifact'][:20]}" for row in list(named.values())[:3])
        raise EclectusError(f"'{name}' is the start of {len(named)} artifacts, such as {names}; write more of it")
    found = []
    for row in rows:
        direction, steps = row.pop("direction"), row.pop("steps_away")
        if steps or direction == "up":
            note = notes.get(row["artifact"])
            found.append({"direction": direction if steps else "this", "steps_away": steps, **row, "note": note})
    return sorted(found, key=lambda row: (row["direction"] == "down", row["steps_away"]))


def _notes(connection: duckdb.DuckDBPyConnection) -> dict[str, str]:
    """What users decided about artifacts, by digest: "greek@2; adopted as 'train dense' by ana on 2026-11-30: ..."."""
    rows = connection.execute(
        """
        select artifact, string_agg(note, '; ' order by since) from (
            select artifact, since, tag as note from tags
            union all
            select artifact, since, concat('adopted as "', label, '" by ', "by",
                   strftime(since, ' on %Y-%m-%d: '), reason) from adoptions)
        group by artifact"""
    ).fetchall()
    return dict(rows)


def write_database(home: Home) -> Path:
    """Writes `eclectus.duckdb`, a file with the same views for the `duckdb` shell, unless it already has them.

    A shell that holds an older one open keeps it; nobody waits. Tables that users added stay until the views change.
    """
    create_placeholders(home)
    stamp = home.journal / "views" / "shell"
    views = _digest(home)
    if home.database.exists() and stamp.exists() and stamp.read_text() == views and _opens(home.database):
        return home.database
    with new_database(home.database) as connection:
        create_views(connection, home)
    # A write-ahead log that a killed shell left next to the old file is no part of the new one.
    home.database.with_name(home.database.name + ".wal").unlink(missing_ok=True)
    stamp.parent.mkdir(exist_ok=True)
    stamp.write_text(views)
    return home.database


@contextlib.contextmanager
def new_database(out: Path, replaced: bool = True) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection to a new database, which becomes `out` at the end of the block, in the format of any shell.

    replaced: whether it replaces what is there; else FileExistsError.

    It is made elsewhere: DuckDB puts its write-ahead log into a folder that is not there where a path holds a `?`.
    """
    with tempfile.TemporaryDirectory(prefix="eclectus-") as scratch:
        made = Path(scratch) / "new.duckdb"
        with duckdb.connect() as connection:
            connection.execute("set enable_progress_bar = false")
            connection.execute(f"attach {text(made)} as made (storage_version '{STORAGE_VERSION}')")
            connection.execute("use made")
            yield connection
        with (replacing if replaced else creating)(out) as temporary:
            shutil.copyfile(made, temporary)


@contextlib.contextmanager
def querying(sql: str, home: Home | None = None) -> Iterator[tuple[list[str], Iterator[tuple[Any, ...]]]]:
    """(column names, rows) of a user's query, of which only some are in memory at a time.

    Raises EclectusError with DuckDB's own message, also while the rows are read.
    """
    with connect(home) as connection:

        def rows() -> Iterator[tuple[Any, ...]]:
            while batch := answer.fetchmany(ROWS_AT_ONCE):
                yield from batch

        try:
            answer = connection.execute(sql)
            yield [column[0] for column in answer.description or []], rows() if answer.description else iter(())
        except duckdb.Error as error:
            raise EclectusError(f"the query failed: {str(error).strip()}") from error


def query(sql: str, home: Home | None = None) -> tuple[list[str], list[tuple[Any, ...]]]:
    """(column names, rows) of a query. Raises EclectusError with DuckDB's own message."""
    with querying(sql, home) as (names, rows):
        return names, list(rows)


def _copy_views(home: Home, path: Path, files: ReadOnlyFiles, root: str, cached: Path | None, keep: bool) -> None:
    """A database with the views at `path`, copied from `cached` where that exists: creating one takes half a second."""
    if cached is not None and cached.exists():
        shutil.copyfile(cached, path)
        return
    with duckdb.connect() as connection:
        connection.register_filesystem(files)
        connection.execute(f"attach {text(path)} as books (block_size 16384)")
        connection.execute("use books")
        create_views(connection, home, root)
    if cached is None or not keep:
        return
    # A read-only home is queried all the same.
    with contextlib.suppress(OSError):
        cached.parent.mkdir(exist_ok=True)
        with replacing(cached) as temporary:
            shutil.copyfile(path, temporary)


def _open(path: Path) -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect(path, read_only=True, config={"temp_directory": ""})
    connection.execute("select count(*) from duckdb_views() where not internal").fetchall()
    return connection


def _opens(database: Path) -> bool:
    """Whether a database is whole; one that a shell has locked is."""
    try:
        _open(database).close()
    except duckdb.Error as error:
        return "set lock" in str(error)
    return True


def _digest(home: Home, root: str | None = None) -> str:
    return hashlib.sha256(repr([duckdb.__version__, *definitions(home, root)]).encode()).hexdigest()[:32]
