"""Lineage as DuckDB views over the journals: what ran, from what, why, and what came of it.

`connect` opens a read-only DuckDB with the views and macros of `eclectus.storage.lineage.tables`; nothing is locked, and runs go on writing
meanwhile. The same views stand in `eclectus.duckdb` for people with the `duckdb` shell. docs/lineage.md has the columns.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import shutil
import tempfile
import uuid
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import numpy as np

from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.storage.lineage.compact import GRACE, replaced
from eclectus.storage.lineage.graph import reach, reached
from eclectus.storage.lineage.macros import NODE, edges
from eclectus.storage.lineage.repair import heal
from eclectus.storage.lineage.tables import create_views, definitions, plant, text

# What a `duckdb` shell of version 1.0 or later can open; DuckDB 2.0's own format cannot be read by any shell on PyPI.
STORAGE_VERSION = "v1.0.0"
# A connection with a function of ours that is still open when Python ends has DuckDB complain of leaks.
_OPEN: weakref.WeakSet[duckdb.DuckDBPyConnection] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for connection in list(_OPEN):
        connection.close()


def connect(home: Home | str | Path | None = None) -> duckdb.DuckDBPyConnection:
    """A read-only DuckDB connection with the views over a home's journals: `connect().sql("from runs").df()`.

    Only the books can be read through it, and nothing can be written: COPY, ATTACH, EXPORT, INSTALL and other files are
    refused by DuckDB itself. Temporary tables are allowed. Raises EclectusError when there is no home.
    """
    from eclectus.storage.lineage.read_only_files import PREFIX, ReadOnlyFiles

    home = home if isinstance(home, Home) else Home.open(home)
    home.refresh()
    plant(home)
    heal(home)
    # DuckDB can be told to be read-only for a file only. It holds nothing but the views, and is gone once it is open.
    with tempfile.TemporaryDirectory(prefix="eclectus-") as scratch:
        path = Path(scratch) / "books.duckdb"
        files = ReadOnlyFiles(
            [
                home.journal,
                home.store.root / "instances",
                home.store.root / "documents",
                home.store.root / "evaluation",
            ],
            partial(replaced, home, GRACE / 2),
        )
        known = home.journal / "views" / f"{_digest(home, PREFIX)}.duckdb"
        try:
            _place_views(home, path, files, PREFIX, known)
            connection = _open(path)
        except duckdb.Error:
            # A copy of the views that cannot be opened is damaged, and made again.
            path.unlink(missing_ok=True)
            known.unlink(missing_ok=True)
            try:
                _place_views(home, path, files, PREFIX, known)
                connection = _open(path)
            except duckdb.Error as error:
                why = str(error).splitlines()[0]
                raise EclectusError(
                    f"the books of {home.name} cannot be opened ({why}); see: eclectus verify"
                ) from error
    _equip(connection, home, files)
    _OPEN.add(connection)
    connection.execute("set enable_progress_bar = false")
    connection.execute(f"set allowed_directories = [{text(PREFIX)}]")
    connection.execute("set enable_external_access = false")
    connection.execute("set disabled_filesystems = 'LocalFileSystem'")
    connection.execute("set lock_configuration = true")
    return connection


def walk(name: str, home: Home | None = None) -> list[dict[str, Any]]:
    """Everything that an artifact was made from (`direction` up) and that was made from it (down), nearest first.

    name: as in the macro `upstream`. A row: direction, steps away, and the columns of `upstream`. Empty when the lineage does not
    know the name. Raises EclectusError when it is the start of several. Price: docs/benchmarks.md.
    """
    home = home or Home.open()
    with connect(home) as connection:
        answer = connection.execute(
            f"select 'up' as direction, 0 as steps_away, *, {NODE} as node from upstream($1) "
            f"union all select 'down', 0, *, {NODE} from downstream($1)",
            [name],
        )
        columns = [column[0] for column in answer.description]
        rows = [dict(zip(columns, row, strict=True)) for row in answer.fetchall()]
        live = connection.execute(edges("live_events")).fetchnumpy()
    digits = name.rpartition("-")[2]
    these = {row["artifact"]: row for row in rows if row["artifact"].startswith(digits)}
    if len(these) > 1:
        names = ", ".join(f"{row['kind']}-{row['artifact'][:20]}" for row in list(these.values())[:3])
        raise EclectusError(f"'{name}' is the start of {len(these)} artifacts, such as {names}; write more of it")
    start = np.array([row["node"] for row in these.values()], np.uint64)
    distance = {}
    for direction in ("up", "down"):
        node, _, away = reach(home, start, np.stack([live["output"], live["input"]], axis=1), direction == "up")
        distance[direction] = dict(zip(node.tolist(), away.tolist(), strict=True))
    found = []
    for row in rows:
        steps = distance[row["direction"]].get(row.pop("node"), 0)
        if steps or row["direction"] == "up":
            found.append({**row, "direction": row["direction"] if steps else "this", "steps_away": steps})
    return sorted(found, key=lambda row: (row["direction"] == "down", row["steps_away"]))


def _equip(connection: duckdb.DuckDBPyConnection, home: Home, files: Any) -> None:
    """Gives a connection what our views and macros ask for: files to read, and the graph to walk in."""
    connection.register_filesystem(files)
    row = "STRUCT(node UBIGINT, placed TIMESTAMP, away INTEGER)[]"
    connection.create_function(
        "reached", partial(reached, home), ["UBIGINT[]", "UBIGINT[][]", "BOOLEAN"], row, type="arrow"
    )


def _open(path: Path) -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect(path, read_only=True, config={"temp_directory": ""})
    connection.execute("select count(*) from duckdb_views() where not internal").fetchall()
    return connection


def _place_views(home: Home, path: Path, files: Any, prefix: str, known: Path) -> None:
    """A database with the views at `path`: a copy of the last one made, `known`, as making one costs half a second."""
    if not known.exists():
        with duckdb.connect() as making:
            _equip(making, home, files)
            making.execute(f"attach {text(path)} as books (block_size 16384)")
            making.execute("use books")
            create_views(making, home, prefix)
        # A home that cannot be written is read all the same.
        with contextlib.suppress(OSError):
            known.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, beside := known.with_name(f".{uuid.uuid4().hex}"))
            os.replace(beside, known)
        return
    shutil.copyfile(known, path)


def _digest(home: Home, prefix: str = "") -> str:
    return hashlib.sha256(repr([duckdb.__version__, *definitions(home, prefix)]).encode()).hexdigest()[:32]


def write_database(home: Home) -> Path:
    """Writes `eclectus.duckdb`, a file with the same views, for the `duckdb` shell, unless it is there with the same views.

    A shell that holds an older one open keeps it; nobody waits. What people added to the file stays until the views change.
    """
    plant(home)
    stamp = home.journal / "views" / "shell"
    views = _digest(home)
    if home.database.exists() and stamp.exists() and stamp.read_text() == views and _opens(home.database):
        return home.database
    beside = home.root / f".eclectus-{os.getpid()}-{uuid.uuid4().hex[:6]}.duckdb"
    with duckdb.connect() as connection:
        connection.execute(f"attach {text(beside)} as books (storage_version '{STORAGE_VERSION}')")
        connection.execute("use books")
        create_views(connection, home)
    # A log that a killed shell left beside the old file is no part of the new one.
    home.database.with_name(home.database.name + ".wal").unlink(missing_ok=True)
    os.replace(beside, home.database)
    stamp.parent.mkdir(exist_ok=True)
    stamp.write_text(views)
    return home.database


def _opens(database: Path) -> bool:
    """Whether a database is whole; one that a shell has locked is."""
    try:
        _open(database).close()
    except duckdb.Error as error:
        return "set lock" in str(error)
    return True


def query(sql: str, home: Home | None = None) -> tuple[list[str], list[tuple[Any, ...]]]:
    """(column names, rows) of a query that a person typed. Raises EclectusError with DuckDB's own first line."""
    with connect(home) as connection:
        try:
            result = connection.sql(sql)
            return ([], []) if result is None else (result.columns, result.fetchall())
        except duckdb.Error as error:
            raise EclectusError(f"the query failed: {str(error).strip()}") from error
