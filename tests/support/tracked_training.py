"""A run with a made-up training, as a program: it logs, may be killed, and resumes where it was.

python -m tests.support.tracked_training HOME STEPS [--killed-at N] [--wait SECONDS] [--trackers A,B]
"""

import argparse
import os
import signal
import time
from pathlib import Path

import psutil
from pydantic import Field

from eclectus.flows.run import open_run
from eclectus.storage.artifact import Draft
from eclectus.storage.home import Home
from eclectus.tasks.run import metric, progress, require_run
from eclectus.tasks.settings import RuntimeSetting, Settings
from eclectus.tasks.step import step
from eclectus.tasks.tracking import TrackerSettings
from tests.support.displays import NullDisplay


class TrainSettings(Settings):
    """A training of so many steps; a checkpoint at every 20th."""

    steps: int = Field(60, description="Steps.")
    killed_at: int = RuntimeSetting(0, description="Step at which the process is killed.")
    wait: float = RuntimeSetting(0.0, description="Seconds between two numbers.")


@step(makes="report", version=1)
def train(settings: TrainSettings, out: Draft) -> None:
    """Logs a loss at every tenth step."""
    kept = require_run("train").home.work / "kept"
    begin = int(kept.read_text()) if kept.exists() else 0
    told = progress(settings.steps, "training", "steps")
    for at in range(begin + 10, settings.steps + 1, 10):
        time.sleep(settings.wait)
        metric("loss", 3 - at / 100, at)
        told(at)
        if at == settings.killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if at % 20 == 0:
            kept.write_text(str(at))
    metric("seconds", 1.5)
    out.file("children").write_text(str(len(psutil.Process().children(recursive=True))))


class Printed(NullDisplay):
    """Prints what a run says."""

    def step_ended(self, label, state, reason, seconds, output):
        print("children:", output.file("children").read_text(), flush=True)

    def notified(self, name, text):
        print(f"{name}: {text}", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("home", type=Path)
    parser.add_argument("steps", type=int)
    parser.add_argument("--killed-at", type=int, default=0)
    parser.add_argument("--wait", type=float, default=0.0)
    parser.add_argument("--trackers", default="")
    given = parser.parse_args()
    parameters = TrackerSettings(trackers=[name for name in given.trackers.split(",") if name])
    with open_run("test", parameters, Home.open(given.home), [Printed()]):
        train(label="train lory", settings=TrainSettings(steps=given.steps, killed_at=given.killed_at, wait=given.wait))


if __name__ == "__main__":
    main()
