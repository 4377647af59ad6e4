"""A bundle answers without the home as the home does, in the stable `duckdb` shell."""

import json
import subprocess
import sys
from pathlib import Path

import duckdb
import pytest

from eclectus.flows.cli.main import main
from eclectus.storage.errors import EclectusError
from eclectus.storage.journal import Journal
from eclectus.storage.lineage.bundle import TABLES, bundle
from eclectus.storage.lineage.connection import query, write_database
from tests.support.history import RUNS, write_history

OLD, NEW = RUNS
SHELL = Path(sys.executable).with_name("duckdb")


def in_the_shell(database, sql):
    asked = subprocess.run([SHELL, "-readonly", "-json", database, sql], capture_output=True, text=True)
    assert asked.returncode == 0, asked.stderr
    return json.loads(asked.stdout or "[]")


def test_every_table_of_a_run_is_real_and_has_the_rows_of_the_views(home, tmp_path):
    write_history(home)
    place = bundle(home, NEW, tmp_path / "run.duckdb")
    with duckdb.connect(str(place), read_only=True) as lineage:
        kinds = dict(lineage.execute("select table_name, table_type from information_schema.tables").fetchall())
        assert kinds == dict.fromkeys(TABLES, "BASE TABLE")
        for table in ("runs", "steps", "step_inputs", "step_outputs", "settings", "metrics"):
            whole = query(f"select * from {table} where run = '{NEW}'", home)[1]
            assert sorted(map(str, lineage.execute(f"from {table}").fetchall())) == sorted(map(str, whole)), table
            described = [row[:2] for row in lineage.execute(f"describe {table}").fetchall()]
            assert described == [row[:2] for row in query(f"describe {table}", home)[1]], table
        for table in ("artifacts", "documents", "routing", "decisions", "champions"):
            assert lineage.execute(f"select count(*) from {table}").fetchone()[0] > 0, table
        ((checkpoint,),) = lineage.execute("select artifact from artifacts where kind = 'checkpoint'").fetchall()
        for question in (f"from upstream('{checkpoint}')", f"from upstream('checkpoint-{checkpoint[:12]}')"):
            assert lineage.execute(question).fetchall() == query(question, home)[1]
        assert "learned from it" in {row[0] for row in lineage.execute("from trace('d1')").fetchall()}


def test_what_a_run_reused_comes_with_the_steps_that_made_it(home, tmp_path):
    write_history(home)
    ((kind, artifact),) = query(
        f"select kind, artifact from step_outputs where run = '{OLD}' and kind = 'instances'", home
    )[1]
    with Journal(home.journal, "reusing") as journal:
        journal.event("run_started", flow="main", parameters={}, packages={})
        about = {"step": "again", "name": "instances", "label": "pack", "flow": "main", "key": "k"}
        journal.event("step_started", **about)
        output = {"kind": kind, "artifact": artifact, "rows": 1, "bytes": 9, "created": "2026-01-01T00:00:00Z"}
        journal.event("step_ended", **about, state="reused", seconds=0.1, settings={}, inputs={}, output=output)
    with duckdb.connect(str(bundle(home, "reusing", tmp_path / "b.duckdb")), read_only=True) as lineage:
        runs = {run for (run,) in lineage.execute("select run from steps").fetchall()}
        assert runs == {"reusing", OLD}
        assert lineage.execute("select count(*) from artifacts anti join steps on made_by = step").fetchone() == (0,)


def test_the_stable_shell_opens_bundle_and_database(home, tmp_path):
    write_history(home)
    for database in (bundle(home, NEW, tmp_path / "run.duckdb"), write_database(home)):
        ((made),) = in_the_shell(
            database, "select name from artifacts where kind = 'checkpoint' order by created limit 1"
        )
        tables = ["runs", "steps", "artifacts", "metrics", "documents", "routing", "champions", "trace('d1')"]
        tables += [f"{macro}('{made['name']}')" for macro in ("upstream", "downstream")]
        tables.append(f"difference('{OLD}', '{NEW}')")
        # One process for all: starting the shell takes longer than its answers.
        counts = [f"select {n} as question, count(*) as rows from {table}" for n, table in enumerate(tables)]
        answers = in_the_shell(database, " union all ".join(counts))
        assert {row["question"] for row in answers if row["rows"]} == set(range(len(tables)))


def test_a_file_that_is_there_is_not_written_over(home, tmp_path, capsys):
    write_history(home)
    place = tmp_path / "run.duckdb"
    place.write_text("mine")
    with pytest.raises(EclectusError, match="is there already"):
        bundle(home, NEW, place)
    with pytest.raises(EclectusError, match="cannot be written"):
        bundle(home, NEW, tmp_path / "nowhere" / "run.duckdb")
    main(["--home", str(home.root), "bundle", "last", "-o", str(tmp_path / "b.duckdb"), "--json"])
    assert json.loads(capsys.readouterr().out)["run"] == NEW
    assert place.read_text() == "mine"
