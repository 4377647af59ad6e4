"""Compaction: the journals of finished processes become Parquet, in levels, while everyone goes on reading and writing.

A journal is finished when the lock that its writer held is free (the process ended, or died); where another machine
wrote it or locks do not work, when its run has ended and it has not grown for a day. Finished journals become one
Parquet part of level 1; when there are MANY parts of a level, they become one of the next. A part is written to a
temporary path and renamed to `LEVEL-TIME-DIGEST.parquet`, after its own bytes, so that `verify` needs nothing else.
Replaced files are deleted after GRACE s; our connections stop listing them after GRACE/2 (`replaced`), so no listed
file vanishes before it is opened. Views take each journal from its highest part only, so nothing is counted twice.
Lines that cannot be read are quarantined in `journal/rejected/`, with their number and the reason. On an object store
journals stay as they are; each machine compacts its own copy of them, and keeps it. Cost: 1,000,000 steps of 50,000
runs took 10 minutes on a busy machine, once; a run's own journal well under a second.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import sys
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import duckdb

from eclectus.storage.artifact import EMPTY, hash_file
from eclectus.storage.atomic_write import temporary_path, write_atomically
from eclectus.storage.home import Home
from eclectus.storage.journal import EVENTS
from eclectus.storage.lineage.dead_runs import end_dead_runs
from eclectus.storage.lineage.live_journals import finished, journals
from eclectus.storage.lineage.sql.files import folded, matching, raw, readable, text
from eclectus.storage.lineage.sql.macros import EDGES, NODES, edges, nodes
from eclectus.storage.lineage.sql.placeholders import create_placeholders, write_contents
from eclectus.storage.lineage.sql.schema import COLUMNS, NEEDED

INDEXES = ("edges", "nodes", "contents")
DAMAGED = "damaged"
REPLACED = "replaced"
ROWS_PER_GROUP = 20_000
MANY = 32
HIGHEST = 4
GRACE = 20.0
BYTES_AT_ONCE = 2**28
JOURNALS_AT_ONCE = 2_000


@dataclass
class Compacted:
    """Journals and rows that became Parquet, parts that were merged, and rejected lines (file, number, why)."""

    journals: int = 0
    rows: int = 0
    merged: int = 0
    rejected: list[dict[str, object]] = field(default_factory=list)


def compact(home: Home, journals: int = JOURNALS_AT_ONCE) -> Compacted:
    """Compacts what is finished, at most `journals` per stream. Does nothing while another process compacts.

    Raises OSError when the disk is full; nothing is lost then.
    """
    done = Compacted()
    if not create_placeholders(home):
        return done
    with _locked(home) as locked:
        if not locked:
            return done
        _sweep(home)
        repair_index(home)
        end_dead_runs(home)
        with duckdb.connect() as connection:
            connection.execute("set enable_progress_bar = false")
            connection.execute("set preserve_insertion_order = false")
            for stream in COLUMNS:
                _compact_stream(connection, home, stream, journals, done)
    return done


def compact_and_clean_up(home: Home) -> Compacted:
    """Compacts everything that is finished, waits for readers of the old files, and deletes these."""
    done = compact(home, sys.maxsize)
    if done.journals or done.merged:
        time.sleep(GRACE + 1)
        compact(home, 0)
    return done


def repair_index(home: Home) -> None:
    """Writes the index of a part again where it is missing, or has other columns than today's."""
    stale = set()
    with duckdb.connect() as connection:
        for name, columns in {"edges": EDGES, "nodes": NODES}.items():
            made = connection.execute(
                f"select file_name, list(name) from parquet_schema({matching(home.journal / name, '*.parquet')}) "
                "where type is not null group by file_name"
            ).fetchall()
            whole = {Path(file).stem.rpartition("-")[0] for file, found in made if found == [*columns]}
            for part in _parts(home, EVENTS):
                if part.stem not in whole:
                    stale.add(part)
        chosen = ", ".join(f'"{name}"' for name in COLUMNS[EVENTS])
        for part in sorted(stale):
            rows = f"read_parquet({readable(part, _empty_part(home))}, union_by_name = true)"
            connection.execute(f"create or replace temp table part as select {chosen} from {rows}")
            _write_index(connection, home, part.stem)


def _empty_part(home: Home) -> Path:
    """The empty part that has all of today's columns."""
    return max((home.journal / EVENTS).glob(f"{EMPTY}-*.parquet"), key=lambda path: path.stat().st_mtime)


