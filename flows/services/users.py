"""Who uses the Prefect server of a home, and the lock under which it is started, found and ended.

A user is a file `prefect/users/PID-...` with a process's id and start (`start_of`), so that it stops counting however
its process ends, and no step of the clock changes the count. The lock is one on `prefect/server.lock`, which the
system releases when its holder ends in any way.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from eclectus.flows.services.background import Background
from eclectus.flows.services.server_note import identity
from eclectus.storage.atomic_write import write_atomically
from eclectus.storage.errors import EclectusError

LOCK = "server.lock"
# A first start takes 19 s on an idle machine, for migrations of the database.
LOCK_SECONDS = 600.0


def server_lock(folder: Path, seconds: float = LOCK_SECONDS) -> contextlib.AbstractContextManager[None]:
    """Waits for the lock. Raises EclectusError that names its holder after `seconds`, or if it cannot be opened."""

    def refusal(holder: str) -> str:
        return (
            f"process {holder} has been starting or ending the Prefect server of {folder.parent} for over "
            f"{seconds:g} s; end it and try again"
        )

    return waited_lock(folder / LOCK, seconds, refusal)


@contextlib.contextmanager
def waited_lock(path: Path, seconds: float, refusal: Callable[[str], str]) -> Iterator[None]:
    """Waits for a lock on a file in a home's folder, which the system releases when its holder ends in any way.

    Raises EclectusError after `seconds`, with the message that `refusal` makes of the holder's process id.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise EclectusError(f"the home's folder {path.parent} cannot be written ({error.strerror}); free it") from error
    try:
        deadline = time.monotonic() + seconds
        while not _locked(descriptor):
            if time.monotonic() > deadline:
                holder = os.pread(descriptor, 40, 0).decode(errors="replace").strip() or "unknown"
                raise EclectusError(refusal(holder))
            time.sleep(0.05)
        with contextlib.suppress(OSError):
            # Only for the message above: a full disk does no harm.
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def add_user(folder: Path, user: Background) -> None:
    """Marks a process as a user of the server, once. Call it under the lock."""
    if any(_same(user, other) for other in users(folder).values()):
        return
    path = folder / "users" / f"{user.pid}-{secrets.token_hex(4)}"
    try:
        path.parent.mkdir(exist_ok=True)
        row = {"name": user.name, "pid": user.pid, "started": user.started, "folder": identity(folder)}
        write_atomically(path, json.dumps(row))
    except OSError as error:
        raise EclectusError(f"{path} cannot be written ({error.strerror}); make room or free it") from error


def remove_user(folder: Path, user: Background) -> None:
    """Call it under the lock."""
    for path, other in users(folder).items():
        if _same(user, other):
            path.unlink(missing_ok=True)


def users(folder: Path) -> dict[Path, Background]:
    """The living users by file; files of dead ones, and of users of the home that this is a copy of, are removed."""
    living = {}
    for path in sorted((folder / "users").glob("[0-9]*-*")):
        try:
            row = json.loads(path.read_text())
            user = Background(str(row["name"]), int(row["pid"]), str(row["started"]), "")
            here = row["folder"] == identity(folder)
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError):
            here = False
        if here and user.is_alive():
            living[path] = user
        else:
            with contextlib.suppress(OSError):
                path.unlink()
    return living


def _same(one: Background, other: Background) -> bool:
    return (one.pid, one.started) == (other.pid, other.started)
