"""Why a run ended before its end: who stopped it, and when, for `runs.error`.

    cancelled in the Prefect UI at ...        deleted in the Prefect UI at ...       stopped by `eclectus down` at ...
    interrupted (Ctrl-C) at ...               terminated by SIGTERM at ...

Also a watch on the flow run from within: Prefect stops a run that is cancelled while its worker lives, but no run that
is deleted. So a thread asks for it now and then, and ends the process like a cancellation.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

from eclectus.flows.services.flow_runs.api import Api
from eclectus.flows.services.flow_runs.decide import CANCELLED, DELETED
from eclectus.flows.services.flow_runs.notes import clock, read_note, remove_note, write_note

ASK_EVERY = 20.0
# Whoever cancels a run waits for its end, so its own process must not ask for long.
ASK_SECONDS = 3.0

_noted: dict[str, str] = {}


def why_ended(error: BaseException | None, flow_run: str | None, folder: Path) -> str | None:
    """What `runs.error` says. folder: the home's `prefect`."""
    if error is None:
        return None
    if isinstance(error, Exception):
        return f"{type(error).__name__}: {error}"
    noted = _noted_stop(flow_run, folder)
    if noted:
        return noted
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted (Ctrl-C) at {clock()}"
    if asked := _ask(flow_run):
        return asked
    if type(error).__name__ == "TerminationSignal":
        return f"terminated by {signal.Signals(getattr(error, 'signal', signal.SIGTERM)).name} at {clock()}"
    if isinstance(error, SystemExit):
        return f"exited with {error.code} at {clock()}"
    return f"ended by {type(error).__name__} at {clock()}"


@contextlib.contextmanager
def watched_flow_run(flow_run: str | None, folder: Path) -> Iterator[None]:
    """Watches the flow run of this process during the block, and notes that this process answers for it.

    A run that a worker took is noted already, and its note stays for the worker.
    """
    if flow_run is None:
        yield
        return
    note = None
    with contextlib.suppress(OSError):
        note = None if read_note(folder, flow_run) else write_note(folder, flow_run, itself=True)
    ended = threading.Event()
    thread = threading.Thread(target=_watch, args=(flow_run, ended), name="eclectus-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        if note:
            if stop := _noted_stop(flow_run, folder):
                _noted[flow_run] = stop
            with contextlib.suppress(OSError):
                remove_note(folder, note)


def _watch(flow_run: str, ended: threading.Event) -> None:
    api, cancelling, known = Api.of_environment(), 0, False
    while api and not ended.wait(ASK_EVERY):
        try:
            found = api.flow_run(flow_run)
        except (OSError, ValueError):
            continue
        state = ((found or {}).get("state") or {}).get("type")
        cancelling = cancelling + 1 if state == "CANCELLING" else 0
        known = known or found is not None
        # Its worker has the first turn: it also tells Prefect that the run was cancelled. A run that this server never
        # had is on another one.
        if (found is None and known) or state == "CANCELLED" or cancelling > 2:
            _noted[flow_run] = f"{CANCELLED if found else DELETED} at {clock()}"
            os.kill(os.getpid(), signal.SIGTERM)
            return


def _noted_stop(flow_run: str | None, folder: Path) -> str | None:
    if flow_run is None:
        return None
    if flow_run in _noted:
        return _noted[flow_run]
    note = read_note(folder, flow_run)
    return note.stop if note and note.stop else None


def _ask(flow_run: str | None) -> str | None:
    """What Prefect knows: whether the run was cancelled or deleted there."""
    api = Api.of_environment()
    if api is None or flow_run is None:
        return None
    with contextlib.suppress(OSError, ValueError):
        found = api.flow_run(flow_run, timeout=ASK_SECONDS)
        if found is None:
            return f"{DELETED} at {clock()}"
        state = found.get("state") or {}
        if state.get("type") in ("CANCELLING", "CANCELLED"):
            return f"{CANCELLED} at {str(state['timestamp'])[:19].replace('T', ' ')} UTC"
    return None
