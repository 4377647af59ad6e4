"""Making room: what no kept run and no champion needs, shown first, and freed on request.

Needed is everything that was read or made by the latest runs that gave something, by runs that a person keeps and by runs at
work; every checkpoint that was ever promoted, with its evaluations and its gate; what all of these were made from; and, of models that were
refused, the documents that they saw (`retrain` counts what is new against them) and each line's last one. What the lineage does not know is
left alone. Freed too: drafts of processes that died, damaged artifacts that were set aside, and unfinished training that nobody
went on with for a week. The lineage keeps its rows, and which documents were in freed instances, so that `trace` answers as before; a
run that wants a freed artifact makes it again. Nothing is freed while a run is at work.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
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
from eclectus.storage.lineage.connection import connect
from eclectus.storage.lineage.macros import NODE
from eclectus.storage.lineage.tables import text

DAY = 86_400
DIGITS = 32
# Kind -> what of a freed artifact stays: the folder of the journal, the columns, and the files that they come from.
KEPT = {
    "instances": ("documents", "*", "documents.parquet"),
    "documents": ("held", "document, name", "documents/*.parquet"),
}

_OF_RUNS = """
    select artifact from step_outputs where run in (select unnest($1::varchar[]))
    union select artifact from step_inputs where run in (select unnest($1::varchar[]))"""
_UPSTREAM = f"""
    select distinct kind, artifact from nodes where node in (
        select node from reached((select list({NODE}) from (select unnest($1::varchar[]) as artifact)), true))"""


@dataclass(frozen=True)
class Unneeded:
    """Something that can be freed. what: artifact, draft, damaged or training. bytes: on this machine, or of the store."""

    what: str
    name: str
    bytes: int
    why: str
    place: Path


@dataclass(frozen=True)
class Plan:
    """runs: those whose artifacts stay. kept: artifacts that are needed. unknown: artifacts that the lineage does not know."""

    unneeded: list[Unneeded]
    runs: list[str]
    kept: int
    unknown: int


def plan(home: Home, latest: int) -> Plan:
    """What could be freed if, beside what people keep, the latest so many runs are kept."""
    with connect(home) as connection:
        runs = _kept_runs(connection, latest) | set(runs_at_work(home))
        needed = _needed(connection, runs)
        known = dict(connection.execute("select kind || '/' || artifact[1:32], bytes from artifacts").fetchall())
    here = {f"{place.parent.name}/{place.name}": place for place in _places(home)}
    unneeded = [
        Unneeded("artifact", name.replace("/", "-")[: name.index("/") + 13], _size(place) or known[name] or 0, "no kept run and no champion needs it", place)
        for name, place in here.items()
        if name in known and name.split("/")[1] not in needed
    ]  # fmt: skip
    unneeded += _left_behind(home)
    unknown = sum(name not in known for name in here)
    gone = sum(each.what == "artifact" for each in unneeded)
    return Plan(sorted(unneeded, key=lambda each: -each.bytes), sorted(runs), len(here) - unknown - gone, unknown)


def free(home: Home, planned: Plan) -> int:
    """Frees what was planned; the bytes that it took. Raises EclectusError while a run is at work."""
    total = 0
    for each in planned.unneeded:
        if working := runs_at_work(home):
            raise EclectusError(f"run {working[0]} is at work in {home.name}; free when it has ended")
        if each.what == "artifact":
            _keep_documents(home, each.place)
        _remove(home, each.place)
        total += each.bytes
    return total


def keep(home: Home, run: str, kept: bool = True) -> None:
    """Notes that a person keeps a run, or does so no longer."""
    with Journal(home.journal, run, home.mirror) as journal:
        journal.event("run_kept" if kept else "run_released")


def runs_at_work(home: Home) -> list[str]:
    """Runs whose journal somebody still writes; on another machine: that have not said that they ended, and were at it today."""
    names = {path.name.split(".")[0] for path in journals(home, EVENTS) if not finished(path)}
    if names:
        with connect(home) as connection:
            over = connection.execute("select run from runs where state <> 'unfinished'").fetchall()
        names -= {run for (run,) in over}
    return sorted(names)


def _kept_runs(connection: duckdb.DuckDBPyConnection, latest: int) -> set[str]:
    rows = connection.execute(
        """
        select run from runs where kept
        union select run from (select run from runs where run in (select run from step_outputs) order by started desc limit $1)
        """,
        [latest],
    ).fetchall()
    return {run for (run,) in rows}


def _needed(connection: duckdb.DuckDBPyConnection, runs: Iterable[str]) -> set[str]:
    """The first 32 digits of everything that stays."""
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
    kept = {artifact for _, artifact in connection.execute(_UPSTREAM, [sorted(start)]).fetchall()} | start
    seen = connection.execute(_UPSTREAM, [sorted(refused)]).fetchall()
    kept |= {artifact for kind, artifact in seen if kind == "documents"}
    return {artifact[:DIGITS] for artifact in kept}


def _places(home: Home) -> Iterator[Path]:
    """Where artifacts are, or would be if they were brought from the object store."""
    root = home.store.root
    found = {manifest.parent for manifest in root.glob(f"[!.]*/*/{MANIFEST}")}
    if home.mirror:
        found |= {manifest.parent for manifest, _ in home.mirror.listing(root, MANIFEST)}
    yield from sorted(place for place in found if not place.name.startswith(EMPTY))


def _left_behind(home: Home) -> Iterator[Unneeded]:
    root = home.store.root
    for place in sorted(root.glob(".drafts/[!.]*")):
        held = draft_is_held(place)
        if held is False or (held is None and _quiet(place) > DAY):
            yield Unneeded("draft", place.name, _size(place), "the process that wrote it is gone", place)
    for pattern in (".drafts/.*", ".freed/*"):
        for place in sorted(root.glob(pattern)):
            if _quiet(place) > DAY:
                yield Unneeded("draft", place.name, _size(place), "left behind by a process that was killed", place)
    for place in sorted(root.glob(".damaged/*")):
        yield Unneeded("damaged", place.name, _size(place), "damaged, and set aside", place)
    for place in sorted(home.work.glob("*")):
        if re.fullmatch("[0-9a-f]{32}", place.name) and _quiet(place) > 7 * DAY:
            yield Unneeded("training", place.name, _size(place), "unfinished, and untouched for a week", place)


def _keep_documents(home: Home, place: Path) -> None:
    """Which documents were in it stays known: their ids are copied to the journal."""
    folder, chosen, tables = KEPT.get(place.parent.name, ("", "", ""))
    if not folder:
        return
    if home.mirror and not place.exists():
        home.mirror.pull(place)
    if any(place.glob(tables)):
        kept = home.journal / folder / f"{place.name}.parquet"
        kept.parent.mkdir(exist_ok=True)
        rows = f"select {chosen} from read_parquet({text(place / tables)}, union_by_name = true)"
        with replacing(kept) as temporary, duckdb.connect() as connection:
            connection.execute(f"copy ({rows}) to {text(temporary)} (format parquet)")
        if home.mirror:
            home.mirror.push(kept)


def _remove(home: Home, place: Path) -> None:
    """An artifact is whole or gone, never half: it is renamed away first. From the object store its manifest goes first."""
    if home.mirror and home.store.root in place.parents:
        home.mirror.remove(place / MANIFEST)
        home.mirror.remove(place)
    if not place.exists():
        return
    aside = home.store.root / ".freed" / f"{place.name}-{uuid.uuid4().hex[:6]}"
    aside.parent.mkdir(exist_ok=True)
    os.rename(place, aside)
    shutil.rmtree(aside)


def _size(place: Path) -> int:
    return sum(path.stat().st_size for path in place.rglob("*") if path.is_file())


def _quiet(place: Path) -> float:
    """Seconds since anything in a folder changed."""
    return time.time() - max((path.stat().st_mtime for path in [place, *place.rglob("*")]), default=0.0)
