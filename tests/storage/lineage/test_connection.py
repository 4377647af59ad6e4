import json
import os
import signal
import subprocess
import sys

import duckdb
import pytest

from eclectus.storage.errors import EclectusError
from eclectus.storage.journal import Journal
from eclectus.storage.lineage.compact import compact
from eclectus.storage.lineage.connection import connect, query, read_once, write_database

FROZEN = {
    "runs": "run flow state started ended seconds parameters code_version host python packages prefect_flow_run error "
    "kept",
    "steps": "step run name label flow key version state reason started ended seconds peak_memory cpu_seconds seed "
    "prefect_task_run",
    "artifacts": "name artifact kind rows bytes created path statistics made_by",
    "step_inputs": "step run name artifact kind",
    "step_outputs": "step run name artifact kind reused",
    "settings": "step run name value",
    "metrics": "logged run step name value at_step tags",
    "forecasts": "step run label made steps actual_steps seconds actual_seconds seconds_error memory actual_memory "
    "memory_error forecast actual",
    "decisions": "logged run line verdict checkpoint reason evaluations gate rules by",
    "champions": "line checkpoint since reason by run",
    "tags": "tag name kind artifact since by reason",
    "adoptions": "label step_name key name kind artifact since by reason",
    "first_losses": "step run checkpoint document name language domain source instance instance_offset tokens "
    "document_before loss",
    "routing": "layer expert language domain share top_k_share routed evaluation",
    "documents": "document name language domain source instance instance_offset tokens document_offset instances",
}


def write_step(journal, step, state="completed", artifact="ab" * 32):
    journal.event("step_started", step=step, name="group", label="group", flow="main", key="k")
    journal.metric(step, "loss", 2.5, 10, {"language": "el"})
    journal.event(
        "step_ended", step=step, name="group", label="group", flow="main", key="k", version=1, state=state,
        reason="first time", seconds=0.5, peak_memory=1000, seed=3, settings={"k": 20, "names": ["a", "b"]},
        inputs={"documents": "documents-cd"},
        output={"kind": "grouping", "artifact": artifact, "rows": 5, "bytes": 9, "created": "2026-11-22T05:10:13Z",
                "path": "somewhere", "statistics": {"restarts": 0.1}},
    )  # fmt: skip


@pytest.mark.parametrize("table", FROZEN)
def test_no_column_that_users_query_is_removed(read_home, table):
    with connect(read_home) as connection:
        assert connection.sql(f"from {table}").columns == FROZEN[table].split()


def test_a_step_is_readable_while_its_run_goes_on(home):
    with Journal(home.journal, "r1") as journal:
        journal.event("run_started", flow="main", parameters={"k": 20}, packages={"torch": "2"})
        write_step(journal, "s1")
        assert query("select run, state from runs", home)[1] == [("r1", "unfinished")]
        assert query("select label, state, reason, seed from steps", home)[1] == [
            ("group", "completed", "first time", 3)
        ]
        assert query("select name, kind, rows, made_by from artifacts", home)[1] == [
            ("grouping-abababababab", "grouping", 5, "s1")
        ]
        assert query("select kind, artifact from step_inputs", home)[1] == [("documents", "cd")]
        assert dict(query("select name, value from settings", home)[1]) == {"k": "20", "names": '["a","b"]'}
        assert query("select value, at_step, tags['language'] from metrics", home)[1] == [(2.5, 10, "el")]
        journal.event("run_ended", state="completed", seconds=1.0)
        assert query("select state, seconds from runs", home)[1] == [("completed", 1.0)]


def test_a_forecast_is_read_before_and_beside_what_came_true(home):
    with Journal(home.journal, "r1") as journal:
        journal.event("forecast", step="s1", label="train", forecast={"seconds": 12.0, "steps": 6, "memory": 900})
        sql = "select label, seconds, actual_seconds, seconds_error, memory, memory_error from forecasts"
        assert query(sql, home)[1] == [("train", 12.0, None, None, 900, None)]
        # Resumed in the middle: seconds are compared by step.
        journal.event("came_true", step="s1", label="train", forecast={"seconds": 4.0, "steps": 4, "memory": 1000})
        assert query(sql, home)[1] == [("train", 12.0, 4.0, 1.0, 900, -0.1)]
    compact(home)
    assert query(sql, home)[1] == [("train", 12.0, 4.0, 1.0, 900, -0.1)]


def test_a_number_that_is_not_finite_becomes_null_with_its_name(home):
    with Journal(home.journal, "r1") as journal:
        journal.metric("s1", "loss", float("nan"))
    assert query("select value, tags['value'] from metrics", home)[1] == [(None, "nan")]


