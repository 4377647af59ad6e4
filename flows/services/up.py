"""`eclectus up` and `down`: a local Prefect server, Ray, a process worker and all deployments, in the background.

`up` starts a supervisor (flows/services/supervisor), which starts the services, starts again those that die, and
settles the flow runs that died. Ready in 20 to 40 s; takes 2 GB. `down` ends the supervisor, then runs and services;
the next `up` resumes the runs that it interrupted. What runs is noted in `prefect/services.json` in the home.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import psutil

from eclectus.flows.services.background import Background
from eclectus.flows.services.deploy import project
from eclectus.flows.services.flow_runs.api import Api
from eclectus.flows.services.flow_runs.notes import TOKEN
from eclectus.flows.services.flow_runs.settle import stop_runs
from eclectus.flows.services.server import auth_string, leave, login_address, prefect_folder
from eclectus.flows.services.server_note import is_up
from eclectus.flows.services.server_note import read_note as read_server_note
from eclectus.flows.services.supervisor.note import NOTE, UpNote, beat_age, read_up_note, up_lock
from eclectus.flows.services.supervisor.programs import WORKER_PROGRAM
from eclectus.flows.services.supervisor.service import end_session
from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home

SUPERVISOR = "eclectus.flows.services.supervisor.watch"
# Seconds to wait for all services; a service that fails again and again is given up sooner.
UP_SECONDS = 300.0
MOST_FAILURES = 4
# A server that another command uses, and a Ray cluster that another has started, are not this home's.
OF_OTHERS = frozenset({"PREFECT_API_URL", "PREFECT_API_AUTH_STRING", "RAY_ADDRESS", TOKEN})
# A supervisor that has not looked at its services for so long hangs.
HUNG_SECONDS = 60.0


def up(home: Home) -> str:
    """Starts the services that are not running yet; returns the address that logs a browser into the UI.

    Raises EclectusError, naming service and log, if they do not come up. Services that were up before stay.
    """
    folder = prefect_folder(home)
    with up_lock(folder):
        note = read_up_note(folder)
        if note and note.supervisor_running() and beat_age(folder) < HUNG_SECONDS and _all_run(note):
            return login_address(folder, note.api)
        before = bool(note and note.ready)
        if note and (Path(note.path) != folder.resolve() or not note.token):
            # Of a home that was moved since, or by an earlier version: they know the old path only.
            _down(home, folder)
            before = False
        supervisor = _start_supervisor(home, folder)
    return _wait(home, folder, supervisor, before)


def down(home: Home) -> list[str]:
    """Stops the services of `up`, flow runs and all child processes; returns the names of those that were running.

    Runs of the command line that use the Prefect server go on, and the last of them ends it.
    """
    folder = prefect_folder(home)
    with up_lock(folder):
        return _down(home, folder)


def _all_run(note: UpNote) -> bool:
    return note.ready and len(note.running()) == len(note.services) and is_up(note.api)


def _start_supervisor(home: Home, folder: Path) -> Background:
    """Finds the supervisor, or starts one."""
    note = read_up_note(folder)
    running = note.supervisor_running() if note else None
    if running and beat_age(folder) > HUNG_SECONDS:
        running.stop_alone(signal.SIGKILL)
        running = None
    if running:
        os.kill(running.pid, signal.SIGUSR1)
        return running
    environment = {name: value for name, value in os.environ.items() if name not in OF_OTHERS}
    command = [sys.executable, "-m", SUPERVISOR, home.name]
    log = folder / "supervisor.log"
    supervisor = Background.start("the supervisor", command, environment, log, project())
    supervisor.wait_until(lambda: _noted_supervisor(folder) == supervisor)
    return supervisor


def _noted_supervisor(folder: Path) -> Background | None:
    note = read_up_note(folder)
    return note.supervisor_running() if note else None


def _wait(home: Home, folder: Path, supervisor: Background, before: bool) -> str:
    """Until all services are ready. before: they were, so what runs is left running when one does not come up."""
    deadline = time.monotonic() + UP_SECONDS
    while True:
        note = read_up_note(folder)
        if not supervisor.is_alive():
            ended = "stopped by `eclectus down` meanwhile" if note is None else f"it ended; its log is {supervisor.log}"
            raise EclectusError(f"the supervisor of the services was {ended}")
        if note and _all_run(note):
            return login_address(folder, note.api)
        trouble = "; ".join(note.status.values()) if note else ""
        gave_up = note is not None and max(note.failures.values(), default=0) >= MOST_FAILURES
        if time.monotonic() > deadline or gave_up:
            if not before:
                down(home)
            raise EclectusError(trouble or f"the services did not come up in time; the log is {supervisor.log}")
        time.sleep(0.2)


def _down(home: Home, folder: Path) -> list[str]:
    note, server = read_up_note(folder), read_server_note(folder)
    keeper = server.keeper if server and server.keeper.is_alive() else None
    if note is None:
        # None, or the note in a copy of a home, which is about the original's processes.
        (folder / NOTE).unlink(missing_ok=True)
        note = UpNote(str(folder), "", token="", ray="")
    if supervisor := note.supervisor_running():
        # Its services are its children, and runs are to be told why they end before the worker goes.
        supervisor.stop_alone()
    # It may have started one just before it ended.
    note = read_up_note(folder) or note
    running = note.running()
    mark = None
    if note.token and note.api:
        with contextlib.suppress(OSError):
            mark = stop_runs(folder, Api(note.api, auth_string(folder)), note.token)
    for service in running:
        if service.name == WORKER_PROGRAM:
            service.stop()
    if mark:
        # Without a server, the next `up` settles them.
        with contextlib.suppress(OSError, KeyError, TypeError):
            mark()
    for service in running:
        service.stop()
    for service in note.noted():
        # Ray's agents hide their environment; they stay in the session of the process that started Ray.
        end_session(service.pid)
    _end_all(folder, note.token)
    (folder / NOTE).unlink(missing_ok=True)
    if note.ray:
        shutil.rmtree(note.ray, ignore_errors=True)
    # Its keeper may have seen first that nobody uses the server any more.
    leave(folder)
    ended = ["the Prefect server"] if keeper and not keeper.is_alive() else []
    return [service.name for service in running] + ended


def _end_all(folder: Path, token: str) -> None:
    """Kills every process that carries the token, or whose note was lost: those of `up`'s that work in this folder."""
    left: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            environment = process.environ()
            ours = environment.get(TOKEN, "")
            if ours and (ours == token or environment.get("PREFECT_HOME") == str(folder)):
                left[process.pid] = process
    for process in left.values():
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs([*left.values()], 10)
