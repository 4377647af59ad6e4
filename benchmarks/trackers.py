"""What trackers cost a training: windows of one training, in turns with their feeder halted (SIGSTOP) and at work.

    python benchmarks/trackers.py HOME [--trackers tensorboard,wandb,mlflow,trackio] [--pairs 60] [--window 20]

It trains a dense model of 0.4M parameters in this process, with a row of metrics at every tenth step. After --warm
steps, in which the feeder imports its libraries, each pair of windows has one with the feeder halted and one with it at
work, which then also catches up; which comes first alternates. Seconds of a step are means over a window: of this
process's CPU, and of the clock. The ratio is the geometric mean over pairs, with a 95% interval (t). What the process
itself does for trackers is there in both windows, so it is measured apart: seconds of one call. W&B is offline unless
WANDB_MODE says otherwise.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import scipy.stats
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.random_instances import write_random_instances
from eclectus.flows.run import open_run
from eclectus.models.losses.objectives import next_token
from eclectus.models.training.instances import Instances
from eclectus.models.training.loop import Plan, train
from eclectus.storage.artifact import Draft
from eclectus.storage.home import Home
from eclectus.tasks.run import require_run
from eclectus.tasks.settings import Settings
from eclectus.tasks.step import step
from eclectus.tasks.tracking import Trackers, TrackerSettings
from eclectus.tasks.training.run_training import WorkerSettings, run_training

LENGTH, VOCABULARY, BATCH = 128, 2048, 4
SHAPE = dict(hidden_size=64, intermediate_size=172, num_hidden_layers=4, num_attention_heads=4)


class FedSettings(Settings):
    """One training."""

    begun: float = 0.0
    warm: int = 300
    window: int = 20
    pairs: int = 60


class Halts:
    """Halts the feeder of a run in one window of each pair, and keeps the seconds of each window."""

    def __init__(self, settings: FedSettings, feeder: psutil.Process) -> None:
        self._settings, self._feeder, self._done = settings, feeder, 0
        self._before: tuple[float, float] | None = None
        # [pair, halted, (CPU, clock)]
        self.seconds = np.zeros((settings.pairs, 2, 2))

    def step_done(self) -> None:
        """Called after each training step."""
        self._done += 1
        window, rest = divmod(self._done - self._settings.warm, self._settings.window)
        if window < 0 or rest:
            return
        now = time.process_time(), time.monotonic()
        if self._before is not None:
            spent = np.subtract(now, self._before) / self._settings.window
            self.seconds[(window - 1) // 2, _is_halted(window - 1)] = spent
        if window < 2 * self._settings.pairs and _is_halted(window):
            self._feeder.suspend()
        else:
            self._feeder.resume()
        self._before = time.process_time(), time.monotonic()


def _is_halted(window: int) -> int:
    """Halted, fed; fed, halted; ..."""
    return int(window % 4 in (0, 3))


@step(makes="report", version=1)
def train_fed(settings: FedSettings, out: Draft) -> None:
    """Trains, and writes the seconds of each window."""
    folder = out.path / "instances"
    folder.mkdir()
    write_random_instances(folder, 64, LENGTH, VOCABULARY, ["en"])
    run = require_run("train_fed").id
    arguments = {"folder": str(folder), "settings": settings, "run": run}
    halts = run_training(WorkerSettings(training_workers=0), train_here, arguments, "training")
    np.save(out.file("seconds.npy"), halts.seconds)
    feeder = feeder_of(run)
    out.statistics = {"feeder": sum(feeder.cpu_times()[:2])}


def feeder_of(run: str) -> psutil.Process:
    """The process that feeds the trackers of a run."""
    for each in psutil.process_iter(["cmdline"]):
        if f'"{run}"' in " ".join(each.info["cmdline"] or []):
            return each
    raise SystemExit(f"no process feeds the trackers of run {run}; see trackers/ in the home for its log")


def train_here(process: Any, report: Any, folder: str, settings: FedSettings, run: str) -> Halts:
    """The windows of one training."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, **SHAPE))
    halts, steps = Halts(settings, feeder_of(run)), settings.warm + 2 * settings.window * settings.pairs

    def noted(kind: str, **values: Any) -> None:
        report(kind, **values)
        if kind == "progress":
            halts.step_done()

    plan = Plan(0, steps, steps, BATCH, BATCH, 1e-3, 20)
    train(model, Instances(Path(folder)), next_token(), plan, process, Path(folder) / "work", noted)
    return halts


def seconds_of_a_call(calls: int = 20_000) -> float:
    """Of what the trackers' display does after each step while their feeder says nothing."""
    display = Trackers(TrackerSettings(trackers=["tensorboard"]))
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as said, os.fdopen(writing, "wb"):
        display._feeder = SimpleNamespace(stdout=said)  # type: ignore[assignment]
        began = time.perf_counter()
        for _ in range(calls):
            display.step_progressed("training", "steps", 1, 2, "steps")
        return (time.perf_counter() - began) / calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("home")
    parser.add_argument("--trackers", default="tensorboard,wandb,mlflow,trackio")
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--window", type=int, default=20, help="steps (default: 20)")
    parser.add_argument("--warm", type=int, default=300, help="steps before the first window (default: 300)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("WANDB_MODE", "offline")
    with open_run("benchmark", TrackerSettings(trackers=given.trackers.split(",")), Home.open(given.home)):
        settings = FedSettings(begun=time.time(), warm=given.warm, window=given.window, pairs=given.pairs)
        made = train_fed(label="train", settings=settings)
    seconds = np.load(made.file("seconds.npy"))
    logs = np.log(seconds[:, 0] / seconds[:, 1])
    mean, error = logs.mean(0), scipy.stats.t.ppf(0.975, len(logs) - 1) * logs.std(0, ddof=1) / np.sqrt(len(logs))
    print(f"trackers: {given.trackers}; {given.pairs} pairs of {given.window} steps")
    print("| of a step | ms, halted | ms, fed | fed to halted | 95% |\n|---|---|---|---|---|")
    for at, what in enumerate(("CPU", "clock")):
        halted, fed = seconds[:, 1, at].mean() * 1000, seconds[:, 0, at].mean() * 1000
        low, middle, high = np.exp([mean[at] - error[at], mean[at], mean[at] + error[at]])
        print(f"| {what} | {halted:.2f} | {fed:.2f} | {middle:.4f} | {low:.4f} to {high:.4f} |")
    print(f"\nin the training's process: {seconds_of_a_call() * 1e6:.1f} microseconds a step")
    print(f"feeder: {made.statistics['feeder']:.1f} CPU seconds, imports included")


if __name__ == "__main__":
    main()