def faults(home: Home) -> list[str]:
    """Faults of the journals as messages: changed parts, and lines that cannot be read."""
    found = []
    for folder in (*COLUMNS, *INDEXES):
        for part in _parts(home, folder):
            if hash_file(part)[:16] != part.stem.rpartition("-")[2]:
                found.append(
                    f"journal part {part} changed; put it back from a copy, or remove it to go on without what it says"
                )
    for stream in COLUMNS:
        for path in journals(home, stream):
            found += [f"journal {path}, line {bad['line']}: {bad['why']}" for bad in bad_lines(path, stream)]
    for path in sorted((home.journal / DAMAGED).glob("*")):
        found.append(f"journal part {path} was damaged and quarantined; put it back from a copy, or remove it")
    for path in sorted((home.journal / "rejected").glob("*.ndjson")):
        if count := len(path.read_text().splitlines()):
            found.append(f"journal {path}: {count} lines that could not be read were quarantined")
    return found


def bad_lines(path: Path, stream: str) -> Iterator[dict[str, object]]:
    """Lines of a journal that are no rows of its stream, as {file, line, why, text}; none still being written."""
    needed = NEEDED[stream]
    with open(path, "rb") as handle:
        for number, line in enumerate(handle, 1):
            why = None if line.strip() else "empty"
            try:
                row = json.loads(line) if why is None else {}
                if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in needed):
                    why = why or f"no {' and '.join(needed)}"
            except ValueError as error:
                if not line.endswith(b"\n") and not finished(path):
                    continue
                why = f"not JSON ({error})"
            if why and line.strip():
                yield {
                    "file": path.name,
                    "line": number,
                    "why": why,
                    "text": line.decode(errors="replace").rstrip("\n"),
                }


@contextlib.contextmanager
def _locked(home: Home) -> Iterator[bool]:
    with open(home.journal / "compacting", "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


def _compact_stream(
    connection: duckdb.DuckDBPyConnection, home: Home, stream: str, limit: int, done: Compacted
) -> None:
    highest = _highest_parts(connection, home, stream)
    _remove_replaced(home, stream, highest)
    new = [path for path in journals(home, stream) if path.name not in highest and finished(path)]
    for batch in _batches(new[:limit]):
        for path in batch:
            if bad := list(bad_lines(path, stream)):
                _quarantine(home, path, bad)
                done.rejected += bad
        source = raw(readable(*batch), stream)
        rows = folded(source) if stream == EVENTS else source
        done.rows += _write_part(connection, home, stream, 1, rows, [path.name for path in batch])
        done.journals += len(batch)
    for level in range(1, HIGHEST):
        highest = _highest_parts(connection, home, stream)
        full = [part for part in _parts(home, stream) if part.name in set(highest.values()) and _level(part) == level]
        if len(full) < MANY:
            break
        rows = f"from read_parquet({readable(*full)}, union_by_name = true)"
        _write_part(connection, home, stream, level + 1, rows, [part.name for part in full])
        done.merged += len(full)


def _write_part(
    connection: duckdb.DuckDBPyConnection, home: Home, stream: str, level: int, source: str, stands_for: list[str]
) -> int:
    """Writes one part, after the index of its edges and nodes: a surplus edge is harmless, a missing one is not.

    stands_for: names of the journals or parts whose rows these are.
    """
    columns = ", ".join(f'"{name}"' for name in COLUMNS[stream])
    connection.execute(f"create or replace temp table part as select {columns}, journal from ({source})")
    with temporary_path(home.journal / stream / "part") as temporary:
        digest = _copy_to(connection, temporary, "select * from part order by logged", "zstd")
        stem = f"{level}-{time.strftime('%Y%m%d%H%M%S', time.gmtime())}-{digest}"
        if stream == EVENTS:
            _write_index(connection, home, stem)
        os.rename(temporary, home.journal / stream / f"{stem}.parquet")
    write_contents(home, stream, home.journal / stream / f"{stem}.parquet")
    _replaces(home, stream, f"{stem}.parquet", stands_for)
    ((count,),) = connection.execute("select count(*) from part").fetchall()
    connection.execute("drop table part")
    return count


def _write_index(connection: duckdb.DuckDBPyConnection, home: Home, stem: str) -> None:
    """Writes the edges and nodes of the table `part`, for the part of this name, in place of those that it has."""
    ended = "(from part where event = 'step_ended')"
    tables = {
        "edges": f"select * from ({edges(ended)}) order by output, input",
        "nodes": f"select * from ({nodes(ended)}) order by placed, node, made, made_by",
    }
    for name, sql in tables.items():
        with temporary_path(home.journal / name / "part") as temporary:
            digest = _copy_to(connection, temporary, sql, "snappy")
            written = home.journal / name / f"{stem}-{digest}.parquet"
            os.rename(temporary, written)
        for old in (home.journal / name).glob(f"{stem}-*.parquet"):
            if old != written:
                old.unlink(missing_ok=True)


def _copy_to(connection: duckdb.DuckDBPyConnection, path: Path, sql: str, compression: str) -> str:
    """Writes these rows as Parquet, synced; the first digits of the file's digest."""
    connection.execute(
        f"copy ({sql}) to {text(path)} (format parquet, compression {compression}, row_group_size {ROWS_PER_GROUP})"
    )
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())
    return hash_file(path)[:16]


