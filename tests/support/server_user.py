"""A command that uses the home's Prefect server (tests/support/fake_server.py in its place) until its input ends."""

import sys
from pathlib import Path

from eclectus.flows.services import server
from eclectus.storage.home import Home

server.SERVER = [sys.executable, str(Path(__file__).with_name("fake_server.py"))]
server.WATCH_SECONDS = 0.2

if __name__ == "__main__":
    with server.prefect_server(Home.open(sys.argv[1])) as address:
        print(address, flush=True)
        sys.stdin.read()
