"""Which process answers for a flow run, and which processes are a run's."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

import psutil
import pytest

from eclectus.flows.services.background import start_of
from eclectus.flows.services.flow_runs.notes import (
    FLOW_RUN,
    TOKEN,
    Note,
    note_stop,
    processes,
    read_note,
    read_notes,
    remove_note,
    replace_note,
    signal_run,
    write_note,
)
from tests.support.processes import until

# A run's process: leader of a session, with a child that has the same environment.
RUN = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(1, flush=True)
time.sleep(60)
"""


@pytest.fixture
def started(request):
    children = []

    def start(token, flow_run):
        environment = os.environ | {TOKEN: token, FLOW_RUN: flow_run}
        child = subprocess.Popen(
            [sys.executable, "-c", RUN], env=environment, start_new_session=True, stdout=subprocess.PIPE
        )
        children.append(child)
        child.stdout.readline()
        return child

    yield start
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()


def test_a_note_names_the_process_that_answers_and_is_replaced_by_the_next(tmp_path):
    note = write_note(tmp_path, "a")
    assert note.owner_lives() and read_notes(tmp_path) == {"a": note}
    dead = Note("a", note.owner, "another-boot 1")
    assert not dead.owner_lives()
    remove_note(tmp_path, dead)
    assert read_note(tmp_path, "a") == note, "the run was taken again meanwhile"
    note_stop(tmp_path, note, "stopped by `eclectus down`")
    stopped = read_note(tmp_path, "a")
    assert stopped.stop.startswith("stopped by `eclectus down` at 20") and stopped.owner == note.owner
    note_stop(tmp_path, stopped, "another reason")
    assert read_note(tmp_path, "a") == stopped, "the first reason is the true one"
    replace_note(tmp_path, dead)
    remove_note(tmp_path, dead)
    assert read_notes(tmp_path) == {}


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"flow_run": "x"}', '{"x": 1}'])
def test_a_damaged_note_is_removed(tmp_path, text):
    write_note(tmp_path, "good")
    (tmp_path / "flow-runs" / "bad.json").write_text(text)
    assert [*read_notes(tmp_path)] == ["good"] and not (tmp_path / "flow-runs" / "bad.json").exists()


def test_processes_of_a_run_are_those_that_lead_its_session_and_carry_this_token(started):
    ours, other = started("token-1", "run-1"), started("token-2", "run-1")
    assert processes("token-1") == {"run-1": (ours.pid, start_of(ours.pid))}
    assert processes("token-2") == {"run-1": (other.pid, start_of(other.pid))}
    assert processes("") == {} == processes("token-3")
    signal_run((ours.pid, "another-boot 1"))
    assert processes("token-1"), "another process that had this id is not it"
    children = psutil.Process(ours.pid).children()
    signal_run((ours.pid, start_of(ours.pid)))
    gone, _ = psutil.wait_procs([psutil.Process(ours.pid), *children], 10)
    assert len(gone) == 2 and processes("token-1") == {}


def test_children_that_outlive_the_run_are_not_the_run(started):
    ours = started("token-1", "run-1")
    ours.kill()
    ours.wait()
    until(lambda: processes("token-1") == {}, 5)
