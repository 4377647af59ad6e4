"""The lineage commands: sql, runs, lineage, trace, diff, why, bundle, openlineage, track, verify, keep, gc, compact.

Each prints a table, or one JSON object per row with `--json`. Only `keep`, `gc --yes` and `compact` write into a home.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from eclectus.flows.cli.rows import print_rows
from eclectus.flows.cli.track import add_track_command
from eclectus.storage.commands import command, quoted
from eclectus.storage.errors import EclectusError

if TYPE_CHECKING:
    from eclectus.storage.home import Home

# Help text of every argument that takes a run.
RUN_HELP = "run: an id as in `runs` or a unique start of one, 'last', or 'last~1' for the one before"
LATEST = 10


def add_lineage_commands(commands: Any) -> None:
    """Adds the commands to the command line's sub-parsers."""

    def add(name: str, act: Callable[[Any], None], help_text: str, **positional: str) -> argparse.ArgumentParser:
        part = commands.add_parser(name, help=help_text, description=help_text)
        for word, meaning in positional.items():
            part.add_argument(word, help=meaning)
        part.add_argument("--json", action="store_true", help="one JSON object per row instead of a table")
        part.set_defaults(act=act)
        return part

    artifact = "artifact: KIND-DIGITS as in `artifacts`, a digest or its start, a tag; or file-DIGITS of a source"
    add("sql", _sql, "query the lineage with DuckDB SQL", query='as "from runs order by started desc limit 5"')
    runs = add("runs", _runs, "the latest runs")
    runs.add_argument("--limit", type=int, default=20, help="how many (default: 20)")
    add("lineage", _lineage, "what an artifact was made from (up), and what was made from it (down)", artifact=artifact)
    add(
        "trace",
        _trace,
        "which artifacts hold a document, and what was made from them",
        document="document's id, at least 8 digits of it, or its own name",
    )
    add("diff", _diff, "what differs between two runs", run_a=RUN_HELP, run_b=RUN_HELP)
    add("why", _why, "why a step ran again, or was reused", run=RUN_HELP, step="step or label, as in `steps`")
    verify = add("verify", _verify, "hash every artifact and journal again and report what changed")
    verify.add_argument("names", nargs="*", help="artifacts to verify (default: all, and the journals)")
    bundle = add("bundle", _bundle, "write one DuckDB file with a run and all that it was made from", run=RUN_HELP)
    bundle.add_argument("place", nargs="?", metavar="OUT", help="the file (default: RUN.duckdb here)")
    bundle.add_argument("-o", "--out", help="the same")
    events = add(
        "openlineage", _openlineage, "send runs as OpenLineage events to OPENLINEAGE_URL, or write them to a file"
    )
    events.add_argument("runs", nargs="+", metavar="RUN", help=RUN_HELP)
    events.add_argument("-o", "--out", help="the file, one event per line (default: send them)")
    events.add_argument("--namespace", default="eclectus", help="of jobs and data sets (default: eclectus)")
    add_track_command(add, RUN_HELP)
    keep = add("keep", _keep, "protect what a run needs from `gc`, or release it", run=RUN_HELP)
    keep.add_argument("--release", action="store_true", help="no longer protect it")
    gc = add("gc", _gc, "show what no kept run and no champion needs; with --yes, delete it")
    gc.add_argument(
        "--runs", type=_count, default=LATEST, help=f"how many of the latest runs count as kept (default: {LATEST})"
    )
    gc.add_argument("--yes", action="store_true", help="delete what is shown")
    add("compact", _compact, "convert finished journals to Parquet now; each run does a little of it at its end")


def _sql(chosen: argparse.Namespace) -> None:
    from eclectus.storage.lineage.connection import querying

    with querying(chosen.query, _home()) as (names, rows):
        print_rows(names, rows, chosen.json)


def _runs(chosen: argparse.Namespace) -> None:
    _print_query(
        chosen,
        "select run, flow, state, started, seconds, code_version, host, error from runs order by started desc limit ?",
        [chosen.limit],
    )


