"""An object store that misbehaves: a proxy before the test's S3 server that refuses, cuts short or delays requests."""

import contextlib
import http.client
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

ERROR = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>%s</Code><Message>%s</Message></Error>'
)  # fmt: skip


class BadStore:
    """address: of the proxy. faults: what happens to the next requests ("503", "403", "cut", "slow"); then all is well.

    always: the same for every request, while it is set. requests: answered so far. only: methods that are disturbed.
    """

    def __init__(self, target):
        self.faults, self.always, self.requests, self.only = [], None, 0, {"GET", "PUT", "HEAD", "DELETE", "POST"}
        self._lock, self._target = threading.Lock(), urlsplit(target).netloc
        store = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                fault = store.next(self.command)
                if fault == "slow":
                    time.sleep(0.5)
                if fault in ("503", "403"):
                    code = {"503": b"SlowDown", "403": b"AccessDenied"}[fault]
                    return self.reply(int(fault), ERROR % (code, code), {"Content-Type": "application/xml"})
                server = http.client.HTTPConnection(store._target, timeout=30)
                with contextlib.closing(server):
                    server.request(self.command, self.path, body, dict(self.headers))
                    answer = server.getresponse()
                    content, headers = answer.read(), dict(answer.getheaders())
                self.reply(answer.status, content, headers, cut=fault == "cut")

            def reply(self, status, content, headers, cut=False):
                self.send_response(status)
                headers = {name.lower(): value for name, value in headers.items()}
                length = headers.get("content-length") if self.command == "HEAD" else str(len(content))
                for name in {"transfer-encoding", "connection", "date", "server", "content-length"}:
                    headers.pop(name, None)
                for name, value in {**headers, "content-length": length or "0"}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content[: len(content) // 2] if cut else content)
                if cut:
                    self.close_connection = True

            do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = answer

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def next(self, method):
        with self._lock:
            self.requests += 1
            if method not in self.only:
                return None
            return self.always or (self.faults.pop(0) if self.faults else None)

    def close(self):
        self._server.shutdown()
        self._server.server_close()
