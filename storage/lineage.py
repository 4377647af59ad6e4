"""Lineage as DuckDB views over the journals: what ran, from what, why, and what came of it.

`connect` opens a read-only DuckDB with the views and macros of `storage.tables`; nothing is locked, and runs go on writing
meanwhile. The same views stand in `eclectus.duckdb` for people with the `duckdb` shell. docs/lineage.md has the columns.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import uuid
from pathlib import Path
from typing import Any

import duckdb

from storage.errors import EclectusError
from storage.home import Home
from storage.tables import create_views, definitions, plant, text

# What a `duckdb` shell of version 1.0 or later can open; DuckDB 2.0's own format cannot be read by any shell on PyPI.
STORAGE_VERSION = "v1.0.0"


def connect(home: Home | str | Path | None = None) -> duckdb.DuckDBPyConnection:
    """A read-only DuckDB connection with the views over a home's journals: `connect().sql("from runs").df()`.

    Only the books can be read through it, and nothing can be written: COPY, ATTACH, EXPORT, INSTALL and other files are
    refused by DuckDB itself. Temporary tables are allowed. Raises EclectusError when there is no home.
    """
    from storage.reading import PREFIX, ReadOnlyFiles

    home = home if isinstance(home, Home) else Home.open(home)
    home.refresh()
    plant(home)
    # DuckDB can be told to be read-only for a file only. It holds nothing but the views, and is gone once it is open.
    with tempfile.TemporaryDirectory(prefix="eclectus-") as scratch:
        path = Path(scratch) / "books.duckdb"
        files = ReadOnlyFiles(
            [home.journal, home.store.root / "instances", home.store.root / "documents", home.store.root / "evaluation"]
        )
        _place_views(home, path, files, PREFIX)
        connection = duckdb.connect(path, read_only=True, config={"temp_directory": ""})
    connection.register_filesystem(files)
    connection.execute("set enable_progress_bar = false")
    connection.execute(f"set allowed_directories = [{text(PREFIX)}]")
    connection.execute("set enable_external_access = false")
    connection.execute("set disabled_filesystems = 'LocalFileSystem'")
    connection.execute("set lock_configuration = true")
    return connection


def walk(name: str, home: Home | None = None) -> list[dict[str, Any]]:
    """Everything that an artifact was made from (`direction` up) and that was made from it (down), nearest first.

    name: as in the macro `upstream`. A row: direction, steps away, and the columns of `upstream`, with the inputs of the step
    that made it. Empty when the lineage does not know the name. Price: 0.9 CPU seconds in a history of a million steps.
    """
    with connect(home) as connection:
        found = {}
        for direction, macro in (("up", "upstream"), ("down", "downstream")):
            answer = connection.execute(f"from {macro}(?)", [name])
            columns = [column[0] for column in answer.description]
            found[direction] = [dict(zip(columns, row, strict=True)) for row in answer.fetchall()]
        steps = {row["made_by"] for rows in found.values() for row in rows if row["made_by"]}
        inputs: dict[str, list[str]] = {}
        if steps:
            marks = ", ".join("?" * len(steps))
            sql = f"select step, artifact from step_inputs where step in ({marks})"
            for step, artifact in connection.execute(sql, list(steps)).fetchall():
                inputs.setdefault(step, []).append(artifact)
    return [
        {"direction": direction if distance else "this", "steps_away": distance, **row}
        for direction, rows in found.items()
        for distance, row in _by_distance(rows, inputs, direction)
        if distance or direction == "up"
    ]


def _by_distance(
    rows: list[dict[str, Any]], inputs: dict[str, list[str]], direction: str
) -> list[tuple[int, dict[str, Any]]]:
    """(steps from where the walk began, row), nearest first. A walk up begins at what nothing else was made from, and so on."""
    known = {row["artifact"]: row for row in rows}
    below: dict[str, list[str]] = {artifact: [] for artifact in known}
    for row in rows:
        for artifact in inputs.get(row["made_by"], []):
            if artifact in known:
                a, b = (row["artifact"], artifact) if direction == "up" else (artifact, row["artifact"])
                below[a].append(b)
    has_parent = {child for children in below.values() for child in children}
    distance = {artifact: 0 for artifact in known if artifact not in has_parent}
    waiting = list(distance)
    for artifact in waiting:
        for child in below[artifact]:
            if child not in distance:
                distance[child] = distance[artifact] + 1
                waiting.append(child)
    return sorted(((distance.get(row["artifact"], 0), row) for row in rows), key=lambda pair: pair[0])


def _place_views(home: Home, path: Path, files: Any, prefix: str) -> None:
    """A database with the views at `path`: a copy of the last one made, as making one costs half a second."""
    known = home.journal / "views" / f"{_digest(home, prefix)}.duckdb"
    if not known.exists():
        with duckdb.connect() as making:
            making.register_filesystem(files)
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
    if home.database.exists() and stamp.exists() and stamp.read_text() == views:
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


def query(sql: str, home: Home | None = None) -> tuple[list[str], list[tuple[Any, ...]]]:
    """(column names, rows) of a query that a person typed. Raises EclectusError with DuckDB's own first line."""
    with connect(home) as connection:
        try:
            result = connection.sql(sql)
            return ([], []) if result is None else (result.columns, result.fetchall())
        except duckdb.Error as error:
            raise EclectusError(f"the query failed: {str(error).strip()}") from error
