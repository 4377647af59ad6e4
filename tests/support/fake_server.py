"""A program in the place of Prefect's server: it answers `/api/health`, and notes when two work on one database."""

import fcntl
import os
import socket
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from eclectus.flows.services.background import die_with

options = dict(word.removeprefix("--").split("=") for word in sys.argv if word.startswith("--"))


class Health(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/api/health" else 404)
        self.end_headers()
        self.wfile.write(b"true")

    def log_message(self, *_):
        pass


def note(line):
    with open("starts.log", "a") as handle:
        handle.write(f"{line} {os.getpid()}\n")


die_with(int(options["keeper"]))
if os.path.exists("fails"):
    sys.exit("it was asked to fail")
with open("prefect.db", "a") as database:
    try:
        fcntl.flock(database, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        note("collision")
    note("started")
    time.sleep(0.3)  # migrations
    server = ThreadingHTTPServer(("127.0.0.1", 0), Health, bind_and_activate=False)
    server.socket.close()
    server.socket = socket.socket(fileno=int(options["fd"]))
    server.serve_forever()
