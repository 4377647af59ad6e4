"""Feeds trackers from the journal: as a process of its own while a run works, or all at once afterwards.

    python -m eclectus.storage.trackers '{"home": ..., "run": ..., "trackers": [...], "project": ...}'

The process leaves its parent at once, so that it counts neither as its memory nor as its time, and has the lowest
priority. It reads the run's journal every POLL seconds, and ends when the run has ended or its standard input closes,
which the system does when the run's process dies. On standard output it says, one JSON object per line, what people
should know; what the libraries print goes to `trackers/feeder.log` in the home. Training waits for none of this.
Price: the imports of the libraries, then milliseconds of CPU every POLL seconds.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import os
import select
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from eclectus.storage.commands import command
from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.storage.journal import EVENTS
from eclectus.storage.trackers.journals import Tail, recorded
from eclectus.storage.trackers.rows import Rows
from eclectus.storage.trackers.sink import Sink
from eclectus.storage.trackers.tracker import LOG, Tracker, folder_of

POLL = 2.0
# How long a tracker may take for what it still has to send when the run has ended.
LAST_SECONDS = 45.0
CLASSES = {"tensorboard": "TensorBoard", "wandb": "Wandb", "mlflow": "Mlflow", "trackio": "Trackio"}


def open_tracker(name: str, folder: Path, project: str) -> Tracker:
    """Raises ImportError where its library is not installed."""
    module = importlib.import_module(f"eclectus.storage.trackers.{name}")
    return getattr(module, CLASSES[name])(folder, project)


def open_sinks(home: Home, run: str, names: Sequence[str], project: str, say: Callable[[str], None]) -> list[Sink]:
    folder = folder_of(home)
    folder.mkdir(parents=True, exist_ok=True)
    return [
        Sink(
            name,
            partial(open_tracker, name, folder, project),
            folder / "told",
            say,
            command("track", run, "--to", name, home=home.name),
        )
        for name in names
    ]


def feed_recorded(home: Home, run: str, names: Sequence[str], project: str, say: Callable[[str], None]) -> list[Sink]:
    """Tells trackers what they do not know yet of a run. Raises EclectusError while another process feeds it."""
    with feeding(home, run):
        sinks = open_sinks(home, run, names, project, say)
        rows = Rows(home, run, sinks)
        for stream, row in recorded(home, run):
            (rows.event if stream == EVENTS else rows.metric)(row)
        rows.end("unfinished")
        for sink in sinks:
            if left := sink.close():
                say(f"{sink.name}: {left} numbers were not taken")
    return sinks


def feed_live(home: Home, run: str, sinks: Sequence[Sink], lives: Callable[[float], bool]) -> None:
    """Feeds until the run has ended. lives: waits so many seconds, and says whether the run's process is there."""
    rows, tail = Rows(home, run, sinks), Tail(home, run)
    early: list[dict[str, object]] = []
    there, ended = True, False
    while not ended:
        # Read once more after the process is gone.
        last = not there
        waiting, early = early, []
        for row in [*waiting, *tail.read()]:
            if "event" in row:
                rows.event(row)
                ended = ended or row["event"] == "run_ended"
            elif rows.knows(str(row["step"])):
                rows.metric(row)
            else:
                early.append(row)
        if last and not ended:
            rows.end("crashed")
            ended = True
        for sink in sinks:
            sink.flush()
        there = ended or lives(POLL)
    tail.close()


@contextlib.contextmanager
def feeding(home: Home, run: str) -> Iterator[None]:
    """Held by the process that feeds a run. Raises EclectusError if another does."""
    folder = folder_of(home)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f".{run}.lock", "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EclectusError(f"run {run} is being fed to trackers by another process; wait until it ends") from None
        except OSError:
            # Without locks in the file system, numbers may be told twice.
            pass
        yield
        Path(handle.name).unlink(missing_ok=True)


def main() -> None:
    """The process."""
    os.setsid()
    os.nice(19)
    asked = json.loads(sys.argv[1])
    home = Home.open(asked["home"], reading=True)
    folder_of(home).mkdir(parents=True, exist_ok=True)
    told = os.fdopen(os.dup(1), "w")
    log = os.open(folder_of(home) / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)

    def say(text: str, **more: str) -> None:
        with contextlib.suppress(OSError):
            print(json.dumps({"text": text, **more}), file=told, flush=True)

    try:
        with feeding(home, asked["run"]):
            sinks = open_sinks(home, asked["run"], asked["trackers"], asked["project"], say)
            for sink in sinks:
                if sink.place:
                    say("", name=sink.name, place=sink.place)
            feed_live(home, asked["run"], sinks, _lives)
            _close(sinks, say)
    except EclectusError as error:
        say(str(error))
    told.close()
    # A library's threads that wait for a server that is gone would keep the process.
    os._exit(0)


def _lives(seconds: float) -> bool:
    """Waits, and says whether standard input is still open: the run's process holds its other end."""
    ready, _, _ = select.select([0], [], [], seconds)
    return not ready


def _close(sinks: Sequence[Sink], say: Callable[[str], None]) -> None:
    """Closes all sinks, each within LAST_SECONDS."""
    left: dict[str, int] = {}
    threads = [
        (sink, threading.Thread(target=lambda sink=sink: left.update({sink.name: sink.close()}), daemon=True))
        for sink in sinks
    ]
    for _, thread in threads:
        thread.start()
    until = time.monotonic() + LAST_SECONDS
    for sink, thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
        if sink.name not in left:
            say(f"{sink.name} did not take everything within {LAST_SECONDS:g} s; send the rest with: {sink.again}")
        elif left[sink.name]:
            say(f"{left[sink.name]} numbers did not reach {sink.name}; send them with: {sink.again}")
