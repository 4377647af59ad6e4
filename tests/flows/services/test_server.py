"""The note of a home's Prefect server names the process that runs, and only its owner takes it away."""

import json
import os
import sys
from dataclasses import asdict

import pytest

from eclectus.flows.services import server as services
from eclectus.flows.services.background import Background
from eclectus.flows.services.server import NOTE, _already_running, stop_server


@pytest.fixture
def started(tmp_path, monkeypatch):
    monkeypatch.setattr(services, "is_up", lambda address: True)
    made = []

    def start(name):
        program = [sys.executable, "-c", "import time; time.sleep(60)"]
        made.append(Background.start(name, program, dict(os.environ), tmp_path / f"{name}.log"))
        return made[-1]

    yield start
    for each in made:
        each.stop()


def note(folder, server, address="http://127.0.0.1:1/api"):
    (folder / NOTE).write_text(json.dumps({"address": address, "server": asdict(server)}))


def test_the_end_of_a_run_leaves_the_note_of_another_server(tmp_path, started):
    ours, theirs = started("ours"), started("theirs")
    note(tmp_path, theirs)
    stop_server(tmp_path, ours)
    assert _already_running(tmp_path) == "http://127.0.0.1:1/api"
    stop_server(tmp_path, theirs)
    assert not (tmp_path / NOTE).exists() and not theirs.is_alive()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"address": "x"}', '{"address": "x", "pid": 1}', "null"])
def test_a_damaged_note_or_one_of_before_names_no_server(tmp_path, text):
    (tmp_path / NOTE).write_text(text)
    assert _already_running(tmp_path) is None


def test_a_process_that_has_the_id_of_a_dead_server_is_not_it(tmp_path, started):
    server = started("ours")
    note(tmp_path, Background(server.name, server.pid, "another-boot 1", server.log))
    assert _already_running(tmp_path) is None
