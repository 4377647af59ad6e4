"""Trackers of a run: which ones, and the process that feeds them (storage/trackers/feeder.py).

Training waits for none of it: numbers go to the journal as ever, and the process reads them there.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import select
import subprocess
import sys
import time
from typing import Any, Literal, Self

from pydantic import model_validator

from eclectus.storage.artifact import Artifact
from eclectus.storage.errors import EclectusError
from eclectus.storage.trackers.tracker import LOG, NONE, chosen, folder_of
from eclectus.tasks.run import Run, current_run, notify
from eclectus.tasks.settings import RuntimeSetting, Settings

# The library of each.
LIBRARIES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}
PROJECT = "eclectus"
FEEDER = [sys.executable, "-m", "eclectus.storage.trackers"]
# A little longer than the feeder gives its trackers.
LONGEST_WAIT = 60.0


class TrackerSettings(Settings):
    """Where a run's numbers are shown besides its own report."""

    trackers: list[Literal["tensorboard", "wandb", "mlflow", "trackio", "none"]] = RuntimeSetting(
        [],
        description="Trackers that show the run while it works: tensorboard, wandb, mlflow, trackio, or none. Empty: "
        "those of which a variable of their own names a place (TENSORBOARD_LOGGING_DIR, WANDB_PROJECT, WANDB_MODE, "
        "MLFLOW_TRACKING_URI, TRACKIO_PROJECT, TRACKIO_SPACE_ID, TRACKIO_SERVER_URL).",
    )
    tracker_project: str = RuntimeSetting(
        PROJECT,
        description="Project or experiment in the trackers, unless WANDB_PROJECT, MLFLOW_EXPERIMENT_NAME or "
        "TRACKIO_PROJECT names one.",
    )

    @model_validator(mode="after")
    def _check_none(self) -> Self:
        if NONE in self.trackers and len(self.trackers) > 1:
            raise ValueError(f"{NONE} stands alone; take it out, or the others")
        return self

    def check_together(self) -> None:
        super().check_together()
        check_libraries(list(self.trackers))


def check_libraries(names: list[str]) -> None:
    """Raises EclectusError for a tracker whose library is not installed."""
    for name in names:
        if name != NONE and importlib.util.find_spec(LIBRARIES[name]) is None:
            raise EclectusError(f"tracker {name} needs its library; install the extra: pip install 'eclectus[{name}]'")


class Trackers:
    """A display (`eclectus.tasks.run.Display`): starts the feeder with the run's first work, and passes on its words.

    What it is called with it leaves to the journal, which the feeder reads.
    """

    def __init__(self, settings: TrackerSettings) -> None:
        self._names = chosen(settings.trackers, os.environ)
        self._project = settings.tracker_project
        self._feeder: subprocess.Popen[bytes] | None = None
        self._rest = b""

    def step_began(self, label: str) -> None:
        run = current_run()
        if self._names and self._feeder is None and run is not None:
            self._start(run)

    def step_progressed(self, label: str, what: str, done: float, total: float | None, unit: str) -> None:
        self._pass_on(0.0)

    def step_ended(self, label: str, state: str, reason: str, seconds: float, output: Artifact | None) -> None:
        self._pass_on(0.0)

    def notified(self, name: str, text: str) -> None:
        """Nothing."""

    def linked(self, name: str, address: str, what: str) -> None:
        """Nothing."""

    def run_ended(self, run: Run) -> None:
        """Waits until the trackers have what the run journaled."""
        until = time.monotonic() + LONGEST_WAIT
        while self._feeder is not None and time.monotonic() < until:
            self._pass_on(min(1.0, until - time.monotonic()), run)
        if self._feeder is not None:
            run.show(lambda display: display.notified("trackers", "trackers still get numbers in the background"))

    def _start(self, run: Run) -> None:
        asked = {"home": run.home.name, "run": run.id, "trackers": self._names, "project": self._project}
        folder = folder_of(run.home)
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / LOG, "ab") as log:
            self._feeder = subprocess.Popen(
                [*FEEDER, json.dumps(asked)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
            )
        # What was started has left for a process of its own by now, which is no child of this one.
        self._feeder.wait()

    def _pass_on(self, seconds: float, run: Run | None = None) -> None:
        """Shows what the feeder has said; waits at most so long for a word."""
        if self._feeder is None or self._feeder.stdout is None:
            return
        handle = self._feeder.stdout.fileno()
        if not select.select([handle], [], [], seconds)[0]:
            return
        read = os.read(handle, 65536)
        *lines, self._rest = (self._rest + read).split(b"\n")
        for line in lines:
            self._show(json.loads(line), run or current_run())
        if not read:
            self._stop()

    def _show(self, said: dict[str, Any], run: Run | None) -> None:
        if run is None:
            return
        place, text = said.get("place", ""), said["text"]
        if place.startswith("http") and " " not in place:
            run.show(lambda display: display.linked(said["name"], place, "tracker"))
            return
        text = text or f"{said['name']}: {place}"
        if run is current_run():
            notify("trackers", text)
        else:
            run.show(lambda display: display.notified("trackers", text))

    def _stop(self) -> None:
        assert self._feeder is not None
        for stream in (self._feeder.stdin, self._feeder.stdout):
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()
        self._feeder = None
        self._names = []
