"""Programs in the background: each leads a process group of its own, so that ending one ends everything it started."""

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
    """A program started here or by an earlier command. started: when, by the system's clock: numbers of processes are given again."""

    name: str
    pid: int
    started: float
    log: str

    @classmethod
    def start(
        cls,
        name: str,
        words: Sequence[str],
        environment: dict[str, str],
        log: Path,
        folder: Path | None = None,
        dies_with_us: bool = False,
    ) -> Background:
        """Starts a program with its output in `log`. dies_with_us: Linux ends it when this process ends, however that ends."""
        with open(log, "wb") as handle:
            process = subprocess.Popen(
                list(words),
                env=environment,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=handle,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent if dies_with_us and sys.platform == "linux" else None,
            )
        return cls(name, process.pid, psutil.Process(process.pid).create_time(), str(log))

    def is_alive(self) -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            return process.create_time() == self.started and process.status() != psutil.STATUS_ZOMBIE
        return False

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Raises EclectusError, naming the log, when the program ends or time is up before `ready` says so."""
        deadline = time.monotonic() + START_SECONDS
        while not ready():
            if not self.is_alive() or time.monotonic() > deadline:
                raise EclectusError(f"{self.name} did not start; its log is {self.log}")
            time.sleep(0.2)

    def stop(self) -> None:
        """Ends the program, its group and every descendant, gently and then not; nothing happens if it is gone."""
        if not self.is_alive():
            return
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            family = [psutil.Process(self.pid), *psutil.Process(self.pid).children(recursive=True)]
            os.killpg(self.pid, signal.SIGTERM)
            _, left = psutil.wait_procs(family, STOP_SECONDS)
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, STOP_SECONDS)


def free_port(wanted: int = 0) -> int:
    """A free port on loopback: the wanted one if it is free."""
    with socket.socket() as probe:
        # Connections that have ended keep a port for a minute; `up` after `down` shall have the same address.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError:
            return free_port()
        return probe.getsockname()[1]


def _die_with_parent() -> None:
    """Asks Linux to end this process when its parent dies, so that a killed run leaves no server behind."""
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
