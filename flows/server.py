"""A Prefect server for the duration of a run, where none is configured.

Prefect's own stand-in (the ephemeral server) loses task-run records at exit, so a run starts a real one: same program, free
port on loopback, its database under the home. It costs 3 s and 250 MB (19 s the first time, for migrations) and ends with
the run, also when the run is killed. A configured PREFECT_API_URL is used as it is.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from storage.errors import EclectusError
from storage.home import Home

START_SECONDS = 120
STOP_SECONDS = 10

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
    folder = home.root / "prefect"
    folder.mkdir(exist_ok=True)
    os.environ.setdefault("PREFECT_HOME", str(folder))
    running = _already_running(folder)
    process = None if running else _start(folder)
    address = running or process.address
    os.environ["PREFECT_API_URL"] = address
    try:
        yield address
    finally:
        _send_what_is_queued()
        os.environ.pop("PREFECT_API_URL", None)
        if process is not None:
            process.stop()


def _send_what_is_queued() -> None:
    """Waits until Prefect has sent its queued logs and events, which it does in threads, before the server goes."""
    if "prefect" in sys.modules:
        from prefect._internal.concurrency.services import QueueService
        from prefect.events.worker import EventsWorker
        from prefect.logging.handlers import APILogWorker

        queues: tuple[type[QueueService[Any]], ...] = (APILogWorker, EventsWorker)
        for queue in queues:
            queue.drain_all(timeout=5)


class _Server:
    def __init__(self, process: subprocess.Popen[bytes], address: str, note: Path, log: Path) -> None:
        self._process = process
        self._note = note
        self._log = log
        self.address = address

    def wait_until_up(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not is_up(self.address):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise EclectusError(f"the Prefect server did not start; its log is {self._log}")
            time.sleep(0.1)

    def stop(self) -> None:
        """Ends the server and everything it started: it leads a process group of its own."""
        self._note.unlink(missing_ok=True)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def _start(folder: Path) -> _Server:
    port = free_port()
    address = f"http://127.0.0.1:{port}/api"
    environment = os.environ | {
        "PREFECT_HOME": str(folder),
        "PREFECT_SERVER_UI_API_URL": address,
        "PREFECT_API_URL": address,
    }
    log = folder / "server.log"
    with open(log, "wb") as handle:
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=handle,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
    server = _Server(process, address, folder / "server.json", log)
    try:
        server.wait_until_up()
    except BaseException:
        server.stop()
        raise
    (folder / "server.json").write_text(json.dumps({"address": address, "pid": process.pid}))
    return server


def _already_running(folder: Path) -> str | None:
    try:
        note = json.loads((folder / "server.json").read_text())
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


def free_port(wanted: int = 0) -> int:
    """A free port on loopback: the wanted one if it is free."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError:
            return free_port()
        return probe.getsockname()[1]


def _die_with_parent() -> None:
    """Asks Linux to end this process when its parent dies, so that a killed run leaves no server behind."""
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
