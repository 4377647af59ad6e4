"""Empty files that let every view's glob match, and the lists of what compacted parts hold."""

from __future__ import annotations

import hashlib
from pathlib import Path

import duckdb

from eclectus.storage.artifact import EMPTY, hash_file
from eclectus.storage.atomic_write import replacing, temporary_path
from eclectus.storage.home import Home
from eclectus.storage.lineage.sql.files import nothing, readable, text
from eclectus.storage.lineage.sql.macros import EDGES, NODES
from eclectus.storage.lineage.sql.schema import COLUMNS, CONTENTS, DOCUMENTS, FIRST_LOSSES, HELD, ROUTING


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
                connection.execute(f"copy ({nothing(columns)}) to {text(temporary)} (format parquet)")


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
