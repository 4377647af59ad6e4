"""What trackers cost a training: blocks of the same training, in turns without trackers and with them.

    python benchmarks/trackers.py HOME [--trackers tensorboard,wandb,mlflow,trackio] [--steps 300] [--blocks 10]

A block is a run of its own, which trains a dense model of 0.4M parameters in this process and logs at every tenth step.
Seconds of a step are medians: of this process's CPU, and of the clock, which on a busy machine says less.
The ratio is of blocks with trackers to their neighbours without. The feeder's own CPU seconds are those of its process
by the end of the training. W&B is offline unless WANDB_MODE says otherwise.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
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
from eclectus.tasks.tracking import TrackerSettings
from eclectus.tasks.training.run_training import WorkerSettings, run_training

LENGTH, VOCABULARY, BATCH = 128, 2048, 4
SHAPE = dict(hidden_size=64, intermediate_size=172, num_hidden_layers=4, num_attention_heads=4)


class BlockSettings(Settings):
    """One block."""

    block: str = ""
    steps: int = 300


@step(makes="report", version=1)
def train_block(settings: BlockSettings, out: Draft) -> None:
    """Trains, and writes the seconds of each step and those of the feeder."""
    folder = out.path / "instances"
    folder.mkdir()
    write_random_instances(folder, 64, LENGTH, VOCABULARY, ["en"])
    arguments = {"folder": str(folder), "steps": settings.steps}
    times = run_training(WorkerSettings(training_workers=0), train_here, arguments, "training")
    np.save(out.file("seconds.npy"), np.diff(times, axis=0))
    run = require_run("train_block").id
    fed = [each for each in psutil.process_iter(["cmdline"]) if f'"{run}"' in " ".join(each.info["cmdline"] or [])]
    out.statistics = {"feeder": sum(sum(each.cpu_times()[:2]) for each in fed)}


def train_here(process: Any, report: Any, folder: str, steps: int) -> list[tuple[float, float]]:
    """(CPU seconds, seconds of the clock) after each step."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, **SHAPE))
    times = []

    def noted(kind: str, **values: Any) -> None:
        report(kind, **values)
        if kind == "progress":
            times.append((time.process_time(), time.monotonic()))

    plan = Plan(0, steps, steps, BATCH, BATCH, 1e-3, 20)
    train(model, Instances(Path(folder)), next_token(), plan, process, Path(folder) / "work", noted)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("home")
    parser.add_argument("--trackers", default="tensorboard,wandb,mlflow,trackio")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--blocks", type=int, default=10)
    given = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("WANDB_MODE", "offline")
    home, seconds, feeders = Home.open(given.home), {}, []
    for block in range(given.blocks):
        kind = given.trackers if block % 2 else "none"
        with open_run("benchmark", TrackerSettings(trackers=kind.split(",")), home):
            settings = BlockSettings(block=f"{block} {time.time()}", steps=given.steps)
            made = train_block(label=f"train {block}", settings=settings)
        seconds.setdefault(kind, []).append(np.load(made.file("seconds.npy")))
        feeders += [made.statistics["feeder"]] * (block % 2)
    print("| trackers | CPU ms a step | ms a step |\n|---|---|---|")
    medians = {kind: np.median(np.concatenate(blocks), axis=0) * 1000 for kind, blocks in seconds.items()}
    for kind, (cpu, wall) in medians.items():
        print(f"| {kind} | {cpu:.2f} | {wall:.2f} |")
    pairs = zip(seconds[given.trackers], seconds["none"], strict=True)
    ratios = np.array([np.median(fed, axis=0) / np.median(free, axis=0) for fed, free in pairs])
    cpu, wall = np.median(ratios, axis=0)
    low, high = ratios[:, 0].min(), ratios[:, 0].max()
    print(f"\nwith to without: CPU {cpu:.4f} ({low:.4f} to {high:.4f} by pair), clock {wall:.4f}")
    print(f"feeder: {statistics.median(feeders):.1f} CPU seconds in a training of {given.steps} steps")


if __name__ == "__main__":
    main()
