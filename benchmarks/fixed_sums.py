"""What sums in a fixed order (`training_fixed_sums`) cost against DDP, in step time, in the same processes in one run.

    torchrun --nproc-per-node=2 benchmarks/fixed_sums.py [laptop] [30m] [--micro-batches 2] [--steps 12] [--turns 4]

A dense model of a preset trains on random tokens, micro-batches of 2 instances of 256, so many in each process. DDP and
the fixed order take turns, in the opposite order every second time. Printed: the median step of each over all turns,
and their ratio; on the clock, and in CPU seconds of rank 0, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from random_instances import write_random_instances
from transformers import LlamaConfig, LlamaForCausalLM

from eclectus.models.lory.config import PRESETS
from eclectus.models.losses.objectives import next_token
from eclectus.models.training.instances import Instances
from eclectus.models.training.loop import Plan, train
from eclectus.models.training.process import Process

LENGTH, VOCABULARY, MICRO_BATCH = 256, 4096, 2


def steps_of(preset: str, plan: Plan, data: Instances, process: Process, work: Path) -> list[tuple[float, float]]:
    """(seconds on the clock, of CPU) of each step but the first two."""
    torch.manual_seed(0)
    shape = {name: value for name, value in PRESETS[preset].items() if hasattr(LlamaConfig(), name)}
    config = LlamaConfig(**{**shape, "vocab_size": VOCABULARY, "max_position_embeddings": LENGTH})
    ended: list[tuple[float, float]] = []

    def report(kind: str, **values: Any) -> None:
        if kind == "progress":
            ended.append((time.perf_counter(), time.process_time()))

    train(LlamaForCausalLM(config), data, next_token(), plan, process, work, report)
    pairs = itertools.pairwise(ended[1:])
    return [(after[0] - before[0], after[1] - before[1]) for before, after in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", help=", ".join(PRESETS))
    parser.add_argument("--micro-batches", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--turns", type=int, default=4)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    process = Process.current()
    batch = MICRO_BATCH * asked.micro_batches * process.world
    with tempfile.TemporaryDirectory() as folder:
        write_random_instances(Path(folder), 64, LENGTH, VOCABULARY, ["en"])
        data = Instances(folder)
        for preset in asked.presets or ["laptop", "30m"]:
            found: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
            for turn in range(asked.turns):
                for fixed in (False, True) if turn % 2 else (True, False):
                    plan = Plan(
                        start=0, stop=asked.steps, total=asked.steps, batch=batch, micro_batch=MICRO_BATCH,
                        learning_rate=1e-3, warmup=2, fixed_sums=fixed,
                    )  # fmt: skip
                    found[fixed] += steps_of(preset, plan, data, process, Path(folder) / "work")
            if not process.is_main:
                continue
            for at, what in enumerate(("clock", "CPU of rank 0")):
                ddp, fixed_ = (statistics.median(step[at] for step in found[fixed]) for fixed in (False, True))
                print(
                    f"{preset:7} {process.world} processes, {asked.micro_batches} micro-batches each, {what}: "
                    f"DDP {1000 * ddp:.0f} ms, fixed order {1000 * fixed_:.0f} ms, ratio {fixed_ / ddp:.3f}; "
                    f"load {os.getloadavg()[0]:.1f}"
                )
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