def replaced(home: Home, seconds: float) -> set[str]:
    """Journals and parts, as `events/NAME`, that a part which still exists has replaced for at least `seconds`."""
    names: set[str] = set()
    for path in (home.journal / REPLACED).glob("[!.]*"):
        with contextlib.suppress(FileNotFoundError):
            part, *stood_for = path.read_text().splitlines()
            if time.time() - path.stat().st_mtime >= seconds and (home.journal / part).exists():
                names.update(stood_for)
    return names


def _replaces(home: Home, stream: str, part: str, names: list[str]) -> None:
    """Records that this part replaces these journals or parts from now on."""
    folder = home.journal / REPLACED
    folder.mkdir(exist_ok=True)
    write_atomically(folder / uuid.uuid4().hex, "".join(f"{stream}/{name}\n" for name in (part, *names)))


def _remove_replaced(home: Home, stream: str, highest: dict[str, str]) -> None:
    """Deletes journals and parts whose rows are all in a higher part, GRACE seconds after that was recorded."""
    needed = set(highest.values())
    stood_for = {path: highest[path.name] for path in journals(home, stream) if path.name in highest}
    stood_for |= {part: max(needed) for part in _parts(home, stream) if needed and part.name not in needed}
    known, settled = replaced(home, 0), replaced(home, GRACE)
    unrecorded: dict[str, list[str]] = defaultdict(list)
    for path, part in stood_for.items():
        name = f"{stream}/{path.name}"
        if name in settled:
            if home.mirror and path.suffix != ".parquet":
                # The store's own copy, which the next query would bring again.
                continue
            for folder in INDEXES if path.suffix == ".parquet" else ():
                for index in (home.journal / folder).glob(f"{path.stem}-*.parquet"):
                    index.unlink()
            path.unlink()
        elif name not in known:
            unrecorded[part].append(path.name)
    for part, names in unrecorded.items():
        # A compaction was killed before it recorded them.
        _replaces(home, stream, part, names)
    for path in (home.journal / REPLACED).glob("[!.]*"):
        part, *names = path.read_text().splitlines()
        if not (home.journal / part).exists() or not any((home.journal / name).exists() for name in names):
            path.unlink()


def _sweep(home: Home) -> None:
    """Deletes what a killed compaction left: half-written files, and an index without its part."""
    # Arrays of an earlier version.
    shutil.rmtree(home.journal / "graph", ignore_errors=True)
    parts = {part.stem for stream in COLUMNS for part in _parts(home, stream)}
    left = [path for folder in (*COLUMNS, *INDEXES, REPLACED) for path in (home.journal / folder).glob(".*")]
    left += [path for name in INDEXES for path in _parts(home, name) if path.stem.rpartition("-")[0] not in parts]
    for path in left:
        if time.time() - path.stat().st_mtime > GRACE:
            path.unlink()


def _highest_parts(connection: duckdb.DuckDBPyConnection, home: Home, stream: str) -> dict[str, str]:
    """Journal -> name of the highest part that has it."""
    contents = matching(home.journal / "contents", "*.parquet")
    return dict(
        connection.execute(
            f"select journal, max(part) from read_parquet({contents}) where stream = ? group by journal", [stream]
        ).fetchall()
    )


def _parts(home: Home, stream: str) -> list[Path]:
    return sorted(path for path in (home.journal / stream).glob("*.parquet") if not path.stem.startswith(EMPTY))


def _level(part: Path) -> int:
    return int(part.name.split("-")[0])


def _batches(paths: list[Path]) -> Iterator[list[Path]]:
    batch: list[Path] = []
    size = 0
    for path in paths:
        batch.append(path)
        size += path.stat().st_size
        if size > BYTES_AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _quarantine(home: Home, path: Path, bad: list[dict[str, object]]) -> None:
    folder = home.journal / "rejected"
    folder.mkdir(exist_ok=True)
    write_atomically(folder / path.name, "".join(json.dumps(each) + "\n" for each in bad))
