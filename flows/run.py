"""Opens a run: home, journal, Prefect server and displays around a flow.

    with open_run("main", parameters) as run: ...

When the block ends, however it ends, Ray, workers and a server that was started for the run are stopped.
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
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb

import eclectus
from eclectus.flows.library_warnings import library_warnings_logged, limit_verbosity
from eclectus.flows.services.flow_runs.api import Api
from eclectus.flows.services.flow_runs.decide import STARTS, crashes
from eclectus.flows.services.flow_runs.stops import watched_flow_run, why_ended
from eclectus.flows.services.server import prefect_path, prefect_server
from eclectus.storage.artifact import Artifact
from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.storage.journal import Journal
from eclectus.storage.lineage.compact import compact
from eclectus.storage.lineage.connection import write_database
from eclectus.storage.lineage.dead_runs import end_dead_runs
from eclectus.storage.step_keys import KnownKeys
from eclectus.tasks.allowed_paths import check_roots
from eclectus.tasks.evaluation.training_names import training_name
from eclectus.tasks.ray_cluster import shut_ray
from eclectus.tasks.run import Display, Run, activate, current_run, require_run
from eclectus.tasks.settings import Settings
from eclectus.tasks.tracking import Trackers, TrackerSettings

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
COMPACTED_JOURNALS = 200
# Defaults for the libraries of every process that imports this module: runs of the command line and of workers.
LIBRARIES = {"TOKENIZERS_PARALLELISM": "true", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
for _name, _value in LIBRARIES.items():
    os.environ.setdefault(_name, _value)
limit_verbosity()


@contextlib.contextmanager
def open_run(
    flow: str,
    parameters: Settings,
    home: Home | None = None,
    displays: list[Display] | None = None,
) -> Iterator[Run]:
    """Opens the run of this process for `flow`, or joins the run that a calling flow has opened.

    Raises EclectusError for a flow run that was started more than STARTS times.
    """
    if (run := current_run()) is not None:
        with _joined(run, flow):
            yield run
        return
    prefect_flow_run = _prefect_flow_run()
    if prefect_flow_run:
        _check_starts(prefect_flow_run)
    check_roots(parameters)
    home = home or Home.open()
    run_id = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"
    with (
        contextlib.ExitStack() as services,
        _maintained(home),
        library_warnings_logged(home.root),
        Journal(home.journal, run_id, home.mirror) as journal,
    ):
        run = Run(
            id=run_id,
            home=home,
            journal=journal,
            known=KnownKeys(home.keys, home.store),
            displays=[*(displays or []), *([Trackers(parameters)] if isinstance(parameters, TrackerSettings) else [])],
            flow=flow,
            prefect_flow_run=prefect_flow_run,
            services=services,
        )
        if prefect_flow_run:
            _show_in_prefect(run)
        journal.event("run_started", flow=flow, parameters=parameters.model_dump(mode="json"), **_surroundings())
        started, error = time.monotonic(), None
        try:
            with activate(run), watched_flow_run(prefect_flow_run, prefect_path(home)):
                yield run
        except BaseException as fault:
            error = fault
            raise
        finally:
            with _interrupts_held():
                # The journal comes first: whatever fails after it, the lineage knows how the run ended.
                journal.end_steps(_state(error), f"{type(error).__name__}: {error}" if error else "")
                journal.event(
                    "run_ended",
                    state=_state(error),
                    seconds=round(time.monotonic() - started, 3),
                    prefect_flow_run=run.prefect_flow_run,
                    error=why_ended(error, run.prefect_flow_run, prefect_path(home)),
                )
                run.close_kept(error)
                shut_ray()
                if _state(error) != "cancelled":
                    run.show(lambda display: _show_end(display, run))


def serve(run: Run) -> None:
    """Starts what a run with work needs: a Prefect server, unless one is configured or running, and its pages."""
    run.services.enter_context(prefect_server(run.home))
    _show_in_prefect(run)


def _show_in_prefect(run: Run) -> None:
    from eclectus.flows.ui import PrefectPages

    run.in_prefect = True
    run.prefect_answers = _prefect_answers
    run.displays.append(PrefectPages())


def _prefect_answers() -> bool:
    """Whether something listens at the address of Prefect's API."""
    address = urllib.parse.urlsplit(os.environ.get("PREFECT_API_URL", ""))
    if not address.hostname:
        return True
    try:
        port = address.port or (443 if address.scheme == "https" else 80)
        socket.create_connection((address.hostname, port), timeout=2).close()
    except OSError:
        return False
    return True


