"""The Prefect server of a home, which all commands of the home share, or the configured one.

Prefect's ephemeral server loses task-run records at exit, so a run needs a real server: on loopback, with its database
in the home. The first command that needs it starts it, in 3 s and 250 MB (19 s the first time, for migrations), and
the last one ends it; `eclectus up` is one of its users. Starting, finding and ending it happen under one lock, and a
keeper process (eclectus.flows.services.keeper) starts it again if it dies and ends it if all of its users are killed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import eclectus
from eclectus.flows.services.background import START_SECONDS, Background, start_of
from eclectus.flows.services.configured_server import check_configured
from eclectus.flows.services.keeper import LOG
from eclectus.flows.services.ports import kept_port
from eclectus.flows.services.server_note import LOGIN, is_up, port_of, read_note
from eclectus.flows.services.users import add_user, remove_user, server_lock, users, waited_lock
from eclectus.storage.atomic_write import replacing
from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home

# Environment variable with the address at which the home's reports are served; set by `eclectus up`.
PAGES = "ECLECTUS_PAGES"
AUTH, AUTH_LOCK = "auth", "auth.lock"
KEEPER = [sys.executable, "-m", "eclectus.flows.services.keeper"]
SERVER = [sys.executable, "-m", "eclectus.flows.services.guarded_server"]
WATCH_SECONDS = 2.0
LEAVE_SECONDS = 60.0

# Defaults for every Prefect process that we start, and for this one.
QUIET = {
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
    "PREFECT_CLI_PROMPT": "false",
    "DO_NOT_TRACK": "1",
}


@contextlib.contextmanager
def prefect_server(home: Home) -> Iterator[str]:
    """Yields the API address of the configured server, or of this home's, which is used until the block ends.

    Sets PREFECT_API_URL and the like for this process, and for Prefect if it is imported. Raises EclectusError when the
    configured server does not answer as a Prefect API that accepts us, or this home's does not start.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    configured = os.environ.get("PREFECT_API_URL")
    if configured:
        folder = home.root / "prefect"
        with _environment(_own_auth(folder, configured)), _read_by_prefect():
            check_configured(configured, folder / AUTH)
            yield configured
        return
    folder = prefect_folder(home)
    address = join(folder)
    over = threading.Event()
    threading.Thread(target=_keep_alive, args=(folder, port_of(address), over), daemon=True).start()
    try:
        with _environment(clients_environment(folder, address)), _read_by_prefect():
            try:
                yield address
            finally:
                _flush_queues()
    finally:
        over.set()
        # Whatever is wrong with the server by now does not change how the run ended; the keeper notices our end.
        with contextlib.suppress(EclectusError, OSError):
            leave(folder)


def join(folder: Path, user: Background | None = None, port: int = 0) -> str:
    """Makes a process (default: this one) a user of the server in `folder`, and returns the API's address.

    Starts the server if none runs, at `port` if that is free. Cheap if it runs. Raises EclectusError if it cannot be
    started, naming its log.
    """
    with server_lock(folder):
        add_user(folder, user or _this_process())
        try:
            return _found(folder) or _started(folder, port)
        except BaseException:
            remove_user(folder, user or _this_process())
            raise


def leave(folder: Path, user: Background | None = None) -> bool:
    """The process uses the server no longer. Ends the server, and returns True, if it was the last to."""
    with server_lock(folder, LEAVE_SECONDS):
        remove_user(folder, user or _this_process())
        noted = read_note(folder)
        if users(folder) or noted is None or not noted.keeper.is_alive():
            return False
        noted.keeper.stop()
        return True


def clients_environment(folder: Path, address: str) -> dict[str, str]:
    """Environment of whatever talks to the server: this process, its children, workers, Ray."""
    around = {
        name: ",".join(filter(None, [os.environ.get(name), "127.0.0.1,localhost"])) for name in ("NO_PROXY", "no_proxy")
    }
    return around | {
        "PREFECT_HOME": str(folder),
        "PREFECT_API_URL": address,
        "PREFECT_API_AUTH_STRING": auth_string(folder),
    }


def server_environment(folder: Path, address: str) -> dict[str, str]:
    """Environment of `eclectus up`'s services: the clients' with what keeps them quiet."""
    return QUIET | clients_environment(folder, address)


def login_address(folder: Path, address: str) -> str:
    """Where a browser is logged in and shown the UI."""
    return f"{address.removesuffix('/api')}{LOGIN}#{auth_string(folder)}"


def auth_string(folder: Path) -> str:
    """USER:PASSWORD of the server, made when first asked for and kept in a file that only its owner can read.

    All who ask get the same, also when several ask first at once.
    """
    if kept := _kept_auth(folder / AUTH):
        return kept
    lock = folder / AUTH_LOCK
    with waited_lock(lock, LEAVE_SECONDS, lambda holder: f"process {holder} holds {lock}; end it and try again"):
        return _kept_auth(folder / AUTH) or _new_auth(folder / AUTH)


