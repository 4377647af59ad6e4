"""What OpenLineage's own client sends to a real HTTP server, and writes into a file."""

import http.server
import json
import threading

import pytest

from eclectus.flows.cli.main import main
from eclectus.storage.lineage.connection import query
from tests.support.history import RUNS, write_history

OLD, NEW = RUNS


@pytest.fixture
def catalogue():
    """(address, events received) of a server that takes OpenLineage events."""
    received = []

    class Takes(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            received.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            self.send_response(201)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Takes)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", received
    server.shutdown()
    server.server_close()


def check(events, home):
    """Every run and step starts and completes, and the data sets hang together as the lineage says."""
    kinds = [event["eventType"] for event in events]
    assert kinds == ["START", "COMPLETE"] * (1 + 4)
    steps = [event for event in events if event["eventType"] == "COMPLETE" and "." in event["job"]["name"]]
    assert {each["run"]["facets"]["parent"]["run"]["runId"] for each in steps} == {events[0]["run"]["runId"]}
    assert len({each["run"]["runId"] for each in events}) == 5
    made = {each["job"]["name"]: each["outputs"][0] for each in steps}
    read = {each["job"]["name"]: each["inputs"][0]["name"] for each in steps}
    assert read["main.make documents"] == "source.0.books.jsonl"
    assert read["main.make checkpoint"] == made["main.make instances"]["name"]
    ((name, digest),) = query(
        f"select name, artifact from artifacts where kind = 'checkpoint' and made_by = '{NEW}-checkpoint'", home
    )[1]
    checkpoint = made["main.make checkpoint"]
    assert checkpoint["name"] == name and checkpoint["facets"]["version"]["datasetVersion"] == digest
    assert checkpoint["outputFacets"]["outputStatistics"]["rowCount"] == 1
    assert steps[0]["run"]["facets"]["eclectus"]["settings"] == {"seed": 1, "k": RUNS[NEW]}


def test_a_catalogue_gets_every_run_and_step_and_a_file_the_same(home, tmp_path, monkeypatch, capsys, catalogue):
    write_history(home)
    address, received = catalogue
    monkeypatch.setenv("OPENLINEAGE_URL", address)
    main(["--home", str(home.root), "openlineage", "last"])
    assert "10 events" in capsys.readouterr().out
    assert {path for path, _ in received} == {"/api/v1/lineage"}
    check([event for _, event in received], home)
    monkeypatch.delenv("OPENLINEAGE_URL")
    main(["--home", str(home.root), "openlineage", NEW, "--out", str(tmp_path / "events.ndjson")])
    written = [json.loads(line) for line in (tmp_path / "events.ndjson").read_text().splitlines()]
    assert written == [event for _, event in received]


def test_no_transport_and_no_server_are_one_line(home, monkeypatch, capsys):
    write_history(home)
    # The client waits ten seconds between its attempts.
    monkeypatch.setattr("time.sleep", lambda _: None)
    for address, complaint in ((None, "set OPENLINEAGE_URL"), ("http://127.0.0.1:9", "cannot be sent")):
        if address:
            monkeypatch.setenv("OPENLINEAGE_URL", address)
        else:
            monkeypatch.delenv("OPENLINEAGE_URL", raising=False)
        with pytest.raises(SystemExit):
            main(["--home", str(home.root), "openlineage", "last"])
        assert complaint in capsys.readouterr().err.splitlines()[-1]
