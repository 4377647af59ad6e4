"""A Prefect server: one for the duration of a run where none is configured, or the one that `eclectus up` leaves running.

Prefect's own stand-in (the ephemeral server) loses task-run records at exit, so a run starts a real one: same program, free
port on loopback, its database under the home. It costs 3 s and 250 MB (19 s the first time, for migrations) and ends with
the run, also when the run is killed. A configured PREFECT_API_URL is used as it is.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eclectus.flows.services.background import Background, free_port
from eclectus.storage.home import Home

NOTE = "server.json"
# The variable with the address where the home's reports are served, if they are: `eclectus up` does.
PAGES = "ECLECTUS_PAGES"

QUIET = {
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
    "PREFECT_CLI_PROMPT": "false",
    "DO_NOT_TRACK": "1",
}


@contextlib.contextmanager
def prefect_server(home: Home) -> Iterator[str]:
    """Yields the API's address: of the configured server, of one already up for this home, or of one started here.

    Sets PREFECT_API_URL for this process, so it must be entered before Prefect is imported.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    configured = os.environ.get("PREFECT_API_URL")
    if configured:
        yield configured
        return
    folder = prefect_folder(home)
    os.environ.setdefault("PREFECT_HOME", str(folder))
    running, server = _already_running(folder), None
    address = running or f"http://127.0.0.1:{free_port()}/api"
    if not running:
        server = start_server(folder, address, dies_with_us=True)
    os.environ["PREFECT_API_URL"] = address
    try:
        yield address
    finally:
        _send_what_is_queued()
        os.environ.pop("PREFECT_API_URL", None)
        if server is not None:
            stop_server(folder, server)


def start_server(folder: Path, address: str, dies_with_us: bool) -> Background:
    """Starts a server for `http://127.0.0.1:PORT/api` with its data in `folder`, and waits until it answers."""
    environment = os.environ | QUIET | server_environment(folder, address)
    port = address.removesuffix("/api").rpartition(":")[2]
    words = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", port]
    server = Background.start(
        "the Prefect server", words, environment, folder / "server.log", dies_with_us=dies_with_us
    )
    try:
        server.wait_until(lambda: is_up(address))
    except BaseException:
        server.stop()
        raise
    (folder / NOTE).write_text(json.dumps({"address": address, "pid": server.pid}))
    return server


def stop_server(folder: Path, server: Background) -> None:
    (folder / NOTE).unlink(missing_ok=True)
    server.stop()


def server_environment(folder: Path, address: str) -> dict[str, str]:
    """What a server and its clients on this machine must agree on. On any port but 4200 the UI has to be told its API."""
    return {"PREFECT_HOME": str(folder), "PREFECT_API_URL": address, "PREFECT_SERVER_UI_API_URL": address}


def prefect_folder(home: Home) -> Path:
    folder = home.root / "prefect"
    folder.mkdir(exist_ok=True)
    return folder


def _send_what_is_queued() -> None:
    """Waits until Prefect has sent its queued logs and events, which it does in threads, before the server goes."""
    if "prefect" in sys.modules:
        from prefect._internal.concurrency.services import QueueService
        from prefect.events.worker import EventsWorker
        from prefect.logging.handlers import APILogWorker

        queues: tuple[type[QueueService[Any]], ...] = (APILogWorker, EventsWorker)
        for queue in queues:
            queue.drain_all(timeout=5)


def _already_running(folder: Path) -> str | None:
    try:
        note = json.loads((folder / NOTE).read_text())
        os.kill(note["pid"], 0)
    except (OSError, ValueError, KeyError):
        return None
    return note["address"] if is_up(note["address"]) else None


def is_up(address: str) -> bool:
    """Whether a Prefect API answers at this address."""
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False
