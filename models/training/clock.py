"""Seconds that a training took, over all its processes and restarts.

    training_seconds   on the clock, of rank 0
    cpu_seconds        of CPU cores, summed over processes and their threads: comparable between models however many
                       cores each had
    gpu_seconds        seconds on the clock times GPUs; only on GPUs

What was spent before a restart is read from files under the training's `work` folder, one by rank, which are written
with every row of metrics; steps that a restart repeats count twice, because they were computed twice. After a restart
with fewer processes rank 0 adds what the others had spent.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from eclectus.models.staged_folder import replacing
from eclectus.models.training.process import Process


class TrainingClock:
    """Measures from its construction to `read`; `report` goes to the training loop in place of the given function."""

    def __init__(self, report: Callable[..., None], process: Process, work: Path) -> None:
        self._report, self._process = report, process
        self._path = work / f"seconds-{process.rank}.json"
        self._before = _stored(self._path)
        self._begun = time.monotonic(), time.process_time()

    def report(self, kind: str, **values: Any) -> None:
        """As the given function, and stores the seconds so far with every row of metrics."""
        self._report(kind, **values)
        if kind == "metrics":
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self._path) as partial:
                partial.write_text(json.dumps(self._now()))

    def read(self) -> dict[str, float]:
        """The seconds so far. All processes must call it."""
        own = self._now()
        spent = self._process.gather(own)
        if self._process.is_main:
            known = self._path.parent.glob("seconds-*.json")
            left = [path for path in known if int(path.stem.rpartition("-")[2]) >= self._process.world]
            spent += [_stored(path) for path in left]
        wall, cpu = (sum(each) for each in zip(*spent, strict=True))
        seconds = {"training_seconds": round(own[0], 2), "cpu_seconds": round(cpu, 2)}
        if self._process.device.type == "cuda":
            seconds["gpu_seconds"] = round(wall, 2)
        return seconds

    def _now(self) -> list[float]:
        now = time.monotonic(), time.process_time()
        return [old + end - begin for old, end, begin in zip(self._before, now, self._begun, strict=True)]


def _stored(path: Path) -> list[float]:
    """[seconds on the clock, of CPU cores] before a restart."""
    return json.loads(path.read_text()) if path.is_file() else [0.0, 0.0]
