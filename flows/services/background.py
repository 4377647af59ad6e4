"""Background programs. Each leads its own process group, so that stopping one stops everything it started."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import psutil

from eclectus.storage.errors import EclectusError

START_SECONDS = 240
STOP_SECONDS = 15
LOG_BYTES = 10_000_000


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
    ) -> Background:
        """Starts a program with its output at the end of `log`."""
        with open_log(log) as handle:
            process = subprocess.Popen(
                list(command),
                env=environment,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=handle,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return cls(name, process.pid, start_of(process.pid), str(log))

    def is_alive(self) -> bool:
        return lives(self.pid, self.started)

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
            left = _wait_for(processes, STOP_SECONDS)
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            _wait_for(left, STOP_SECONDS)

    def stop_alone(self, number: int = signal.SIGTERM) -> None:
        """Stops the program and leaves its descendants: this signal, after STOP_SECONDS SIGKILL."""
        for each in (number, signal.SIGKILL):
            if self.is_alive():
                with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                    process = psutil.Process(self.pid)
                    os.kill(self.pid, each)
                    _wait_for([process], STOP_SECONDS)


def _wait_for(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Those that still run after `seconds`. A zombie does not: its parent may be another command, busy with its run."""
    deadline = time.monotonic() + seconds
    while left := [each for each in processes if _runs(each)]:
        if time.monotonic() > deadline:
            break
        psutil.wait_procs(left, 0.1)
    return left


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def open_log(log: Path) -> BinaryIO:
    """Opens a log to write at its end; one over LOG_BYTES becomes `NAME.1` first, and the one before it goes."""
    with contextlib.suppress(OSError):
        if log.stat().st_size > LOG_BYTES:
            os.replace(log, log.with_name(f"{log.name}.1"))
    return open(log, "ab")


def lives(pid: int, started: str) -> bool:
    """Whether a process is still the one of this start (`start_of`), and no zombie."""
    with contextlib.suppress(psutil.Error):
        return start_of(pid) == started and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


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


def die_with(parent: int) -> None:
    """Asks Linux to end this process (SIGTERM) when its parent does, however that ends; elsewhere it is not asked."""
    if sys.platform != "linux":
        return
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
    if os.getppid() != parent:
        raise SystemExit("its parent has ended")
