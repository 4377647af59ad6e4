"""Which flow runs this home's programs took, and which of their processes live.

A note, `prefect/flow-runs/ID.json`, is written before a run can leave the state Scheduled, and names the process that
answers for it: the worker that took it or, of a run of the command line, its own. It is removed when the run has ended.
So what a dead worker left is known, whatever else works in the same pool, and nothing that is not in a note is touched.

A worker starts each flow run as the leader of a session, with the run's id in its environment. It outlives its worker.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from eclectus.flows.services.background import lives, start_of
from eclectus.storage.atomic_write import write_atomically

FOLDER = "flow-runs"
# In the environment of everything that `eclectus up` starts and of what that starts in turn.
TOKEN = "ECLECTUS_UP"
FLOW_RUN = "PREFECT__FLOW_RUN_ID"
# A file whose time says when the worker last asked for runs, so that a hung worker is noticed.
BEAT = "worker.beat"


@dataclass(frozen=True)
class Note:
    """owner, owner_started: the process that answers for the run (`start_of`). itself: it is the run's own process.
    stop: why it is being stopped."""

    flow_run: str
    owner: int
    owner_started: str
    itself: bool = False
    stop: str = ""

    def owner_lives(self) -> bool:
        return lives(self.owner, self.owner_started)


def write_note(folder: Path, flow_run: str, itself: bool = False) -> Note:
    """Notes that this process answers for the run. folder: the home's `prefect`."""
    note = Note(flow_run, os.getpid(), start_of(os.getpid()), itself)
    replace_note(folder, note)
    return note


def replace_note(folder: Path, note: Note) -> None:
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    write_atomically(folder / FOLDER / f"{note.flow_run}.json", json.dumps(asdict(note)))


def read_notes(folder: Path) -> dict[str, Note]:
    """Flow run -> note; damaged ones are removed."""
    notes = {}
    for path in sorted((folder / FOLDER).glob("*.json")):
        try:
            notes[path.stem] = Note(**json.loads(path.read_text()))
        except (ValueError, TypeError):
            path.unlink(missing_ok=True)
        except OSError:
            continue
    return notes


def read_note(folder: Path, flow_run: str) -> Note | None:
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Note(**json.loads((folder / FOLDER / f"{flow_run}.json").read_text()))
    return None


def remove_note(folder: Path, note: Note) -> None:
    """Unless the run was taken again meanwhile."""
    if (now := read_note(folder, note.flow_run)) is None or now.owner_started == note.owner_started:
        (folder / FOLDER / f"{note.flow_run}.json").unlink(missing_ok=True)


def note_stop(folder: Path, note: Note, why: str) -> None:
    """Notes why a run is stopped, with the time, before its process gets the signal: the run's journal says it."""
    if not note.stop:
        replace_note(folder, replace(note, stop=f"{why} at {clock()}"))


def clock() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())


def processes(token: str) -> dict[str, tuple[int, str]]:
    """Flow run -> (process id, start) of the live processes that workers with this token started."""
    found = {}
    for pid, environment in environments(token).items():
        if flow_run := environment.get(FLOW_RUN):
            with contextlib.suppress(OSError, psutil.Error):
                # Children of the run have the run's session, and end with it.
                if os.getsid(pid) == pid and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                    found[flow_run] = pid, start_of(pid)
    return found


def environments(token: str) -> dict[int, dict[str, str]]:
    """Process id -> environment of every process of this user that carries the token."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            environment = process.environ()
            if environment.get(TOKEN) == token:
                found[process.pid] = environment
    return found


def signal_run(process: tuple[int, str], number: int = signal.SIGTERM) -> None:
    """Sends a signal to a flow run's process, if it still is that process, and to the group that it leads."""
    pid, started = process
    if lives(pid, started):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            (os.killpg if os.getpgid(pid) == pid else os.kill)(pid, number)