def test_a_half_written_last_line_hides_nothing_else(home):
    with Journal(home.journal, "r1") as journal:
        write_step(journal, "s1")
    path = next(home.journal.glob("events/r1*.ndjson"))
    with open(path, "a") as handle:
        handle.write('{"event": "step_started", "st')
    assert query("select step from steps", home)[1] == [("s1",)]


def test_a_killed_process_loses_at_most_the_line_being_written(home):
    program = (
        "import sys; from pathlib import Path; from eclectus.storage.journal import Journal\n"
        "journal = Journal(Path(sys.argv[1]), 'killed')\n"
        "for number in range(10**6):\n"
        "    journal.event('step_started', step=str(number), name='n', label='l'); print(number, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(home.journal)], stdout=subprocess.PIPE, text=True)
    said = [process.stdout.readline() for _ in range(50)]
    os.kill(process.pid, signal.SIGKILL)
    said += process.stdout.readlines()
    process.wait()
    (count,) = query("select count(*) from steps", home)[1][0:1][0]
    assert count >= len(said)


def test_queries_can_neither_write_nor_leave_the_home(home, tmp_path):
    (tmp_path / "secret.csv").write_text("a\n1\n")
    for sql in (f"from '{tmp_path}/secret.csv'", f"copy (select 1) to '{tmp_path}/out.csv'", "from nowhere", "selec 1"):
        with pytest.raises(EclectusError, match="the query failed"):
            query(sql, home)
    assert not (tmp_path / "out.csv").exists()


def test_the_database_file_answers_like_the_connection_and_locks_nobody(home):
    with Journal(home.journal, "r1") as journal:
        write_step(journal, "s1")
    path = write_database(home)
    with duckdb.connect(str(path)) as held:
        assert held.sql("select step from steps").fetchall() == [("s1",)]
        with Journal(home.journal, "r2") as journal:
            write_step(journal, "s2")
        write_database(home)
        assert len(query("from steps", home)[1]) == 2
        assert len(held.sql("from steps").fetchall()) == 2


def test_every_journal_line_is_json(home):
    with Journal(home.journal, "r1") as journal:
        write_step(journal, "s1")
    for path in home.journal.glob("*/*.ndjson"):
        assert all(json.loads(line) for line in path.read_text().splitlines())


def test_hundreds_of_journals_are_read_as_one(home):
    for number in range(300):
        with Journal(home.journal, f"r{number}") as journal:
            write_step(journal, f"s{number}")
    assert query("select count(*) from steps where state = 'completed'", home)[1] == [(300,)]


def test_a_connection_for_some_runs_reads_their_journals_and_what_is_compacted(home):
    for number in range(4):
        with Journal(home.journal, f"r{number}") as journal:
            write_step(journal, f"s{number}")
        if number == 0:
            compact(home, sys.maxsize)
    with connect(home, runs=["r2"]) as connection:
        read_once(connection)
        assert connection.execute("select step from steps order by step").fetchall() == [("s0",), ("s2",)]
        assert connection.execute("select distinct step from step_inputs order by step").fetchall() == [
            ("s0",),
            ("s2",),
        ]
        assert connection.execute("select step from metrics order by step").fetchall() == [("s0",), ("s2",)]


def test_what_is_read_once_answers_as_what_is_read_each_time(home):
    for number in range(3):
        with Journal(home.journal, f"r{number}") as journal:
            write_step(journal, f"s{number}", artifact=f"{number}a" * 32)
    asked = ["from artifacts order by name", "from step_inputs order by step", "from edges order by all"]
    asked += ["from nodes order by all", "from upstream('0a')", "from downstream('0a')", "from steps order by step"]
    with connect(home) as connection:
        before = [connection.execute(sql).fetchall() for sql in asked]
        read_once(connection)
        assert [connection.execute(sql).fetchall() for sql in asked] == before
    assert all(before)


def test_a_journal_that_becomes_a_link_while_it_is_read_is_not_followed(home, tmp_path):
    with Journal(home.journal, "r1") as journal:
        write_step(journal, "s1")
    (path,) = (home.journal / "events").glob("r1.*")
    with connect(home) as connection:
        assert connection.execute("select count(*) from steps").fetchall() == [(1,)]
        (tmp_path / "secret").write_bytes(path.read_bytes().replace(b"s1", b"s2"))
        path.unlink()
        path.symlink_to(tmp_path / "secret")
        with pytest.raises(duckdb.Error):
            print(connection.execute("select step from steps").fetchall())
