"""The lineage under real load: several writers, readers in shells, kill -9, damage, and a read-only home."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import duckdb
import pytest

from eclectus.storage.errors import EclectusError
from eclectus.storage.journal import Journal
from eclectus.storage.lineage import compact as compaction
from eclectus.storage.lineage import connection as lineage
from eclectus.storage.lineage.compact import bad_lines, compact, faults
from eclectus.storage.lineage.connection import connect, query, walk, write_database
from eclectus.storage.secrets import scrub
from tests.support.history import RUNS, digest, everything, write_chain, write_history, write_step

ROWS = 3_000
WRITER = """
import sys
from pathlib import Path
from eclectus.storage.journal import Journal
root, run, rows = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
with Journal(root, run) as journal:
    journal.event("run_started", flow="main", parameters={"k": 1}, packages={})
    for number in range(rows):
        journal.metric("step", "loss", number, number, {"text": "x" * (number % 50)})
    journal.event("run_ended", state="completed", seconds=1.0)
"""


def test_four_writers_and_two_readers_lose_nothing_and_tear_nothing(home):
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(home.journal), f"r{n}", str(ROWS)]) for n in range(4)
    ]
    shell = duckdb.connect(str(write_database(home)))
    seen = 0
    with connect(home) as python:
        while any(writer.poll() is None for writer in writers):
            for reader in (python, shell):
                counted, whole = reader.execute(
                    "select count(*), count(*) filter (value = at_step and len(tags['text']) = at_step % 50) "
                    "from metrics"
                ).fetchone()
                assert counted == whole
                assert counted >= seen or reader is shell
                seen = max(seen, counted)
            compact(home)
        shell.close()
    assert [writer.returncode for writer in writers] == [0] * 4
    expected = [(f"r{n}", ROWS, ROWS * (ROWS - 1) / 2) for n in range(4)]
    sums = "select run, count(*), sum(value) from metrics group by run order by run"
    assert query(sums, home)[1] == expected
    compact(home)
    assert query(sums, home)[1] == expected
    assert query("select count(*) from runs where state = 'completed'", home)[1] == [(4,)]


def test_a_killed_writer_keeps_what_it_said_and_is_known_as_dead(home):
    program = WRITER.replace("journal.metric(", "print(number, flush=True); journal.metric(")
    words = [sys.executable, "-c", program, str(home.journal), "r1", "1000000"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    for _ in range(200):
        process.stdout.readline()
    assert compact(home).journals == 0, "the writer is alive"
    assert query("select run, state from runs", home)[1] == [("r1", "unfinished")]
    os.kill(process.pid, signal.SIGKILL)
    said = 200 + len(process.stdout.readlines())
    process.wait()
    for _ in range(2):
        ((count, last),) = query("select count(*), max(at_step) from metrics", home)[1]
        assert count >= said - 1 and last == count - 1
        assert query("select run, state, ended > started from runs", home)[1] == [("r1", "crashed", True)]
        compact(home)


def test_compaction_changes_no_answer_at_any_stage(home, monkeypatch):
    monkeypatch.setattr(compaction, "MANY", 3)
    for number in range(4):
        write_chain(home, f"r{number}", range(number * 3, number * 3 + 3))
    with Journal(home.journal, "dead") as journal:
        journal.event("run_started", flow="main", parameters={}, packages={})
        journal.event("step_started", step="lost", name="work", label="lost", flow="main", key="k")
    before = everything(home)
    with connect(home) as opened_before:
        for number in range(4):
            assert compact(home, 1).journals == 2, "events and metrics of one journal"
            assert everything(home) == before, number
        monkeypatch.setattr(compaction, "GRACE", -1.0)
        for _ in range(3):
            compact(home)
            assert everything(home) == before
        assert opened_before.execute("select count(*) from steps").fetchone() == (13,)
    assert {path.stem for path in home.journal.glob("*/*.ndjson")} == {"none"}
    assert any(path.name.startswith("2-") for path in home.journal.glob("events/*.parquet"))
    assert faults(home) == []


# Forks a compaction per line of input, since importing takes longer; kills it at the given call that changes the disk.
KILLED = """
import os, signal, sys
from eclectus.storage.lineage import compact
from eclectus.storage.home import Home
home = Home.open(sys.argv[1])
for line in sys.stdin:
    left = int(line)
    def counting(real):
        def act(*paths, **options):
            global left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*paths, **options)
        return act
    if not (child := os.fork()):
        os.rename, os.replace, os.fsync = map(counting, (os.rename, os.replace, os.fsync))
        compact.compact(home)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_a_compaction_that_is_killed_at_any_moment_changes_no_answer(home, monkeypatch):
    write_chain(home, "r1", range(3))
    before = everything(home)
    words, pipes = [sys.executable, "-c", KILLED, str(home.root)], {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(words, **pipes, text=True) as server:
        for moment in range(100):
            print(moment, file=server.stdin, flush=True)
            code = int(server.stdout.readline())
            assert everything(home) == before, moment
            if code == 0:
                break
            assert code == -signal.SIGKILL
        server.stdin.close()
    assert moment > 3
    monkeypatch.setattr(compaction, "GRACE", -1.0)
    compact(home)
    assert everything(home) == before and faults(home) == []
    assert [path for path in home.journal.glob("*/.*") if path.parent.name != "views"] == []


def test_no_reader_lists_a_journal_that_goes_before_it_can_open_it(home, monkeypatch):
    write_chain(home, "r1", range(3))
    before = everything(home)
    compact(home)
    (journal,) = home.journal.glob("events/r1*.ndjson")
    monkeypatch.setattr(lineage, "GRACE", 0.0)
    # As a reader finds it that listed it and was slow.
    journal.unlink()
    journal.symlink_to("gone")
    assert everything(home) == before
    monkeypatch.setattr(compaction, "GRACE", -1.0)
    compact(home)
    assert not journal.is_symlink() and list((home.journal / "replaced").iterdir()) == []


def test_upstream_and_downstream_cross_live_and_compacted_journals(home):
    write_chain(home, "r1", range(0, 3))
    compact(home)
    write_chain(home, "r2", range(3, 6), start=f"documents-{digest(2)}")
    names = [row[0] for row in query(f"select artifact from upstream('{digest(5)}')", home)[1]]
    assert set(names) == {"ab" * 32, *(digest(number) for number in range(6))}
    rows = walk(f"documents-{digest(2)}", home)
    assert [(row["direction"], row["steps_away"]) for row in rows] == [
        ("this", 0), ("up", 1), ("up", 2), ("up", 3), ("down", 1), ("down", 2), ("down", 3)
    ]  # fmt: skip
    assert len(query(f"from downstream('file-{'ab' * 32}')", home)[1]) == 7
    assert walk("documents-ffff", home) == [] and walk("nonsense", home) == []


def test_difference_names_settings_inputs_and_metrics(home):
    write_chain(home, "r1", [1])
    with Journal(home.journal, "r2") as journal:
        journal.event("run_started", flow="main", parameters={}, code_version="def", packages={"torch": "3"})
        write_step(journal, "s9", digest(1), ["documents-aa"], k=2)
    rows = {(what, name): (a, b) for what, _, name, a, b in query("from difference('r1', 'r2')", home)[1]}
    assert rows["run", "code"] == ("abc", "def") and rows["package", "torch"] == ("2", "3")
    assert rows["run", "state"] == ("completed", "crashed")
    assert ("run", "python") not in rows, "null in both"
    assert query("from difference('r1', 'r1')", home)[1] == []


def test_a_damaged_line_is_quarantined_and_reported_and_hides_nothing_else(home):
    write_chain(home, "r1", range(3))
    path = next(path for path in home.journal.glob("events/*.ndjson") if path.stem != "none")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], "\0garbage\n", '{"event": 3}\n', *lines[1:]]))
    assert [bad["line"] for bad in bad_lines(path, "events")] == [2, 3]
    assert len(faults(home)) == 2
    before = everything(home)
    done = compact(home)
    assert [bad["line"] for bad in done.rejected] == [2, 3]
    kept = json.loads((home.journal / "rejected" / path.name).read_text().splitlines()[0])
    assert kept["text"] == "\0garbage" and "JSON" in kept["why"]
    assert everything(home) == before and len(before["steps"]) == 3
    assert any("quarantined" in fault for fault in faults(home))


