"""`eclectus up` and `down`: a local Prefect server, a process worker and all deployments, in the background.

Each service leads a process group of its own, named in `prefect/services.json` under the home, so that `down` ends it and
everything it started. Ready in about 30 s.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from flows.server import QUIET, free_port, is_up
from storage.errors import EclectusError
from storage.home import Home

POOL = "eclectus"
DEFAULT_PORT = 4200
START_SECONDS = 120
STOP_SECONDS = 15


def up(home: Home) -> str:
    """Starts what is not running yet and returns the address of the UI."""
    folder = home.root / "prefect"
    folder.mkdir(exist_ok=True)
    notes = _read(folder)
    if notes and all(_alive(service) for service in notes["services"].values()) and is_up(notes["api"]):
        return notes["ui"]
    down(home)
    port = free_port(DEFAULT_PORT)
    ui, api = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{port}/api"
    environment = os.environ | QUIET | {
        "PREFECT_HOME": str(folder),
        "PREFECT_API_URL": api,
        "PREFECT_SERVER_UI_API_URL": api,
        "PREFECT_WORKER_QUERY_SECONDS": "3",
        "ECLECTUS_HOME": str(home.root),
        "ECLECTUS_DIRECTORY": str(_project()),
    }  # fmt: skip
    services: dict[str, dict[str, float]] = {}

    def start(name: str, *words: str) -> None:
        services[name] = _start(folder / f"{name}.log", environment, *words)
        _write(folder, {"ui": ui, "api": api, "services": services})

    try:
        start("server", "server", "start", "--host", "127.0.0.1", "--port", str(port))
        _wait_until(lambda: is_up(api), folder / "server.log", services["server"])
        _prefect(environment, "work-pool", "create", POOL, "--type", "process", "--overwrite")
        _prefect(environment, "--no-prompt", "deploy", "--all")
        start("worker", "worker", "start", "--pool", POOL, "--type", "process", "--name", "local")
    except BaseException:
        down(home)
        raise
    (folder / "server.json").write_text(json.dumps({"address": api, "pid": services["server"]["pid"]}))
    return ui


def down(home: Home) -> list[str]:
    """Ends the services of `up` and all their children; returns the names of those that ran."""
    folder = home.root / "prefect"
    notes = _read(folder) or {"services": {}}
    running = {name: service for name, service in notes["services"].items() if _alive(service)}
    for service in reversed(running.values()):
        _end(int(service["pid"]))
    for name in ("services.json", "server.json"):
        (folder / name).unlink(missing_ok=True)
    return list(running)


def _end(leader: int) -> None:
    """Ends a process, its group and every descendant, gently and then not."""
    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
        family = [psutil.Process(leader), *psutil.Process(leader).children(recursive=True)]
        os.killpg(leader, signal.SIGTERM)
        _, left = psutil.wait_procs(family, STOP_SECONDS)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, STOP_SECONDS)


def _start(log: Path, environment: dict[str, str], *words: str) -> dict[str, float]:
    with open(log, "wb") as handle:
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect", *words],
            env=environment,
            cwd=_project(),
            stdin=subprocess.DEVNULL,
            stdout=handle,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return {"pid": process.pid, "started": psutil.Process(process.pid).create_time()}


def _alive(service: dict[str, float]) -> bool:
    """Whether this very process still runs: its number may have been given to another since."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(int(service["pid"]))
        return process.create_time() == service["started"] and process.status() != psutil.STATUS_ZOMBIE
    return False


def _wait_until(ready: Callable[[], bool], log: Path, service: dict[str, float]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not ready():
        if not _alive(service) or time.monotonic() > deadline:
            raise EclectusError(f"the Prefect server did not start; its log is {log}")
        time.sleep(0.2)


def _prefect(environment: dict[str, str], *words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "prefect", *words],
        env=environment,
        cwd=_project(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise EclectusError(f"`prefect {' '.join(words)}` failed: {(done.stderr or done.stdout).strip()[-500:]}")


def _project() -> Path:
    return Path(__file__).resolve().parent.parent


def _read(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / "services.json").read_text())
    except (OSError, ValueError):
        return None


def _write(folder: Path, notes: dict[str, Any]) -> None:
    (folder / "services.json").write_text(json.dumps(notes))
