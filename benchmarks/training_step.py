"""A training step by one process or two, and its parts: python benchmarks/training_step.py [laptop|30m] [--parts]

Dense models with random weights and instances, batch 4 x 512. By turns: one process of one thread, one of two, and two
DDP processes on gloo with one thread each; the median of the steps on the clock, and their mean in CPU milliseconds of
all processes. --parts: output layer with loss and gradients, and causal attention, each beside torch's own, in CPU
milliseconds of one thread, the fastest of 12.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

LENGTH, BATCH, TURNS = 512, 4, 3
# A step of the larger model takes seconds.
STEPS = {"laptop": 40, "30m": 10}
# Width, feed-forward network, layers, heads, vocabulary.
SHAPES = {"laptop": (64, 172, 4, 4, 4096), "30m": (384, 1024, 8, 6, 16_000)}
WAYS = {"1 process, 1 thread": (1, 1), "1 process, 2 threads": (1, 2), "2 DDP processes": (2, 1)}


def work(name: str, folder: Path) -> None:
    """What a process does: trains, and prints milliseconds on the clock and of its CPU."""
    import torch
    from random_instances import write_random_instances
    from transformers import LlamaConfig, LlamaForCausalLM

    from eclectus.models.losses.objectives import next_token
    from eclectus.models.training.instances import Instances
    from eclectus.models.training.loop import train
    from eclectus.models.training.plan import Plan
    from eclectus.models.training.process import Process

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    width, inner, layers, heads, vocabulary = SHAPES[name]
    process, data = Process.current(), folder / f"data-{process_rank()}"
    data.mkdir()
    write_random_instances(data, BATCH * STEPS[name], LENGTH, vocabulary, ["en"])
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
            num_attention_heads=heads, max_position_embeddings=LENGTH,
        )
    )  # fmt: skip
    marks: list[tuple[float, float]] = []

    def report(kind: str, **_: Any) -> None:
        if kind == "progress":
            marks.append((time.perf_counter(), time.process_time()))

    last = STEPS[name]
    plan = Plan(0, last, last, BATCH, BATCH // process.world, 1e-3, 5, checkpoint_every=last)
    train(model, Instances(data), next_token(), plan, process, folder / "work", report)
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(marks[4:])]
    wall, cpu = statistics.median(each[0] for each in steps), statistics.fmean(each[1] for each in steps)
    print(f"{1000 * wall:.1f} {1000 * cpu:.1f}", flush=True)


def process_rank() -> str:
    return os.environ.get("RANK", "0")


def measure(name: str, processes: int, threads: int) -> tuple[float, float]:
    """(ms on the clock, CPU ms of all processes) of a step."""
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for rank in range(processes):
            own: dict[str, Any] = {"OMP_NUM_THREADS": threads}
            if processes > 1:
                own |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "TORCHELASTIC_RUN_ID": "step"}
                own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29_655}
            environment = {**os.environ, **{key: str(value) for key, value in own.items()}}
            command = [sys.executable, __file__, "--work", name, folder]
            running.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
        said = [process.communicate()[0].split() for process in running]
    return float(said[0][0]), sum(float(each[1]) for each in said)


def fastest(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(12):
        begin = time.process_time()
        call()
        times.append(time.process_time() - begin)
    return 1000 * min(times)


def parts(name: str) -> None:
    import torch
    from torch import nn
    from torch.nn import functional as F

    from eclectus.models.attention.causal_blocks import causal_blocks_forward
    from eclectus.models.losses.token_losses import token_losses

    torch.set_num_threads(1)
    width, _, _, heads, vocabulary = SHAPES[name]
    x = torch.randn(BATCH * LENGTH, width, requires_grad=True)
    head, targets = nn.Linear(width, vocabulary, bias=False), torch.randint(0, vocabulary, (BATCH * LENGTH,))
    ways: dict[str, Callable[[], Any]] = {
        "output layer, plain": lambda: F.cross_entropy(head(x), targets, reduction="sum").backward(),
        "output layer, ours": lambda: token_losses(x, head, targets).total.backward(),
    }
    if hasattr(F, "linear_cross_entropy"):
        options = nn.LinearCrossEntropyOptions()
        ways["output layer, torch's linear_cross_entropy"] = lambda: F.linear_cross_entropy(
            x, head.weight, targets, options=options
        ).backward()
    shape = (BATCH, LENGTH, heads, width // heads)
    q, k, v = (torch.randn(shape).transpose(1, 2).requires_grad_() for _ in range(3))
    ways["attention, torch's"] = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
    ways["attention, ours"] = lambda: causal_blocks_forward(nn.Module(), q, k, v, None)[0].sum().backward()
    print("| part | CPU ms |\n|---|---|")
    for what, call in ways.items():
        print(f"| {what} | {fastest(call):.1f} |", flush=True)


def main(name: str) -> None:
    print("| | ms on the clock | CPU ms |\n|---|---|---|")
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for _ in range(TURNS):
        for way, (processes, threads) in WAYS.items():
            found[way].append(measure(name, processes, threads))
    for way, each in found.items():
        shown = (", ".join(f"{pair[at]:.0f}" for pair in each) for at in (0, 1))
        print(f"| {way} | {' | '.join(shown)} |", flush=True)


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.startswith("--")]
    if "--work" in sys.argv:
        work(words[0], Path(words[1]))
    elif "--parts" in sys.argv:
        parts(words[0] if words else "laptop")
    else:
        main(words[0] if words else "laptop")
