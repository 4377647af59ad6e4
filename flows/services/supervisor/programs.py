"""The programs of `eclectus up` besides the Prefect server: Ray, the report pages, the worker; and `deploy`."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

from eclectus.flows.services.background import Background
from eclectus.flows.services.deploy import POOL, project
from eclectus.flows.services.flow_runs.notes import BEAT, TOKEN, environments
from eclectus.flows.services.flow_runs.settle import WORKER
from eclectus.flows.services.ports import free_port, home_port, keep_port
from eclectus.flows.services.server import PAGES, server_environment
from eclectus.flows.services.server_note import port_of
from eclectus.flows.services.supervisor.note import UpNote
from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.tasks.ray_cluster import LOOPBACK, OBJECT_STORE_BYTES, local_cpus

RAY_DASHBOARD_PORT = 8265
# Which of the services a process belongs to, in its environment.
PART = "ECLECTUS_PART"
RAY, PAGES_SERVER, WORKER_PROGRAM = "Ray", "the report pages", "the worker"
# The worker asks for runs every 3 s, and at least once a minute when the server does not answer.
HUNG_SECONDS = 150.0
DEPLOY_SECONDS = 300


class Programs:
    """Starts the programs of one home. note: their ports and secrets, which stay the same when one is started again."""

    def __init__(self, home: Home, folder: Path, note: UpNote) -> None:
        self.home, self.folder, self.note = home, folder, note
        self._beat: tuple[float, float] = (0.0, time.monotonic())

    def environment(self, part: str) -> dict[str, str]:
        """What all have, and pass on to every flow run."""
        temporary = Path(self.note.ray) / "t"
        temporary.mkdir(parents=True, exist_ok=True)
        return (
            os.environ
            | server_environment(self.folder, self.note.api)
            | {
                "PREFECT_WORKER_QUERY_SECONDS": "3",
                # The automation for zombie runs waits for heartbeats; 30 s is the shortest interval Prefect allows.
                "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
                "RAY_USAGE_STATS_ENABLED": "0",
                **LOOPBACK,
                # A token for this cluster; Ray's own token file is shared by all clusters of a user.
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN": os.environ.get("RAY_AUTH_TOKEN") or self.note.ray_token,
                "ECLECTUS_HOME": self.home.name,
                "ECLECTUS_DIRECTORY": str(project()),
                # What killed programs leave there goes with `down`.
                "TMPDIR": str(temporary),
                PAGES: self.note.pages,
                TOKEN: self.note.token,
                PART: part,
            }
        )

    def start_ray(self) -> Background:
        """Starts a Ray head for this machine, with its dashboard, on loopback."""
        self.end_left(RAY)
        (Path(self.note.ray) / "ray_current_cluster").unlink(missing_ok=True)
        ports = self.note.ray_ports
        for name, wanted in (("head", 0), ("client", 0), ("agent", 0), ("dashboard", RAY_DASHBOARD_PORT)):
            # The worker knows the head's address, so a head that is started again keeps it.
            ports[name] = free_port(ports.get(name) or wanted)
        command = [
            str(Path(sys.executable).with_name("ray")), "start", "--head", "--block",
            "--node-ip-address=127.0.0.1", f"--port={ports['head']}",
            f"--temp-dir={self.note.ray}", f"--ray-client-server-port={ports['client']}",
            "--dashboard-host=127.0.0.1", f"--dashboard-port={ports['dashboard']}",
            f"--dashboard-agent-listen-port={ports['agent']}",
            f"--num-cpus={local_cpus()}", f"--object-store-memory={OBJECT_STORE_BYTES}",
        ]  # fmt: skip
        # `down` stops the runs before Ray, so Ray need not wait for them.
        quick = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
        return Background.start(RAY, command, self.environment(RAY) | quick, self.folder / "ray.log")

    def ray_address(self) -> str:
        """HOST:PORT, which Ray writes to a file when it is ready; empty before."""
        with contextlib.suppress(OSError):
            return (Path(self.note.ray) / "ray_current_cluster").read_text().strip()
        return ""

    def choose_pages(self) -> None:
        """The address of the report pages, which stays the same over `down` and `up`: links to reports go there."""
        self.note.pages = self.note.pages or f"http://127.0.0.1:{home_port(self.folder, 'pages')}"
        keep_port(self.folder, "pages", port_of(self.note.pages))

    def start_pages(self) -> Background:
        """Serves the home's reports, so that a run's link to its report opens."""
        reports = self.home.store.root / "report"
        reports.mkdir(exist_ok=True)
        port = str(port_of(self.note.pages))
        command = [sys.executable, "-m", "eclectus.flows.services.pages", str(reports), port]
        log = self.folder / "pages.log"
        return Background.start(PAGES_SERVER, command, self.environment(PAGES_SERVER), log, project())

    def start_worker(self) -> Background:
        (self.folder / BEAT).unlink(missing_ok=True)
        self._beat = (0.0, time.monotonic())
        command = [sys.executable, "-m", "eclectus.flows.services.flow_runs.worker", POOL, WORKER]
        environment = self.environment(WORKER_PROGRAM) | {"RAY_ADDRESS": self.ray_address()}
        return Background.start(WORKER_PROGRAM, command, environment, self.folder / "worker.log", project())

    def worker_is_ready(self) -> bool:
        return self._last_beat() > 0

    def worker_is_hung(self) -> bool:
        """Whether it has not asked for runs for HUNG_SECONDS, by a clock that nobody sets."""
        beat, since = self._beat
        if (now := self._last_beat()) != beat:
            self._beat = now, time.monotonic()
            return False
        return time.monotonic() - since > HUNG_SECONDS

    def deploy(self) -> None:
        """Raises EclectusError with the last lines of what it printed."""
        done = subprocess.run(
            [sys.executable, "-m", "eclectus", "deploy"], env=self.environment("deploy"), cwd=project(),
            capture_output=True, text=True, check=False, timeout=DEPLOY_SECONDS, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if done.returncode:
            raise EclectusError(f"`eclectus deploy` failed: {(done.stderr or done.stdout).strip()[-500:]}")

    def end_left(self, part: str) -> None:
        """Kills what is left of an earlier start of this service, whose first process is dead."""
        for pid, environment in environments(self.note.token).items():
            if environment.get(PART) == part:
                with contextlib.suppress(psutil.Error):
                    psutil.Process(pid).kill()

    def _last_beat(self) -> float:
        with contextlib.suppress(OSError):
            return os.stat(self.folder / BEAT).st_mtime
        return 0.0
