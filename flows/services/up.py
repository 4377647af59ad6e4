"""`eclectus up` and `down`: a local Prefect server, Ray, a process worker and all deployments, in the background.

Each service leads its own process group, recorded in `prefect/services.json` in the home, so that `down` stops it and
everything it started. Ready in 20 to 40 s; takes 2 GB. `down` interrupts runs in progress; at the next `up` the
automation for crashed runs (flows/services/automations.py) resumes them from their finished steps.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eclectus.flows.services.background import Background
from eclectus.flows.services.deploy import POOL, project
from eclectus.flows.services.ports import free_port, home_port, keep_port
from eclectus.flows.services.server import PAGES, join, leave, login_address, prefect_folder, server_environment
from eclectus.flows.services.server_note import is_up, port_of
from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.tasks.ray_cluster import OBJECT_STORE_BYTES, local_cpus

DEFAULT_PORT = 4200
RAY_DASHBOARD_PORT = 8265


def up(home: Home) -> str:
    """Starts the services that are not running yet and returns the address that logs a browser into the UI."""
    folder = prefect_folder(home)
    notes = _read(folder)
    if notes and all(service.is_alive() for service in _services(notes)) and is_up(notes["api"]):
        return login_address(folder, notes["api"])
    down(home)
    api = join(folder, port=DEFAULT_PORT)
    keep_port(folder, "server", port_of(api))
    ui = api.removesuffix("/api")
    # Ray puts sockets into this folder, whose paths must be short; a path in the home may be too long.
    ray_folder = tempfile.mkdtemp(prefix="eclectus-ray-")
    notes = {"ui": ui, "api": api, "ray": ray_folder, "services": []}

    def started(service: Background) -> Background:
        notes["services"].append(asdict(service))
        join(folder, service)
        (folder / "services.json").write_text(json.dumps(notes))
        return service

    try:
        pages = f"http://127.0.0.1:{home_port(folder, 'pages')}"
        keep_port(folder, "pages", port_of(pages))
        environment = os.environ | server_environment(folder, api) | service_environment(home) | {PAGES: pages}
        ray = started(_start_ray(folder, Path(ray_folder), environment))
        started(_start_pages(home, folder, pages))
        _run(environment, "-m", "eclectus", "deploy")
        ray.wait_until(lambda: bool(_ray_address(Path(ray_folder))))
        environment["RAY_ADDRESS"] = _ray_address(Path(ray_folder))
        worker = ["-m", "prefect", "worker", "start", "--pool", POOL, "--type", "process", "--name", "local"]
        log = folder / "worker.log"
        started(Background.start("the worker", [sys.executable, *worker], environment, log, project()))
    except BaseException:
        down(home)
        raise
    finally:
        leave(folder)
    return login_address(folder, api)


def down(home: Home) -> list[str]:
    """Stops the services of `up` and all their child processes; returns the names of those that were running."""
    folder = prefect_folder(home)
    notes = _read(folder) or {"services": []}
    running = [service for service in _services(notes) if service.is_alive()]
    for service in reversed(running):
        service.stop()
    (folder / "services.json").unlink(missing_ok=True)
    if notes.get("ray"):
        shutil.rmtree(notes["ray"], ignore_errors=True)
    # Runs of the command line go on, and the last of them ends the server.
    ended = ["the Prefect server"] if leave(folder) else []
    return [service.name for service in running] + ended


def service_environment(home: Home) -> dict[str, str]:
    """Environment that the worker passes to every flow run."""
    return {
        "PREFECT_WORKER_QUERY_SECONDS": "3",
        # The automation for zombie runs waits for heartbeats; 30 s is the shortest interval that Prefect allows.
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        "RAY_USAGE_STATS_ENABLED": "0",
        # A token for this cluster; Ray's own token file is shared by all clusters of a user.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32),
        "ECLECTUS_HOME": home.name,
        "ECLECTUS_DIRECTORY": str(project()),
    }


def _start_ray(folder: Path, ray_folder: Path, environment: dict[str, str]) -> Background:
    """Starts a Ray head for this machine, with its dashboard. It listens on every interface, hence the token."""
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block",
        f"--port={free_port()}", f"--temp-dir={ray_folder}", f"--ray-client-server-port={free_port()}",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={free_port(RAY_DASHBOARD_PORT)}",
        f"--dashboard-agent-listen-port={free_port()}",
        f"--num-cpus={local_cpus()}", f"--object-store-memory={OBJECT_STORE_BYTES}",
    ]  # fmt: skip
    # `down` stops the runs before Ray, so Ray need not wait for them.
    quick = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
    return Background.start("Ray", command, environment | quick, folder / "ray.log")


def _ray_address(ray_folder: Path) -> str:
    """HOST:PORT, which Ray writes to a file when it is ready; empty before."""
    note = ray_folder / "ray_current_cluster"
    return note.read_text().strip() if note.is_file() else ""


def _start_pages(home: Home, folder: Path, address: str) -> Background:
    """Serves the home's reports, so that a run's link to its report opens."""
    reports = home.store.root / "report"
    reports.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "eclectus.flows.services.pages", str(reports), address.rpartition(":")[2]]
    return Background.start("the report pages", command, dict(os.environ), folder / "pages.log")


def _run(environment: dict[str, str], *words: str) -> None:
    done = subprocess.run(
        [sys.executable, *words], env=environment, cwd=project(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise EclectusError(f"`python {' '.join(words)}` failed: {(done.stderr or done.stdout).strip()[-500:]}")


def _services(notes: dict[str, Any]) -> list[Background]:
    return [Background(**service) for service in notes["services"]]


def _read(folder: Path) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError):
        return json.loads((folder / "services.json").read_text())
    return None
