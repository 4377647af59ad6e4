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
from eclectus.storage.lineage import bundle as bundle_module
from eclectus.storage.lineage.bundle import TABLES, bundle
from eclectus.storage.lineage.compact import compact
from eclectus.storage.lineage.connection import query, write_database
from tests.support.history import RUNS, digest, write_history

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


def write_run(home, run, steps):
    """steps: (step id, artifact number, numbers of its inputs, whether it was reused)."""
    with Journal(home.journal, run) as journal:
        journal.event("run_started", flow="main", parameters={}, packages={})
        for step, made, read, reused in steps:
            journal.metric(step, "loss", 1.0, 1, {})
            about = {"step": step, "name": "pack", "label": f"pack {made}", "flow": "main", "key": "k"}
            journal.event("step_started", **about)
            inputs = {f"in.{number}": f"instances-{digest(number)}" for number in read}
            output = {"kind": "instances", "artifact": digest(made), "rows": 1, "bytes": 9, "created": "2026-01-01"}
            state = "reused" if reused else "completed"
            journal.event("step_ended", **about, state=state, seconds=0.1, settings={}, inputs=inputs, output=output)
        journal.event("run_ended", state="completed", seconds=1.0)


@pytest.mark.parametrize("compacted", ["never", "at the end", "after each run"])
def test_a_bundle_has_the_makers_that_lineage_names_and_no_other_step(home, tmp_path, compacted):
    """Ids of steps sort against time, other runs reuse the same artifacts, and one was made twice."""
    runs = {
        "r1-maker": [("z1", 1, [], False), ("z2", 2, [1], False), ("z3", 3, [2], False)],
        "r2-again": [("y1", 1, [], True), ("y2", 2, [1], False), ("y9", 9, [2], False)],
        "r3-other": [("a1", 1, [], True), ("a2", 2, [1], True), ("a3", 3, [2], True), ("a4", 4, [3], False)],
        "r4-mine": [("m1", 1, [], True), ("m2", 2, [1], True), ("m3", 3, [2], True), ("m5", 5, [3], False)],
    }
    for run, steps in runs.items():
        write_run(home, run, steps)
        if compacted == "after each run" or (compacted == "at the end" and run == "r4-mine"):
            compact(home)
    with duckdb.connect(str(bundle(home, "r4-mine", tmp_path / "b.duckdb")), read_only=True) as lineage:

        def column(sql):
            return [value for (value,) in lineage.execute(sql).fetchall()]

        assert sorted(column("select step from steps")) == ["m1", "m2", "m3", "m5", "z1", "z2", "z3"]
        assert sorted(column("select step from metrics")) == sorted(column("select step from steps"))
        makers = {"m5", "z1", "z2", "z3"}
        assert set(column("select made_by from artifacts where made_by is not null")) == makers
        assert set(column("select made_by from nodes where made_by is not null")) <= set(
            column("select step from steps")
        )
        question = f"select * exclude (made) from upstream('{digest(5)}') order by all"
        assert lineage.execute(question).fetchall() == query(question, home)[1]
        assert set(column(f"select made_by from upstream('{digest(5)}')")) == makers


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


def test_a_file_that_appears_meanwhile_is_not_written_over(home, tmp_path, monkeypatch):
    write_history(home)
    place, macros = tmp_path / "run.duckdb", bundle_module.macros

    def appear(**arguments):
        place.write_text("theirs")
        return macros(**arguments)

    monkeypatch.setattr(bundle_module, "macros", appear)
    with pytest.raises(EclectusError, match="by another process meanwhile"):
        bundle(home, NEW, place)
    assert place.read_text() == "theirs"