def test_a_step_whose_start_was_lost_is_still_a_step(home):
    with Journal(home.journal, "r1") as journal:
        journal.event("step_ended", step="s", name="n", label="l", state="failed", reason="bad input", seconds=2.0)
    ((state, seconds),) = query("select state, epoch(ended - started) from steps", home)[1]
    assert (state, seconds) == ("failed", 2.0)


REFUSED = [
    "copy (select 1) to '{home}/journal/events/x.ndjson'",
    "copy (select 1) to 'books://{home}/journal/events/x.ndjson'",
    "export database '{home}/journal/out'",
    "export database 'books://{home}/journal/out'",
    "attach '{home}/journal/x.duckdb' as x (read_write)",
    "attach 'books://{home}/journal/x.duckdb' as x (read_write)",
    "from read_text('/etc/hostname')",
    "from read_csv('/etc/hostname')",
    "from glob('/etc/*')",
    "from read_text('books:///etc/hostname')",
    "from read_text('books://{home}/journal/../layout')",
    "from read_text('books://{home}/keys/secret')",
    "from read_text('books://./keys/secret')",
    "from read_text('books://./journal/../layout')",
    "from read_text('books://./journal/link')",
    "from read_text('books://{home}/journal/link')",
    "install httpfs",
    "load httpfs",
    "create table t as select 1",
    "create view t as select 1",
    "insert into runs values (1)",
    "delete from runs",
    "set enable_external_access = true",
    "set disabled_filesystems = ''",
    "from nowhere",
    "selec 1",
]


