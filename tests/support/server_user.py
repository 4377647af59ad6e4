"""A command that uses the home's Prefect server (tests/support/fake_server.py in its place) until its input ends."""

import sys
from pathlib import Path

from eclectus.flows.services import server
from eclectus.storage.home import Home

FAKE_SERVER = [sys.executable, str(Path(__file__).with_name("fake_server.py"))]

if __name__ == "__main__":
    # Only here: tests import this module, and the other tests of their process need the real server.
    server.SERVER, server.WATCH_SECONDS = FAKE_SERVER, 0.2
    with server.prefect_server(Home.open(sys.argv[1])) as address:
        print(address, flush=True)
        sys.stdin.read()
