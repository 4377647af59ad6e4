"""Background programs. Each leads its own process group, so that stopping one stops everything it started."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from eclectus.storage.errors import EclectusError

START_SECONDS = 240
STOP_SECONDS = 15


@dataclass(frozen=True)
class Background:
    """A program started here or by an earlier command.

    started: identity of this start (`start_of`); process ids are reused, so an id alone does not identify it.
    """

    name: str
    pid: int
    started: str
    log: str

    @classmethod
    def start(
        cls,
        name: str,
        command: Sequence[str],
        environment: dict[str, str],
        log: Path,
        folder: Path | None = None,
        dies_with_us: bool = False,
    ) -> Background:
        """Starts a program with its output in `log`. dies_with_us: on Linux, it is stopped when this process ends."""
        with open(log, "wb") as handle:
            process = subprocess.Popen(
                list(command),
                env=environment,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=handle,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent if dies_with_us and sys.platform == "linux" else None,
            )
        return cls(name, process.pid, start_of(process.pid), str(log))

    def is_alive(self) -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            return start_of(self.pid) == self.started and psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE
        return False

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Waits until `ready()`. Raises EclectusError naming the log if it ends or START_SECONDS pass first."""
        deadline = time.monotonic() + START_SECONDS
        while not ready():
            if not self.is_alive() or time.monotonic() > deadline:
                raise EclectusError(f"{self.name} did not start; its log is {self.log}")
            time.sleep(0.2)

    def stop(self) -> None:
        """Stops the program, its process group and all descendants: SIGTERM, after STOP_SECONDS SIGKILL."""
        if not self.is_alive():
            return
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            processes = [psutil.Process(self.pid), *psutil.Process(self.pid).children(recursive=True)]
            os.killpg(self.pid, signal.SIGTERM)
            _, left = psutil.wait_procs(processes, STOP_SECONDS)
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, STOP_SECONDS)


def start_of(pid: int) -> str:
    """What tells a process from every other that ever had its id, whatever the clock does meanwhile.

    On Linux the boot and the tick after it at which the process started; elsewhere the time. Raises
    psutil.NoSuchProcess.
    """
    if sys.platform != "linux":
        return str(psutil.Process(pid).create_time())
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # Fields after the name, which may itself hold blanks and parentheses; the tick is field 22 of proc(5).
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError as error:
        raise psutil.NoSuchProcess(pid) from error
    return f"{boot} {fields[19]}"


def free_port(wanted: int = 0) -> int:
    """A free port on loopback: `wanted` if it is free."""
    with socket.socket() as probe:
        # Closed connections hold a port for a minute; without this, `up` after `down` would get another address.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError:
            return free_port()
        return probe.getsockname()[1]


def _die_with_parent() -> None:
    """Asks Linux to stop this process when its parent dies, so that a killed run leaves no server running."""
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