@pytest.mark.parametrize("sql", REFUSED)
def test_sql_of_users_is_read_only_and_stays_in_the_lineage(read_home, sql):
    home = read_home
    if not (home.keys / "secret").exists():
        (home.keys / "secret").write_text("s")
        (home.journal / "link").symlink_to("/etc/hostname")
    query("from runs", home)
    before = sorted(home.root.rglob("*"))
    with pytest.raises(EclectusError, match="the query failed"):
        query(sql.format(home=home.root), home)
    assert sorted(home.root.rglob("*")) == before


def test_temporary_tables_are_allowed(home):
    with connect(home) as connection:
        connection.execute("create temp table mine as from runs")
        assert connection.execute("select count(*) from mine").fetchone() == (0,)


def test_a_shell_may_hold_the_database_while_runs_come_and_go(home):
    with duckdb.connect(str(write_database(home))) as shell:
        for number in range(3):
            write_chain(home, f"r{number}", [number])
            write_database(home)
            compact(home)
            assert shell.execute("select count(*) from steps").fetchone() == (number + 1,)


def test_the_database_is_in_a_format_that_shells_of_version_1_open(home):
    header = write_database(home).read_bytes()[:100]
    assert header[8:12] == b"DUCK" and int.from_bytes(header[12:20], "little") <= 64


