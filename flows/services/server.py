"""A Prefect server: the configured one, the one that `eclectus up` started, or one that lasts as long as a run.

Prefect's ephemeral server loses task-run records at exit, so a run starts a real server: on a free port on loopback,
with its database in the home. It takes 3 s and 250 MB (19 s the first time, for migrations) and stops with the run,
also when the run is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eclectus.flows.services.background import Background, free_port
from eclectus.storage.atomic_write import write_atomically
from eclectus.storage.home import Home

NOTE = "server.json"
# Environment variable with the address at which the home's reports are served; set by `eclectus up`.
PAGES = "ECLECTUS_PAGES"

# Defaults for every Prefect process that we start, and for this one.
QUIET = {
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
    "PREFECT_CLI_PROMPT": "false",
    "DO_NOT_TRACK": "1",
}


@contextlib.contextmanager
def prefect_server(home: Home) -> Iterator[str]:
    """Yields the API address of the configured server, of one already running for this home, or of one started here.

    Sets PREFECT_API_URL for this process, so enter it before Prefect is imported.
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
        _flush_queues()
        os.environ.pop("PREFECT_API_URL", None)
        if server is not None:
            stop_server(folder, server)


def start_server(folder: Path, address: str, dies_with_us: bool) -> Background:
    """Starts a server at `http://127.0.0.1:PORT/api` with its data in `folder`, and waits until it answers."""
    environment = os.environ | server_environment(folder, address)
    port = address.removesuffix("/api").rpartition(":")[2]
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", port]
    server = Background.start(
        "the Prefect server", command, environment, folder / "server.log", dies_with_us=dies_with_us
    )
    try:
        server.wait_until(lambda: is_up(address))
    except BaseException:
        server.stop()
        raise
    write_atomically(folder / NOTE, json.dumps({"address": address, "server": asdict(server)}))
    return server


def stop_server(folder: Path, server: Background) -> None:
    """Stops a server; the note stays if it is about another one, which `up` has started meanwhile."""
    noted = _read_note(folder)
    if noted and noted[1] == server:
        (folder / NOTE).unlink(missing_ok=True)
    server.stop()


def server_environment(folder: Path, address: str) -> dict[str, str]:
    """Environment of a server on this machine and its clients. On ports other than 4200 the UI needs the address."""
    addresses = {"PREFECT_HOME": str(folder), "PREFECT_API_URL": address, "PREFECT_SERVER_UI_API_URL": address}
    return QUIET | addresses


def prefect_folder(home: Home) -> Path:
    folder = home.root / "prefect"
    folder.mkdir(exist_ok=True)
    return folder


def _flush_queues() -> None:
    """Waits until Prefect's threads have sent their queued logs and events, before the server stops."""
    if "prefect" in sys.modules:
        from prefect._internal.concurrency.services import QueueService
        from prefect.events.worker import EventsWorker
        from prefect.logging.handlers import APILogWorker

        queues: tuple[type[QueueService[Any]], ...] = (APILogWorker, EventsWorker)
        for queue in queues:
            queue.drain_all(timeout=5)


def _already_running(folder: Path) -> str | None:
    address, server = _read_note(folder) or ("", None)
    return address if server and server.is_alive() and is_up(address) else None


def _read_note(folder: Path) -> tuple[str, Background] | None:
    """(address, process) of the server that was last started for this home."""
    try:
        note = json.loads((folder / NOTE).read_text())
        return note["address"], Background(**note["server"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_up(address: str) -> bool:
    """Whether a Prefect API answers at this address."""
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False
