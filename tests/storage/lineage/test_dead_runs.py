"""A run whose process was killed gets an end; one that lives, or that another machine wrote, does not."""

import os
import signal
import subprocess
import sys

import pytest

from eclectus.storage.lineage.compact import compact, faults
from eclectus.storage.lineage.connection import query
from eclectus.storage.lineage.dead_runs import end_dead_runs

PROGRAM = """
import sys, time
from pathlib import Path
from eclectus.storage.journal import Journal
journal = Journal(Path(sys.argv[1]), "r1")
journal.event("run_started", flow="main", parameters={}, packages={})
about = dict(name="embed", flow="main", key="k")
journal.event("step_started", step="s1", label="one", **about)
journal.event("step_ended", step="s1", label="one", state="completed", seconds=0.1, settings={}, inputs={}, **about)
journal.event("step_started", step="s2", label="two", **about)
print("working", flush=True)
time.sleep(60)
"""
STATES = "select label, state from steps order by label"


@pytest.fixture
def worker(home):
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(home.journal)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "working\n"
    yield process
    process.kill()
    process.wait()


def kill(process):
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def journal_of(home):
    (path,) = home.journal.glob("events/r1.*.ndjson")
    return path


def test_sql_tells_a_running_run_from_a_dead_one(home, worker):
    assert query("select state, error from runs", home)[1] == [("unfinished", None)]
    assert query(STATES, home)[1] == [("one", "completed"), ("two", "unfinished")]
    kill(worker)
    ((state, seconds, error),) = query("select state, seconds, error from runs", home)[1]
    assert state == "crashed" and 0 <= seconds < 60 and "killed" in error
    assert query(STATES, home)[1] == [("one", "completed"), ("two", "crashed")]
    said = journal_of(home).read_bytes()
    for _ in range(2):
        assert query(STATES, home)[1] == [("one", "completed"), ("two", "crashed")]
        assert query("select state from runs", home)[1] == [("crashed",)]
        compact(home)
    assert journal_of(home).read_bytes() == said, "it is ended once"
    assert faults(home) == []


@pytest.mark.parametrize("begun", [b'{"event": "step_ended", "st', b'{"event": "run_ended", "st'])
def test_a_line_that_the_kill_cut_short_gives_way_to_the_end(home, worker, begun):
    kill(worker)
    with open(journal_of(home), "ab") as handle:
        handle.write(begun)
    assert end_dead_runs(home) == ["r1"] and end_dead_runs(home) == []
    assert query("select state from runs", home)[1] == [("crashed",)]
    assert query(STATES, home)[1] == [("one", "completed"), ("two", "crashed")]
    assert faults(home) == []


def test_ends_that_a_full_disk_cuts_short_are_written_by_a_later_command(home, worker, monkeypatch):
    kill(worker)
    said = journal_of(home).read_bytes()
    with monkeypatch.context() as full:
        full.setattr(os, "pwrite", lambda handle, text, at: os.pwritev(handle, [text[:-30]], at))
        assert end_dead_runs(home) == []
    assert journal_of(home).read_bytes() == said
    assert end_dead_runs(home) == ["r1"] and faults(home) == []


def test_the_journal_of_another_machine_is_left_alone(home, worker):
    kill(worker)
    path = journal_of(home)
    path.rename(path.with_name("r1.elsewhere-1-abcd.ndjson"))
    assert query("select state from runs", home)[1] == [("unfinished",)]


def test_a_home_that_cannot_be_written_is_read_all_the_same(home, worker, monkeypatch):
    kill(worker)
    real = open

    def read_only(path, mode="r", *more, **options):
        if "+" in mode and str(path).startswith(str(home.journal)):
            raise PermissionError(13, "Permission denied")
        return real(path, mode, *more, **options)

    monkeypatch.setattr("builtins.open", read_only)
    assert query("select state from runs", home)[1] == [("unfinished",)]


def test_what_was_compacted_before_its_end_was_known_is_dead(home, worker, monkeypatch):
    """As earlier versions compacted it."""
    kill(worker)
    with monkeypatch.context() as without:
        without.setattr("eclectus.storage.lineage.compact.end_dead_runs", lambda home: [])
        compact(home)
    journal_of(home).unlink()
    assert query("select state from runs", home)[1] == [("crashed",)]
    assert query(STATES, home)[1] == [("one", "completed"), ("two", "crashed")]