def test_a_line_that_a_full_disk_cut_short_is_taken_back(home):
    program = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from eclectus.storage.errors import EclectusError\n"
        "from eclectus.storage.journal import Journal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "journal = Journal(Path(sys.argv[1]), 'r1')\n"
        "hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))\n"
        "try:\n"
        "    for number in range(100): journal.metric('s', 'loss', number)\n"
        "except EclectusError as error: print(error)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))\n"
        "journal.metric('s', 'loss', 1000)\n"
        "journal.close()\n"
    )
    words = [sys.executable, "-c", program, str(home.journal)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "cannot be written" in done.stdout and "free space" in done.stdout
    values = [value for (value,) in query("select value from metrics order by value", home)[1]]
    assert values == [*map(float, range(len(values) - 1)), 1000.0] and len(values) > 5
    assert faults(home) == []


def test_a_planted_secret_never_reaches_the_journal(home, monkeypatch):
    monkeypatch.setenv("MY_API_TOKEN", 'pl"anted-secret')
    monkeypatch.setenv("GIT_AUTHOR_NAME", "somebody")
    # Held open: an end of this run would replace its error.
    with Journal(home.journal, "r1") as journal:
        journal.event(
            "run_started", flow="main", packages={}, error='pl"anted-secret',
            parameters={"sources": ["s3://me:hunter2@host/x", "https://h/x?token=abcdef&a=1"], "author": "somebody"},
        )  # fmt: skip
        journal.metric("s", "loss", 1.0, 1, {"note": 'pl"anted-secret'})
        text = "".join(path.read_text() for path in home.journal.glob("*/*.ndjson"))
        assert not re.search("anted-secret|hunter2|abcdef", text)
        ((parameters, error),) = query("select parameters, error from runs", home)[1]
        assert json.loads(parameters)["sources"] == ["s3://me:***@host/x", "https://h/x?token=***&a=1"]
        assert json.loads(parameters)["author"] == "somebody" and error == "***"
    assert scrub('about pl"anted-secret here') == "about *** here"


def test_a_read_only_home_is_still_read(home):
    write_chain(home, "r1", [1])
    before = everything(home)
    program = (
        "import os, sys\n"
        "from eclectus.storage.home import Home\n"
        "from eclectus.storage.lineage.connection import query\n"
        # Once as we are: what is imported late may lie where the other user cannot read.
        "query('select run from runs', Home.open(sys.argv[1], reading=True))\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "print(query('select run from runs', Home.open(sys.argv[1], reading=True))[1])\n"
        "try: Home.open(sys.argv[1])\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    if os.getuid() != 0:
        program = program.replace("os.setgid(65534); os.setuid(65534)\n", "")
    shutil.rmtree(home.journal / "views", ignore_errors=True)
    folders = [home.root, *(path for path in home.root.rglob("*") if path.is_dir())]
    parents = [parent for parent in home.root.parents if str(parent).startswith("/tmp/")]
    for folder in folders:
        folder.chmod(0o555)
    for parent in parents:
        parent.chmod(parent.stat().st_mode | 0o055)
    try:
        done = subprocess.run([sys.executable, "-c", program, str(home.root)], capture_output=True, text=True)
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert "[('r1',)]" in done.stdout, done.stderr
    assert "EclectusError home" in done.stdout and "cannot be written" in done.stdout
    assert everything(home) == before


def test_a_clock_that_jumps_back_breaks_no_table(home, monkeypatch):
    with Journal(home.journal, "r1") as journal:
        journal.event("run_started", flow="main", parameters={}, packages={})
        monkeypatch.setattr("eclectus.storage.journal.now", lambda: "1999-01-01 00:00:00.000000")
        write_step(journal, "s1", digest(1))
        journal.event("run_ended", state="completed", seconds=3.0)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    for _ in range(2):
        assert query("select state, seconds from runs", home)[1] == [("completed", 3.0)]
        assert query("select made_by from artifacts", home)[1] == [("s1",)]
        compact(home)


@pytest.mark.parametrize("name", ["n[1]", "[", "**", "a*", "what? {a,b}", "it's 100% a#b ü\nc"])
def test_a_home_is_a_folder_whatever_its_name_looks_like(tmp_path, name):
    from eclectus.storage.home import Home
    from eclectus.storage.lineage.bundle import bundle
    from eclectus.storage.lineage.garbage import free, plan

    (tmp_path / "n1").mkdir()
    home = Home.open(tmp_path / name)
    write_history(home)
    database = write_database(home)
    runs = [(run,) for run in RUNS]
    for _ in range(2):
        assert query("select run from runs order by run", home)[1] == runs
        assert query("select count(*) from documents", home)[1] == [(2,)]
        with duckdb.connect(database, read_only=True) as shell:
            assert shell.execute("select run from runs order by run").fetchall() == runs
        assert compact(home).rejected == []
    assert faults(home) == []
    free(home, plan(home, 1))
    out = bundle(home, runs[1][0], tmp_path / "[bundle]*.duckdb")
    with duckdb.connect(out, read_only=True) as bundled:
        assert bundled.execute("select run from runs").fetchall() == runs[1:]
    assert query("select count(*) from documents", home)[1] == [(2,)]


def test_a_home_with_a_backslash_is_refused_before_anything_is_written(tmp_path):
    from eclectus.storage.home import Home

    with pytest.raises(EclectusError, match="backslash"):
        Home.open(tmp_path / "back\\slash")
    assert not list(tmp_path.iterdir())