def _show_end(display: Display, run: Run) -> None:
    if ended := getattr(display, "run_ended", None):
        ended(run)


@contextlib.contextmanager
def _joined(run: Run, flow: str) -> Iterator[None]:
    """Makes `flow` the flow of an open run whose steps are being called, for the block."""
    caller, run.flow = run.flow, flow
    first = None if run.prefect_flow_run else _prefect_flow_run()
    run.prefect_flow_run = run.prefect_flow_run or first
    try:
        with watched_flow_run(first, prefect_path(run.home)):
            yield
    finally:
        run.flow = caller


@contextlib.contextmanager
def _maintained(home: Home) -> Iterator[None]:
    """Writes the lineage database before a run and compacts journals after it; failures of either are only logged."""
    _try(end_dead_runs, home)
    _try(write_database, home)
    try:
        yield
    finally:
        with _interrupts_held():
            _try(compact, home, COMPACTED_JOURNALS)


def _try(act: Callable[..., Any], *arguments: Any) -> None:
    try:
        act(*arguments)
    except (OSError, duckdb.Error) as error:
        logging.getLogger("eclectus").warning("%s is left to the next run: %s", act.__name__, error)


@contextlib.contextmanager
def served_run(flow: str, parameters: Settings, home: Home, displays: list[Display]) -> Iterator[Run]:
    """Opens a run for the command line."""
    with open_run(flow, parameters, home, displays) as run, interrupts_noted(run):
        yield run


@contextlib.contextmanager
def interrupts_noted(run: Run) -> Iterator[None]:
    """Records a Ctrl-C in the run, so that no further step starts: Prefect swallows one while it closes a task.

    If SIGINT is ignored, as in a shell's background job, it stays ignored.
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


def name_repeats(models: dict[int, dict[str, Artifact]]) -> dict[str, Artifact]:
    """Models by name of each training's seed -> all but the first training's, as "lory seed 1"."""
    repeats: dict[str, Artifact] = {}
    for seed in list(models)[1:]:
        repeats |= {training_name(name, seed): model for name, model in models[seed].items()}
    return repeats


def current_home() -> Home:
    return require_run("current_home").home


def code_version() -> str:
    """The commit of the code, with `+` if the working tree differs; without git, the package's version."""
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
    return eclectus.__version__


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


def _starts() -> int:
    from prefect.runtime import flow_run

    return flow_run.run_count or 0


def _check_starts(prefect_flow_run: str) -> None:
    """Fails a flow run that was restarted too often; the automations reschedule crashed runs, not failed ones."""
    from eclectus.flows.ui import close_lost_steps

    states: list[dict[str, Any]] = []
    # A server that is busy or away keeps no run from starting.
    try:
        count = _starts()
        if count > 1:
            close_lost_steps(prefect_flow_run)
        api = Api.of_environment()
        if api and count > STARTS:
            states = api.states(prefect_flow_run)
    except Exception as error:
        logging.getLogger("eclectus").warning("Prefect did not say how often this run was started: %s", error)
    # Starts that `eclectus down` ended are no crashes.
    if crashes([(state["type"], state["name"]) for state in states]) >= STARTS:
        raise EclectusError(
            f"this run crashed in each of its {STARTS} starts; read its logs and the worker's, then start a new run"
        )


def _state(error: BaseException | None) -> str:
    if error is None:
        return "completed"
    # A BaseException that is not an Exception (Ctrl-C, an exit, Prefect's TerminationSignal) means cancelled.
    return "failed" if isinstance(error, Exception) else "cancelled"


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ignores further interrupts during clean-up."""
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
