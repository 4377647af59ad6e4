"""One service under watch: when it is started, and after which pause it is started again."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil

from eclectus.flows.services.background import Background
from eclectus.storage.errors import EclectusError

# A service that lived this long has no more trouble with its start.
SETTLED_SECONDS = 60.0
LONGEST_PAUSE = 60.0
START_SECONDS = 240.0


def pause(failures: int) -> float:
    """Seconds before the next start, after so many failed ones in a row: 1, 2, 4, ... 60."""
    return min(LONGEST_PAUSE, 2.0 ** (failures - 1)) if failures else 0.0


@dataclass
class Service:
    """start: starts it. is_ready: it answers. is_hung: it lives and does nothing. needs: services that come first.

    report: gets a sentence for each thing that happens. process: None before the first start, and between two.
    """

    name: str
    start: Callable[[], Background]
    is_ready: Callable[[], bool]
    report: Callable[[str], None]
    needs: tuple[str, ...] = ()
    is_hung: Callable[[], bool] = lambda: False
    process: Background | None = None
    ready: bool = False
    failures: int = 0
    trouble: str = ""
    _started: float = 0.0
    _next: float = field(default=0.0)

    def look(self, now: float, ready: set[str]) -> None:
        """One look. now: of a clock that nobody sets. ready: names of the services that are."""
        if self.process is not None and self.process.is_alive():
            self._watch(now)
            return
        if self.process is not None:
            self._failed(f"{self.name} ({self.process.pid}) has ended; its log is {self.process.log}", now)
        if now < self._next or not ready.issuperset(self.needs):
            return
        try:
            self.process = self.start()
        except (OSError, EclectusError) as error:
            self._failed(f"{self.name} cannot be started: {error}", now)
            return
        self._started, self.ready = now, False
        self.report(f"{self.name} is started ({self.process.pid})")

    def adopt(self, process: Background, now: float) -> None:
        """Takes over one that an earlier supervisor started."""
        self.process, self._started = process, now

    def at_once(self) -> None:
        """Ends a pause."""
        self._next = 0.0

    def _watch(self, now: float) -> None:
        assert self.process is not None
        lived = now - self._started
        if not self.ready:
            self.ready = self.is_ready()
            if not self.ready and lived > START_SECONDS:
                self.process.stop()
                self._failed(f"{self.name} did not start; its log is {self.process.log}", now)
        elif self.is_hung():
            self.report(f"{self.name} ({self.process.pid}) lives and does nothing; it is killed")
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGKILL)
        if self.ready and lived > SETTLED_SECONDS:
            self.failures = 0
        if self.ready:
            self.trouble = ""

    def _failed(self, what: str, now: float) -> None:
        if self.process is not None:
            end_session(self.process.pid)
        self.process, self.ready = None, False
        self.failures += 1
        self._next = now + pause(self.failures)
        self.trouble = what
        again = f" (failure {self.failures} in a row)" if self.failures > 1 else ""
        self.report(f"{what}; next start in {pause(self.failures):g} s{again}")


def end_session(leader: int) -> None:
    """Kills what a dead leader of a session left in it. Its number is not given to another as long as one lives."""
    if psutil.pid_exists(leader):
        with contextlib.suppress(psutil.Error):
            if psutil.Process(leader).status() != psutil.STATUS_ZOMBIE:
                return
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != leader and os.getsid(process.pid) == leader:
                process.kill()
