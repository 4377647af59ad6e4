"""Garbage collection: what no kept run and no champion needs, listed first, and deleted on request.

Needed is everything that was read or made by the latest runs with an output, by runs that users keep and by active
runs; what has a tag or was adopted; every checkpoint that was ever promoted, with its evaluations and its gate; what
all of these were made from; results that were imported; and, of refused models, their documents (`retrain` counts new
documents against them) and each line's last one. Artifacts that the lineage does not know are left alone. Deleted too:
drafts of processes that died, quarantined artifacts, unfinished training that was not resumed for a week, and parts of
steps that no run used for a week. The lineage keeps its rows, and which documents were in deleted instances, so that
`trace` answers as before; a run that needs a deleted artifact makes it again. Nothing is deleted while a run is active.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import duckdb

from eclectus.storage.artifact import EMPTY, MANIFEST, draft_is_held
from eclectus.storage.atomic_write import replacing
from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.storage.journal import EVENTS, Journal
from eclectus.storage.lineage.compact import finished, journals
from eclectus.storage.lineage.connection import connect, read_once
from eclectus.storage.lineage.sql.files import matching, text
from eclectus.storage.lineage.sql.macros import NODE
from eclectus.storage.unused import DAY, PART, PARTS, quiet, unused_parts

DIGITS = 32
# Kind -> what is kept of a deleted artifact: the folder of the journal, the columns, and the files that have them.
KEPT = {
    "instances": ("documents", "*", "documents*.parquet"),
    "documents": ("held", "document, name", "documents/*.parquet"),
}

_OF_RUNS = """
    select artifact from step_outputs where run in (select unnest($1::varchar[]))
    union select artifact from step_inputs where run in (select unnest($1::varchar[]))"""
# What users named, or accepted as a step's result.
_NAMED = "select artifact from tags union select artifact from adoptions"
# They cannot be made again without the files that they were read from; what they are of is not kept for them.
_IMPORTED = "select distinct artifact from step_outputs join steps s using (step) where s.name = 'import_results'"
_UPSTREAM = f"""
    select distinct kind, artifact from nodes where node in (
        select node from reached((select list({NODE}) from (select unnest($1::varchar[]) as artifact)), true))"""


@dataclass(frozen=True)
class Unneeded:
    """A folder that can be deleted. what: artifact, draft, damaged or training. bytes: here, or else on the store."""

    what: str
    name: str
    bytes: int
    why: str
    place: Path


@dataclass(frozen=True)
class Plan:
    """runs: those whose artifacts stay. kept: number of needed artifacts. unknown: number that the lineage lacks."""

    unneeded: list[Unneeded]
    runs: list[str]
    kept: int
    unknown: int


def plan(home: Home, latest: int) -> Plan:
    """What could be deleted if the `latest` runs are kept, besides those that users keep."""
    with connect(home) as connection:
        read_once(connection)
        runs = _kept_runs(connection, latest) | set(active_runs(home))
        needed = _needed(connection, runs)
        known = dict(connection.execute("select kind || '/' || artifact[1:32], bytes from artifacts").fetchall())
    here = {f"{place.parent.name}/{place.name}": place for place in _places(home)}
    unneeded = []
    for name, place in here.items():
        kind, digits = name.split("/")
        if name in known and digits not in needed:
            size = _size(place) or known[name] or 0
            unneeded.append(
                Unneeded("artifact", f"{kind}-{digits[:12]}", size, "no kept run and no champion needs it", place)
            )
    unneeded += _left_behind(home)
    unknown = sum(name not in known for name in here)
    gone = sum(each.what == "artifact" for each in unneeded)
    return Plan(sorted(unneeded, key=lambda each: -each.bytes), sorted(runs), len(here) - unknown - gone, unknown)


def free(home: Home, planned: Plan) -> int:
    """Deletes what was planned; returns its bytes. Raises EclectusError while a run is active."""
    total = 0
    for each in planned.unneeded:
        if active := active_runs(home):
            raise EclectusError(f"run {active[0]} is active in {home.name}; run gc when it has ended")
        if each.what == "artifact":
            _keep_documents(home, each.place)
        _remove(home, each.place)
        total += each.bytes
    return total


def keep(home: Home, run: str, kept: bool = True) -> None:
    """Records that a user keeps a run, or releases it."""
    with Journal(home.journal, run, home.mirror) as journal:
        journal.event("run_kept" if kept else "run_released")


def active_runs(home: Home) -> list[str]:
    """Runs whose journal is still being written; on other machines: that have not ended, and wrote within a day."""
    names = {path.name.split(".")[0] for path in journals(home, EVENTS) if not finished(path)}
    if names:
        with connect(home) as connection:
            over = connection.execute("select run from runs where state <> 'unfinished'").fetchall()
        names -= {run for (run,) in over}
    return sorted(names)


def _kept_runs(connection: duckdb.DuckDBPyConnection, latest: int) -> set[str]:
    rows = connection.execute(
        """
        with listed as materialized (select run, kept, started from runs)
        select run from listed where kept
        union select run from (
            select run from listed where run in (select run from step_outputs) order by started desc limit $1)
        """,
        [latest],
    ).fetchall()
    return {run for (run,) in rows}


def _needed(connection: duckdb.DuckDBPyConnection, runs: Iterable[str]) -> set[str]:
    """The first 32 digits of every artifact that stays."""
    start = {artifact for (artifact,) in connection.execute(_OF_RUNS, [sorted(runs)]).fetchall()}
    refused = set()
    last: dict[str, str] = {}
    decisions = connection.execute(
        "select line, verdict, checkpoint, evaluations, gate from decisions order by logged"
    ).fetchall()
    for line, verdict, checkpoint, evaluations, gate in decisions:
        last[line] = checkpoint
        if verdict != "promoted":
            refused.add(checkpoint)
            continue
        start |= {checkpoint, *json.loads(evaluations or "{}").values(), *([gate] if gate else [])}
    start |= set(last.values())
    start |= {artifact for (artifact,) in connection.execute(_NAMED).fetchall()}
    kept = {artifact for _, artifact in connection.execute(_UPSTREAM, [sorted(start)]).fetchall()} | start
    seen = connection.execute(_UPSTREAM, [sorted(refused)]).fetchall()
    kept |= {artifact for kind, artifact in seen if kind == "documents"}
    kept |= {artifact for (artifact,) in connection.execute(_IMPORTED).fetchall()}
    return {artifact[:DIGITS] for artifact in kept}


def _places(home: Home) -> Iterator[Path]:
    """The folders of artifacts, or where they would be if downloaded from the object store."""
    root = home.store.root
    found = {manifest.parent for manifest in root.glob(f"[!.]*/*/{MANIFEST}")}
    if home.mirror:
        found |= {manifest.parent for manifest, _ in home.mirror.listing(root, MANIFEST)}
    yield from sorted(place for place in found if not place.name.startswith(EMPTY))


def _left_behind(home: Home) -> Iterator[Unneeded]:
    root = home.store.root
    for place in sorted(root.glob(".drafts/[!.]*")):
        held = draft_is_held(place)
        if held is False or (held is None and quiet(place) > DAY):
            yield Unneeded("draft", place.name, _size(place), "the process that wrote it is gone", place)
    for pattern in (".drafts/.*", ".freed/*", "[!.]*/.*"):
        for place in sorted(root.glob(pattern)):
            if quiet(place) > DAY:
                yield Unneeded("draft", place.name, _size(place), "left behind by a process that was killed", place)
    for place in sorted(root.glob(".damaged/*")):
        yield Unneeded("damaged", place.name, _size(place), "damaged, and quarantined", place)
    for place in sorted(home.work.glob("*")):
        if re.fullmatch("[0-9a-f]{32}", place.name) and quiet(place) > 7 * DAY:
            yield Unneeded("training", place.name, _size(place), "unfinished, and not resumed for a week", place)
    for place in unused_parts(home):
        yield Unneeded("part", place.name, _size(place, alone=True), "a part of a step, and not used for a week", place)
    for path, age in home.mirror.ages(home.work / PARTS, PART) if home.mirror else ():
        if age > 7 * DAY and not path.parent.exists():
            yield Unneeded("part", path.parent.name, 0, "on the object store, and not made for a week", path.parent)


def _keep_documents(home: Home, place: Path) -> None:
    """Copies the ids of its documents to the journal, so that `trace` still knows them."""
    folder, chosen, tables = KEPT.get(place.parent.name, ("", "", ""))
    if not folder:
        return
    if home.mirror and not place.exists():
        home.mirror.pull(place)
    if any(place.glob(tables)):
        kept = home.journal / folder / f"{place.name}.parquet"
        kept.parent.mkdir(exist_ok=True)
        rows = f"select {chosen} from read_parquet({matching(place, tables)}, union_by_name = true)"
        with replacing(kept) as temporary, duckdb.connect() as connection:
            connection.execute(f"copy ({rows}) to {text(temporary)} (format parquet)")
        if home.mirror:
            home.mirror.push(kept)


def _remove(home: Home, place: Path) -> None:
    """Renamed first, so that an artifact is whole or gone; on the object store the manifest is deleted first."""
    if home.mirror and home.store.root in place.parents:
        home.mirror.remove(place / MANIFEST)
    if home.mirror:
        home.mirror.remove(place)
    if not place.exists():
        return
    renamed = home.store.root / ".freed" / f"{place.name}-{uuid.uuid4().hex[:6]}"
    renamed.parent.mkdir(exist_ok=True)
    os.rename(place, renamed)
    shutil.rmtree(renamed)


def _size(place: Path, alone: bool = False) -> int:
    """Bytes of a folder's files. alone: without those that stand elsewhere too, by a hard link."""
    found = [path.stat() for path in place.rglob("*") if path.is_file()]
    return sum(each.st_size for each in found if not alone or each.st_nlink == 1)
