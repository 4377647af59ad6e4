"""Requests of Prefect's API: a busy server is asked again, and what it refuses is an OSError."""

from __future__ import annotations

import http.server
import threading

import pytest

from eclectus.flows.services.flow_runs import api as apis
from eclectus.flows.services.flow_runs.api import Api


@pytest.fixture
def server(monkeypatch):
    """A server that answers with these codes, one after another, and then with 200; `asked` has what it was asked."""
    monkeypatch.setattr(apis, "BUSY_PAUSES", (0.01, 0.01))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            running.asked.append((self.path, body))
            self.send_response(running.codes.pop(0) if running.codes else 200)
            self.end_headers()
            self.wfile.write(running.answer)

        def log_message(self, *_):
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.codes, running.asked, running.answer = [], [], b"[]"
    thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    running.api = Api(f"http://127.0.0.1:{running.server_port}/api")
    yield running
    running.shutdown()
    running.server_close()


def test_a_busy_server_is_asked_again_with_the_same_body(server):
    server.codes = [503, 503]
    assert server.api.flow_runs(id={"any_": ["a"]}) == []
    assert len(server.asked) == 3 and len(set(server.asked)) == 1


@pytest.mark.parametrize("codes", [[503, 503, 503], [500], [401], [409]])
def test_what_stays_busy_or_is_refused_is_an_os_error(server, codes):
    server.codes = list(codes)
    with pytest.raises(OSError, match=str(codes[-1])):
        server.api.set_state("a", "CRASHED", "gone")
    assert len(server.asked) == len(codes)


def test_an_answer_that_is_cut_short_is_an_os_error_and_an_empty_one_is_none_at_all(server):
    server.answer = b'[{"id": '
    with pytest.raises(OSError, match="did not answer whole"):
        server.api.flow_runs()
    server.answer = b""
    assert server.api.request("POST", "/x", {}) == {}
    server.codes = [404]
    assert server.api.request("POST", "/x", {}) is None