def _kept_auth(path: Path) -> str | None:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        kept = path.read_text().strip()
        if ":" in kept and kept.isprintable():
            if path.stat().st_mode & 0o077:
                path.chmod(0o600)
            return kept
    return None


def _new_auth(path: Path) -> str:
    made = f"eclectus:{secrets.token_urlsafe(24)}"
    try:
        with replacing(path) as temporary:
            temporary.touch(mode=0o600, exist_ok=False)
            temporary.write_text(made + "\n")
    except OSError as error:
        raise EclectusError(f"{path} cannot be written ({error.strerror}); make room or free it") from error
    return made


def prefect_folder(home: Home) -> Path:
    """The home's folder of Prefect and its services, made if there is none."""
    folder = prefect_path(home)
    folder.mkdir(exist_ok=True)
    return folder


def prefect_path(home: Home) -> Path:
    """Where `prefect_folder` is or would be."""
    return home.root / "prefect"


def _found(folder: Path) -> str | None:
    """The address of the running server, when it answers. Call it under the lock."""
    deadline = time.monotonic() + START_SECONDS
    while (noted := read_note(folder)) and noted.keeper.is_alive():
        if is_up(noted.address):
            return noted.address
        if time.monotonic() > deadline:
            raise EclectusError(f"the Prefect server of this home does not answer; its log is {folder / LOG}")
        time.sleep(0.2)
    return None


def _started(folder: Path, port: int) -> str:
    """Starts a keeper and returns the server's address when it answers. Call it under the lock."""
    # Whether it is free the keeper finds out, when a server that a killed one left has ended.
    wanted = kept_port(folder, "server", port)
    keeper = Background.start(
        "the Prefect server",
        [*KEEPER, str(folder), str(wanted), *SERVER],
        os.environ | _server_settings(folder),
        folder / LOG,
    )
    try:
        keeper.wait_until(lambda: bool((noted := read_note(folder)) and noted.keeper.pid == keeper.pid))
    except BaseException:
        keeper.stop()
        raise
    noted = read_note(folder)
    if noted is None:
        raise EclectusError(f"the Prefect server ended as soon as it had started; its log is {folder / LOG}")
    return noted.address


def _server_settings(folder: Path) -> dict[str, str]:
    """Environment of the server. What depends on its port is added when that is known (guarded_server)."""
    settings = QUIET | {
        "PREFECT_HOME": str(folder),
        "PREFECT_SERVER_API_AUTH_STRING": auth_string(folder),
        # In memory, the leases of concurrency slots would be lost when the server is started again: healthy runs
        # would be ended at their next renewal, and slots of dead ones never given back.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    }
    # `python -m eclectus...` finds a bare checkout from every folder.
    root = Path(eclectus.__file__).resolve().parents[1]
    if (root / "prefect.yaml").is_file():
        settings["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    return settings


def _keep_alive(folder: Path, port: int, over: threading.Event) -> None:
    """Starts a keeper at the same port again, if it was killed, until `over`."""
    while not over.wait(WATCH_SECONDS):
        noted = read_note(folder)
        if noted and noted.keeper.is_alive():
            continue
        try:
            with server_lock(folder):
                if not over.is_set() and _found(folder) is None:
                    _started(folder, port)
        except (EclectusError, OSError) as error:
            logging.getLogger("eclectus").warning("the Prefect server is gone: %s", error)
            over.wait(10 * WATCH_SECONDS)


def _this_process() -> Background:
    return Background("eclectus", os.getpid(), start_of(os.getpid()), "")


def _own_auth(folder: Path, configured: str) -> dict[str, str]:
    """The home's own auth string, if its own server is the configured one and no string is."""
    noted = read_note(folder)
    if noted is None or noted.address != configured.rstrip("/") or os.environ.get("PREFECT_API_AUTH_STRING"):
        return {}
    return {"PREFECT_API_AUTH_STRING": auth_string(folder)}


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Sets environment variables for the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _read_by_prefect() -> Iterator[None]:
    """Has Prefect use the environment for the block: it reads it once, when it is imported, which a notebook or an
    earlier run of this process may have done."""
    if "prefect" not in sys.modules:
        yield
        return
    from prefect.context import SettingsContext, get_settings_context
    from prefect.settings import Settings

    with SettingsContext(profile=get_settings_context().profile, settings=Settings()):
        yield


def _flush_queues() -> None:
    """Waits until Prefect's threads have sent their queued logs and events, before the server stops."""
    if "prefect" in sys.modules:
        from prefect._internal.concurrency.services import QueueService
        from prefect.events.worker import EventsWorker
        from prefect.logging.handlers import APILogWorker

        queues: tuple[type[QueueService[Any]], ...] = (APILogWorker, EventsWorker)
        for queue in queues:
            queue.drain_all(timeout=5)
