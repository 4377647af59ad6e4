"""`runs.error` says who stopped a run, and when."""

from __future__ import annotations

import json
import re
import signal
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from prefect.exceptions import TerminationSignal

from eclectus.flows.services.flow_runs import stops
from eclectus.flows.services.flow_runs.notes import note_stop, read_note, write_note
from eclectus.flows.services.flow_runs.stops import watched_flow_run, why_ended
from eclectus.storage.errors import EclectusError
from tests.support.processes import until

TIME = r"at \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC"


@pytest.fixture
def prefect(monkeypatch):
    """An API that knows one flow run, whose state the test chooses; None: it was deleted."""
    chosen = {"state": {"type": "RUNNING", "timestamp": "2026-11-29T03:04:05.678Z"}, "answers": 0}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(404 if chosen["state"] is None else 200)
            self.end_headers()
            self.wfile.write(json.dumps({"id": "x", "state": chosen["state"]}).encode())
            chosen["answers"] += 1

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{server.server_port}/api")
    yield chosen
    server.shutdown()
    server.server_close()


def test_no_error_and_a_failure_are_as_before(tmp_path):
    assert why_ended(None, None, tmp_path) is None
    assert why_ended(EclectusError("no such file"), "x", tmp_path) == "EclectusError: no such file"


@pytest.mark.parametrize(
    "error, said",
    [
        (KeyboardInterrupt(), r"interrupted \(Ctrl-C\) "),
        (TerminationSignal(signal.SIGTERM), "terminated by SIGTERM "),
        (SystemExit(3), "exited with 3 "),
        (GeneratorExit(), "ended by GeneratorExit "),
    ],
)
def test_what_is_no_failure_says_how_it_came_and_when(tmp_path, error, said, prefect):
    assert re.fullmatch(said + TIME, why_ended(error, "x", tmp_path))


def test_a_signal_says_who_sent_it_when_that_is_known(tmp_path, prefect):
    stop = TerminationSignal(signal.SIGTERM)
    prefect["state"] = {"type": "CANCELLING", "timestamp": "2026-11-29T03:04:05.678Z"}
    assert why_ended(stop, "x", tmp_path) == "cancelled in the Prefect UI at 2026-11-29 03:04:05 UTC"
    prefect["state"] = None
    assert re.fullmatch("deleted in the Prefect UI " + TIME, why_ended(stop, "x", tmp_path))
    note_stop(tmp_path, write_note(tmp_path, "x"), "stopped by `eclectus down`")
    assert re.fullmatch("stopped by `eclectus down` " + TIME, why_ended(stop, "x", tmp_path))


def test_a_server_that_is_gone_does_not_hold_the_end_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    assert re.fullmatch("terminated by SIGTERM " + TIME, why_ended(TerminationSignal(signal.SIGTERM), "x", tmp_path))


@pytest.mark.parametrize("state", [None, {"type": "CANCELLED"}, {"type": "CANCELLING"}])
def test_a_run_that_is_deleted_or_cancelled_gets_a_signal_and_says_why(tmp_path, prefect, monkeypatch, state):
    monkeypatch.setattr(stops, "ASK_EVERY", 0.02)
    stopped, name = threading.Event(), f"run-{(state or {}).get('type')}"
    before = signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    try:
        with watched_flow_run(name, tmp_path):
            assert read_note(tmp_path, name).itself
            until(lambda: prefect["answers"] > 2)
            assert not stopped.is_set()
            prefect["state"] = state
            assert stopped.wait(10)
    finally:
        signal.signal(signal.SIGTERM, before)
    said = "cancelled" if state else "deleted"
    stop = TerminationSignal(signal.SIGTERM)
    assert re.fullmatch(f"{said} in the Prefect UI {TIME}", why_ended(stop, name, tmp_path))
    assert read_note(tmp_path, name) is None


def test_a_run_that_the_server_never_had_is_not_taken_for_deleted(tmp_path, prefect, monkeypatch):
    monkeypatch.setattr(stops, "ASK_EVERY", 0.02)
    prefect["state"], stopped = None, threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    try:
        with watched_flow_run("x", tmp_path):
            until(lambda: prefect["answers"] > 2)
            assert not stopped.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_note_of_a_worker_stays_when_its_run_ends(tmp_path, prefect):
    write_note(tmp_path, "x")
    with watched_flow_run("x", tmp_path):
        assert not read_note(tmp_path, "x").itself
    assert read_note(tmp_path, "x")
