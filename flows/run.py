"""Opening a run: home, journal, Prefect server and display around the flow that is called.

with open_run("main", parameters) as run: ...        # Ray, workers and server are gone when this ends, whatever happens
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import platform
import secrets
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb

from eclectus.flows.services.server import prefect_server
from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.storage.journal import Journal
from eclectus.storage.lineage.compact import compact
from eclectus.storage.lineage.connection import write_database
from eclectus.storage.step_keys import KnownKeys
from eclectus.tasks.allowed_paths import check_roots
from eclectus.tasks.ray_cluster import shut_ray
from eclectus.tasks.run import Display, Run, activate, current_run, require_run
from eclectus.tasks.settings import Settings

STARTS = 4
PACKAGES = [
    "eclectus",
    "prefect",
    "ray",
    "torch",
    "transformers",
    "datasets",
    "sentence-transformers",
    "faiss-cpu",
    "duckdb",
    "pandas",
    "pyarrow",
    "numpy",
]
JOURNALS_A_RUN = 200


@contextlib.contextmanager
def open_run(
    flow: str,
    parameters: Settings,
    home: Home | None = None,
    displays: list[Display] | None = None,
    served: bool = False,
) -> Iterator[Run]:
    """The run of this process, opened for `flow` unless a flow that calls this one has opened it already.

    served: a Prefect server is there, though the flow itself is not called yet. Raises EclectusError for a flow run that was
    started too often.
    """
    run = current_run()
    if run is not None:
        before, run.flow = run.flow, flow
        run.prefect_flow_run = run.prefect_flow_run or _prefect_flow_run()
        try:
            yield run
        finally:
            run.flow = before
        return
    prefect_flow_run = _prefect_flow_run()
    if prefect_flow_run:
        _check_starts()
    check_roots(parameters)
    home = home or Home.open()
    run_id = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"
    with _books_in_order(home), Journal(home.journal, run_id, home.mirror) as journal:
        run = Run(
            id=run_id,
            home=home,
            journal=journal,
            known=KnownKeys(home.keys, home.store),
            displays=displays or [],
            flow=flow,
            in_prefect=served or prefect_flow_run is not None,
            prefect_flow_run=prefect_flow_run,
        )
        pages = None
        if run.in_prefect:
            from eclectus.flows.ui import PrefectPages

            pages = PrefectPages()
            run.displays.append(pages)
        journal.event("run_started", flow=flow, parameters=parameters.model_dump(mode="json"), **_surroundings())
        started, error = time.monotonic(), None
        try:
            with activate(run):
                yield run
        except BaseException as fault:
            error = fault
            raise
        finally:
            with _interrupts_held():
                run.close_kept(error)
                shut_ray()
                if pages and _state(error) != "cancelled":
                    pages.run_ended(run)
                journal.event(
                    "run_ended",
                    state=_state(error),
                    seconds=round(time.monotonic() - started, 3),
                    prefect_flow_run=run.prefect_flow_run,
                    error=f"{type(error).__name__}: {error}" if error else None,
                )


@contextlib.contextmanager
def _books_in_order(home: Home) -> Iterator[None]:
    """Around a run: the database for shells is there, and what runs left behind is compacted. A run never fails for either."""
    _try(write_database, home)
    try:
        yield
    finally:
        with _interrupts_held():
            _try(compact, home, JOURNALS_A_RUN)


def _try(act: Callable[..., Any], *arguments: Any) -> None:
    try:
        act(*arguments)
    except (OSError, duckdb.Error) as error:
        logging.getLogger("eclectus").warning("%s put off to the next run: %s", act.__name__, error)


@contextlib.contextmanager
def served_run(flow: str, parameters: Settings, home: Home, displays: list[Display]) -> Iterator[Run]:
    """A run opened from the command line: with a Prefect server around it, ready to call flows in."""
    with prefect_server(home), open_run(flow, parameters, home, displays, served=True) as run, interrupts_noted(run):
        yield run


@contextlib.contextmanager
def interrupts_noted(run: Run) -> Iterator[None]:
    """Keeps a Ctrl-C in mind. Prefect swallows one that comes while it closes a task; then no other step begins.

    Where it is ignored, as in a job that a shell keeps in the background, it stays so.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN or threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, frame: Any) -> None:
        run.interrupted = True
        if not callable(before):
            raise KeyboardInterrupt
        before(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def once(flow: Any, parameters: Settings) -> Any:
    """What a flow gives for these parameters, called at most once in a run: flows call the flows that they build on."""
    results = require_run(f"flow '{flow.name}'").results
    key = f"{flow.name} {parameters.model_dump_json()}"
    if key not in results:
        results[key] = flow(parameters)
    return results[key]


def current_home() -> Home:
    return require_run("current_home").home


def code_version() -> str:
    """The commit of the code, with `+` when the tree differs from it; else the package's version."""
    root = Path(__file__).resolve().parent.parent
    git = shutil.which("git")
    if git and (root / ".git").exists():
        described = subprocess.run(
            [git, "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
            cwd=root,
            capture_output=True,
            text=True,
            check=False,
        )
        if described.returncode == 0:
            return described.stdout.strip()
    return importlib.metadata.version("eclectus")


def _surroundings() -> dict[str, Any]:
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "code_version": code_version(),
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "packages": versions,
    }


def _prefect_flow_run() -> str | None:
    import sys

    if "prefect" not in sys.modules:
        return None
    from prefect.runtime import flow_run

    return str(flow_run.id) if flow_run.id else None


def _check_starts() -> None:
    """Ends the round of crash and restart (flows/services/automations.py) by a failure, which nothing restarts."""
    from prefect.runtime import flow_run

    from eclectus.flows.ui import close_lost_steps

    if (flow_run.run_count or 0) > 1:
        close_lost_steps(str(flow_run.id))
    if (flow_run.run_count or 0) > STARTS:
        raise EclectusError(
            f"this run was started {STARTS} times and never ended by itself; look at its logs and the worker's, then run it anew"
        )


def _state(error: BaseException | None) -> str:
    if error is None:
        return "completed"
    # What is no Exception (Ctrl-C, an exit, Prefect's TerminationSignal) is somebody's wish.
    return "failed" if isinstance(error, Exception) else "cancelled"


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Keeps a second Ctrl-C from cutting the clean-up short."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(
            signal.SIGINT, before if callable(before) or before in (signal.SIG_DFL, signal.SIG_IGN) else signal.SIG_DFL
        )


os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