def _lineage(chosen: argparse.Namespace) -> None:
    from eclectus.storage.lineage.connection import walk

    home = _home()
    tagged = home.store.tags.find(chosen.artifact)
    rows = walk(tagged or chosen.artifact, home)
    if not rows:
        raise EclectusError(
            f"nothing in the lineage is called '{chosen.artifact}'; see: {command('sql', 'from artifacts')}"
        )
    print_rows(list(rows[0]), [list(row.values()) for row in rows], chosen.json)


def _trace(chosen: argparse.Namespace) -> None:
    from eclectus.storage.lineage.connection import connect
    from eclectus.storage.lineage.sql.macros import named_documents

    asked = chosen.document
    with connect(_home()) as connection:
        named = named_documents(connection, asked)
        begun = sorted({document for document, _ in named if document.startswith(asked.lower()[:32])})
        exact = any(asked in pair for pair in named)
        if len(begun) > 1 and not exact:
            shown = ", ".join(begun[:3])
            raise EclectusError(f"'{asked}' is the start of {len(begun)} documents, such as {shown}; write more of it")
        answer = connection.execute("from trace(?)", [asked])
        names, rows = [column[0] for column in answer.description], answer.fetchall()
    if not rows:
        raise EclectusError(
            f"no document that is kept here is called '{asked}'; expected its id, at least 8 digits of it, or its name"
        )
    print_rows(names, rows, chosen.json)


def _diff(chosen: argparse.Namespace) -> None:
    from eclectus.storage.lineage.connection import connect
    from eclectus.storage.lineage.runs import find_runs

    home = _home()
    with connect(home) as connection:
        runs = find_runs(connection, [chosen.run_a, chosen.run_b])
    with connect(home, runs=runs) as connection:
        answer = connection.execute("from difference(?, ?)", runs)
        names, rows = [column[0] for column in answer.description], answer.fetchall()
    print_rows(names, rows, chosen.json)


def _why(chosen: argparse.Namespace) -> None:
    from eclectus.storage.lineage.connection import connect
    from eclectus.storage.lineage.runs import find_run

    with connect(_home()) as connection:
        run = find_run(connection, chosen.run)
        answer = connection.execute(
            "select label, state, reason, key, seconds from steps "
            "where run = ? and (label = ? or name = ? or step = ?) order by started",
            [run, chosen.step, chosen.step, chosen.step],
        )
        names, rows = [column[0] for column in answer.description], answer.fetchall()
        if not rows:
            labels = connection.execute("select label from steps where run = ? order by started", [run]).fetchall()
            known = ", ".join(label for (label,) in labels) or "none"
            raise EclectusError(f"run '{run}' has no step '{chosen.step}'; its steps are: {known}")
    print_rows(names, rows, chosen.json)


def _verify(chosen: argparse.Namespace) -> None:
    from eclectus.storage.lineage.compact import faults
    from eclectus.storage.lineage.connection import query

    home = _home()
    store = home.store
    artifacts = [store.find(name) for name in chosen.names] or list(store.all())
    found = [fault for artifact in artifacts if (fault := store.faults(artifact))]
    count = len(artifacts)
    if not chosen.names:
        found += store.strays()
        found += faults(home)
        here = {artifact.digest for artifact in artifacts}
        gone = [
            row[0] for row in query("select name, artifact from artifacts order by name", home)[1] if row[1] not in here
        ]
        if gone and not chosen.json:
            print(f"{len(gone)} artifacts of the lineage are not here (freed, or in another home)", file=sys.stderr)
    if chosen.json:
        for fault in found:
            print(json.dumps({"fault": fault}, ensure_ascii=False))
    else:
        print("\n".join(found) or f"{count} artifacts and the journals are as they were written")
    if found:
        raise EclectusError(f"{len(found)} faults; the next run makes damaged artifacts again")


