"""The keeper of a home's Prefect server: starts it, starts it again when it dies, and ends it with its last user.

    python -m eclectus.flows.services.keeper FOLDER PORT PROGRAM...

A process of its own (20 MB), in a session of its own, so that the server outlives the command that needed it first.
The keeper holds the socket: while the server is started again, connections wait instead of being refused, and nobody
else can take the port. The server dies with the keeper, and both hold a lock on `keeper.lock` by one open file, so
that no second server opens the home's database before the last one has ended. Users: eclectus.flows.services.users.
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
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import psutil

from eclectus.flows.services.background import Background, open_log, start_of
from eclectus.flows.services.ports import listening
from eclectus.flows.services.server_note import NOTE, ServerNote, identity, is_up, read_note
from eclectus.flows.services.users import server_lock, users
from eclectus.storage.errors import EclectusError

LOG = "server.log"
OWNER = "keeper.lock"
LOOK_SECONDS = 0.2
# A command that starts soon after one was killed finds the server still there.
GRACE_SECONDS = 3.0
FIRST_STARTS = 3
LONGEST_PAUSE = 10.0
END_SECONDS = 10.0
# A server that has answered before and then does not for so long is killed and started again.
SILENT_SECONDS = 120.0
CHECK_SECONDS = 10.0


class Keeper:
    """Starts, watches and ends one server at one listening socket. The process works in the home's prefect folder."""

    def __init__(self, port: int, program: Sequence[str], owner: BinaryIO) -> None:
        """program: words that start the server. owner: the open file with the lock, which the server inherits."""
        self.folder, self.program, self.owner = Path(), program, owner
        self.listener = listening(port)
        self.port = int(self.listener.getsockname()[1])
        self.me = Background("the keeper", os.getpid(), start_of(os.getpid()), LOG)
        self.server: subprocess.Popen[bytes] | None = None
        self.asked = False
        self.noted = False
        self.starts, self.started = 0, time.monotonic()

    def keep(self) -> int:
        """Returns an exit code when the server may end: 0, or 1 if it never answered."""
        used = time.monotonic()
        while not self.asked:
            if self.server is None or self.server.poll() is not None:
                if not self.noted and self.starts >= FIRST_STARTS:
                    return 1
                self._start_when_due()
            if users(self.folder):
                used = time.monotonic()
            elif time.monotonic() - used > GRACE_SECONDS and self._ended_unused():
                return 0
            time.sleep(LOOK_SECONDS)
        return 0

    def end(self) -> None:
        """Ends the server: SIGTERM, after END_SECONDS SIGKILL. Its note goes first, so that nobody finds it then."""
        noted = read_note(self.folder)
        if noted and noted.keeper == self.me:
            (self.folder / NOTE).unlink(missing_ok=True)
        self.listener.close()
        if self.server is None or self.server.poll() is not None:
            return
        self.server.terminate()
        try:
            self.server.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self.server.kill()
            self.server.wait()

    def _start_when_due(self) -> None:
        """Starts the server: at once, then after longer and longer pauses, until it has lived for a minute."""
        lived = time.monotonic() - self.started
        if lived > 60:
            self.starts = 0
        if self.starts and lived < min(LONGEST_PAUSE, 0.25 * 2**self.starts):
            return
        self.starts, self.started = self.starts + 1, time.monotonic()
        # The words of Prefect's own command say to readers of process lists what this is.
        command = [
            *self.program, "prefect server start",
            f"--port={self.port}", f"--fd={self.listener.fileno()}", f"--keeper={os.getpid()}",
        ]  # fmt: skip
        try:
            with open_log(self.folder / LOG) as log:
                self.server = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                    pass_fds=(self.listener.fileno(), self.owner.fileno()),
                )  # fmt: skip
        except OSError as error:
            print(f"eclectus: the Prefect server cannot be started: {error}", flush=True)
            return
        threading.Thread(target=self._watch, args=(self.server,), daemon=True).start()

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        """Writes the note as soon as this start of the server answers, and kills the server if it falls silent."""
        address = f"http://127.0.0.1:{self.port}/api"
        while process.poll() is None and not is_up(address):
            time.sleep(0.2)
        if process.poll() is not None:
            return
        with contextlib.suppress(OSError, psutil.NoSuchProcess):
            server = Background("the Prefect server", process.pid, start_of(process.pid), LOG)
            # On a full disk the note of the start before stays: the address and the keeper are the same.
            ServerNote(address, server, self.me, identity(self.folder)).write(self.folder)
            self.noted = True
        if not self.noted:
            # Nobody would find this server; the disk may be full.
            process.kill()
        heard = time.monotonic()
        while process.poll() is None:
            if is_up(address, CHECK_SECONDS):
                heard = time.monotonic()
            elif time.monotonic() - heard > SILENT_SECONDS:
                process.kill()
            time.sleep(CHECK_SECONDS)

    def _ended_unused(self) -> bool:
        """Ends the server if nobody uses it; False if somebody does, or is about to, by now."""
        if os.stat(self.folder).st_nlink == 0:
            return True  # The home was deleted.
        try:
            with server_lock(self.folder, seconds=0):
                if users(self.folder):
                    return False
                self.end()
                return True
        except EclectusError:
            return False


def owned(owner: BinaryIO) -> bool:
    """Takes the lock; a server that a killed keeper left is given END_SECONDS to end, and is then killed."""
    for last in (False, True):
        deadline = time.monotonic() + END_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            time.sleep(0.1)
        noted = read_note(Path())
        if not last and noted and noted.server.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(noted.server.pid, signal.SIGKILL)
    return False


def main(words: Sequence[str]) -> int:
    """Keeps the server until SIGTERM, or until nobody uses it. Returns the exit code."""
    os.chdir(words[0])
    with open(OWNER, "ab") as owner:
        if not owned(owner):
            print("eclectus: the last Prefect server of this home does not end", flush=True)
            return 1
        keeper = Keeper(int(words[1]), words[2:], owner)

        def ask(number: int, frame: object) -> None:
            keeper.asked = True

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, ask)
        try:
            return keeper.keep()
        finally:
            keeper.end()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
