"""The supervisor: starts the services of a home, looks at them every second, and settles the flow runs that died.

    python -m eclectus.flows.services.supervisor.watch HOME

`eclectus up` starts it and waits for it; `eclectus down` ends it first, and then the services. When it is killed its
services go on, and the next one, which `up` starts, finds them in prefect/services.json. The Prefect server has a
keeper of its own; the supervisor, the worker and every flow run are noted as its users.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eclectus.flows.services.background import Background, start_of
from eclectus.flows.services.flow_runs.api import Api
from eclectus.flows.services.flow_runs.notes import clock, processes
from eclectus.flows.services.flow_runs.settle import Settler
from eclectus.flows.services.ports import keep_port
from eclectus.flows.services.server import auth_string, join, prefect_folder
from eclectus.flows.services.server_note import port_of
from eclectus.flows.services.supervisor.note import BEAT, UpNote, read_up_note
from eclectus.flows.services.supervisor.programs import PAGES_SERVER, RAY, WORKER_PROGRAM, Programs
from eclectus.flows.services.supervisor.service import Service, end_session, pause
from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home

DEFAULT_PORT = 4200
LOCK = "supervisor.lock"
LOOK_SECONDS = 1.0
SETTLE_SECONDS = 5.0
SLOTS_SECONDS = 30.0
SERVER, DEPLOYED, SETTLED = "the Prefect server", "the deployments", "the flow runs"


class Supervisor:
    """Watches the services of one home."""

    def __init__(self, home: Home) -> None:
        self.home, self.folder = home, prefect_folder(home)
        self.me = Background("the supervisor", os.getpid(), start_of(os.getpid()), str(self.folder / "supervisor.log"))
        self.note = read_up_note(self.folder) or UpNote.new(self.folder)
        self._renew()
        self.programs = Programs(home, self.folder, self.note)
        self.ready: set[str] = set()
        self.trouble: dict[str, str] = {}
        self.server_failures = 0
        self.settler: Settler | None = None
        self.services = [
            Service(PAGES_SERVER, self.programs.start_pages, lambda: True, self.say),
            Service(RAY, self.programs.start_ray, lambda: bool(self.programs.ray_address()), self.say, (SERVER,)),
            Service(
                WORKER_PROGRAM,
                self.programs.start_worker,
                self.programs.worker_is_ready,
                self.say,
                (SERVER, RAY, DEPLOYED, SETTLED),
                self.programs.worker_is_hung,
            ),
        ]
        self._written: Any = None
        self._users: set[tuple[int, str]] = set()
        self._settled = self._freed = 0.0

    def run(self) -> None:
        """Until a signal ends the process; the services go on."""
        self.programs.choose_pages()
        now = time.monotonic()
        for process in self.note.noted():
            if not process.is_alive():
                end_session(process.pid)
        for process in self.note.running():
            for service in self.services:
                if service.name == process.name:
                    service.adopt(process, now)
                    self.say(f"{service.name} ({process.pid}) runs already")
        self._write()
        threading.Thread(target=self._keep_server, daemon=True).start()
        while True:
            self.look(time.monotonic())
            time.sleep(LOOK_SECONDS)

    def look(self, now: float) -> None:
        """One look at everything."""
        for service in self.services:
            service.look(now, self.ready)
            (self.ready.add if service.ready else self.ready.discard)(service.name)
        if SERVER in self.ready and now - self._settled > SETTLE_SECONDS:
            self._settled = now
            self._settle(now)
        self._write()
        with contextlib.suppress(OSError):
            (self.folder / BEAT).touch()

    def at_once(self) -> None:
        """Ends all pauses: `eclectus up` asks for what is missing."""
        for service in self.services:
            service.at_once()

    def say(self, what: str) -> None:
        print(f"{clock()}  {what}", flush=True)

    def _renew(self) -> None:
        """What a note of before lacks, or what a reboot took."""
        fresh = None
        if not self.note.ray or not Path(self.note.ray).is_dir() or not self.note.token:
            fresh = UpNote.new(self.folder)
            self.note.ray, self.note.ray_token = fresh.ray, fresh.ray_token
        if fresh and not self.note.token:
            self.note.token = fresh.token
        self.note.path = str(self.folder.resolve())
        self.note.supervisor = asdict(self.me)

    def _keep_server(self) -> None:
        """Finds or starts the Prefect server and its keeper, again and again; then the deployments."""
        while True:
            try:
                address = join(self.folder, self.me, port=DEFAULT_PORT)
                if address != self.note.api or self.settler is None:
                    self._use_server(address)
                self.ready.add(SERVER)
                self.trouble.pop(SERVER, None)
                if DEPLOYED not in self.ready:
                    self.programs.deploy()
                    self.ready.add(DEPLOYED)
                    self.say("the deployments and automations are registered")
                self.trouble.pop(DEPLOYED, None)
                self.server_failures = 0
            except (OSError, EclectusError, ValueError, subprocess.SubprocessError) as error:
                self.server_failures += 1
                what = DEPLOYED if SERVER in self.ready and "deploy" in str(error) else SERVER
                self.trouble[what] = str(error)
                self.say(f"{what}: {error}; next try in {pause(self.server_failures):g} s")
            time.sleep(max(2 * LOOK_SECONDS, pause(self.server_failures)))

    def _use_server(self, address: str) -> None:
        keep_port(self.folder, "server", port_of(address))
        self.note.api, self.note.ui = address, address.removesuffix("/api")
        api = Api(address, auth_string(self.folder))
        self.settler = Settler(self.folder, api, self.note.token, self.say)
        self.say(f"the Prefect server is {self.note.ui}")

    def _settle(self, now: float) -> None:
        if self.settler is None:
            return
        try:
            if SETTLED not in self.ready and WORKER_PROGRAM not in self.ready:
                self.settler.adopt()
            self.settler.settle()
            self._add_users()
            if now - self._freed > SLOTS_SECONDS:
                self._freed = now
                self.settler.free_slots()
            self.ready.add(SETTLED)
            self.trouble.pop(SETTLED, None)
        except (OSError, EclectusError, ValueError, KeyError, TypeError) as error:
            self.trouble[SETTLED] = f"they could not be looked at: {type(error).__name__}: {error}"
            self.say(f"{SETTLED}: {self.trouble[SETTLED]}")

    def _add_users(self) -> None:
        """Flow runs and worker keep the server alive while there is no supervisor."""
        users = {(pid, started): "a flow run" for pid, started in processes(self.note.token).values()}
        for service in self.services:
            if service.name == WORKER_PROGRAM and service.process:
                users[service.process.pid, service.process.started] = service.name
        for (pid, started), name in users.items():
            if (pid, started) not in self._users:
                join(self.folder, Background(name, pid, started, ""))
        self._users = set(users)

    def _write(self) -> None:
        self.note.services = [asdict(service.process) for service in self.services if service.process]
        self.note.status, self.note.failures = dict(self.trouble), {SERVER: self.server_failures}
        for service in self.services:
            if service.trouble and not service.ready:
                self.note.status[service.name] = service.trouble
                self.note.failures[service.name] = service.failures
        self.note.ready = self.ready >= {SERVER, DEPLOYED, SETTLED, *(service.name for service in self.services)}
        now = asdict(self.note)
        if now != self._written:
            with contextlib.suppress(OSError):
                self.note.write(self.folder)
                self._written = now


def main(home: str) -> int:
    """Returns 0 at once if another supervisor watches this home."""
    opened = Home.open(home)
    with open(prefect_folder(opened) / LOCK, "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return 0
        supervisor = Supervisor(opened)

        def end(number: int, frame: object) -> None:
            supervisor.say("ended; the services go on until `eclectus down` ends them")
            os._exit(0)

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, end)
        signal.signal(signal.SIGUSR1, lambda number, frame: supervisor.at_once())
        supervisor.run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