def _bundle(chosen: argparse.Namespace) -> None:
    from pathlib import Path

    from eclectus.storage.lineage.bundle import bundle
    from eclectus.storage.lineage.connection import connect
    from eclectus.storage.lineage.runs import find_run

    home = _home()
    with connect(home) as connection:
        run = find_run(connection, chosen.run)
    out = bundle(home, run, Path(chosen.out or chosen.place or f"{run}.duckdb"))
    if chosen.json:
        print(json.dumps({"run": run, "bundle": str(out), "bytes": out.stat().st_size}))
    else:
        place = quoted(out)
        print(f"{place}: run {run}, {out.stat().st_size / 1e6:.1f} MB; open it with duckdb -readonly {place}")


def _openlineage(chosen: argparse.Namespace) -> None:
    from pathlib import Path

    from eclectus.storage.lineage.connection import connect
    from eclectus.storage.lineage.openlineage import export
    from eclectus.storage.lineage.runs import find_runs

    home = _home()
    with connect(home) as connection:
        runs = find_runs(connection, chosen.runs)
    count = export(home, runs, Path(chosen.out) if chosen.out else None, chosen.namespace)
    if chosen.json:
        print(json.dumps({"runs": runs, "events": count, "out": chosen.out}))
    else:
        print(f"{count} events of {', '.join(runs)} {f'written to {quoted(chosen.out)}' if chosen.out else 'sent'}")


def _keep(chosen: argparse.Namespace) -> None:
    from eclectus.storage.home import Home
    from eclectus.storage.lineage.connection import connect
    from eclectus.storage.lineage.garbage import keep
    from eclectus.storage.lineage.runs import find_run

    home = Home.existing(reading=False)
    with connect(home) as connection:
        run = find_run(connection, chosen.run)
    keep(home, run, not chosen.release)
    if chosen.json:
        print(json.dumps({"run": run, "kept": not chosen.release}))
    else:
        print(f"run {run} is {'no longer kept' if chosen.release else 'kept: gc leaves what it needs'}")


def _gc(chosen: argparse.Namespace) -> None:
    from eclectus.storage.home import Home
    from eclectus.storage.lineage.garbage import free, plan

    home = Home.existing(reading=not chosen.yes)
    planned = plan(home, chosen.runs)
    rows = [[each.what, each.name, each.bytes, each.why, str(each.place)] for each in planned.unneeded]
    if rows or chosen.json:
        print_rows(["what", "name", "bytes", "why", "place"], rows, chosen.json)
    total = sum(each.bytes for each in planned.unneeded)
    if chosen.yes:
        free(home, planned)
    if not chosen.json:
        unknown = f", and {planned.unknown} that the lineage does not know" if planned.unknown else ""
        print(f"kept: {planned.kept} artifacts of {len(planned.runs)} runs and of champions{unknown}")
        size = f"{total / 1e6:.1f} MB"
        do_it = command("gc", *(["--runs", str(chosen.runs)] if chosen.runs != LATEST else []), "--yes")
        print(f"freed: {size}" if chosen.yes else f"could be freed: {size}, with: {do_it}")


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"'{text}' is no count of runs; expected 0 or more")
    return int(text)


def _compact(chosen: argparse.Namespace) -> None:
    from eclectus.storage.home import Home
    from eclectus.storage.lineage.compact import compact_and_clean_up

    done = compact_and_clean_up(Home.existing(reading=False))
    for bad in done.rejected:
        print(f"journal {bad['file']}, line {bad['line']} quarantined: {bad['why']}", file=sys.stderr)
    row = {"journals": done.journals, "rows": done.rows, "merged": done.merged, "rejected": len(done.rejected)}
    print_rows(list(row), [list(row.values())], chosen.json)


def _print_query(chosen: argparse.Namespace, sql: str, values: list[Any]) -> None:
    """Prints the rows of a query."""
    from eclectus.storage.lineage.connection import connect

    with connect(_home()) as connection:
        answer = connection.execute(sql, values)
        names, rows = [column[0] for column in answer.description], answer.fetchall()
    print_rows(names, rows, chosen.json)


def _home() -> Home:
    from eclectus.storage.home import Home

    return Home.existing()
