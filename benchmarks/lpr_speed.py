"""Time and memory of our training step compared with transformers' own Mixtral, which trains all its experts.

    python benchmarks/lpr_speed.py
    python benchmarks/lpr_speed.py --precision stage-1 stage-2 full      float32 beside bfloat16 on a CPU

A step is forward, loss, backward, clipping and AdamW. bf16 autocast on CUDA, fp32 on the CPU; transformers' experts run
on `grouped_mm` too. On CUDA each variant has several turns, of which the fastest counts, and its peak of allocated
memory. On a CPU, which may be shared, the variants take turns by single steps, the fastest counts, in CPU seconds of
one thread; memory is the growth of a separate process from before the model is made to its end.

--precision: at SmolLM2's shape, 3 experts, 2 instances of 512 tokens, the same model steps in turns in float32, in bf16
autocast alone (every weight is cast in every step) and as `training_precision: bfloat16` trains, with frozen weights
held in bf16. CPU seconds of a step, the median and the range of its turns; peak memory of a separate process each.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig

from eclectus.models.losses import objectives
from eclectus.models.mixture.experts import set_trainable, split_experts
from eclectus.models.sharding.slices import in_memory
from eclectus.models.training.instances import Batch
from eclectus.models.training.loop import Plan
from eclectus.models.training.optimizer import make_optimizer
from eclectus.models.training.precision import FrozenWeights, Precision, autocast, keep_routers_fp32

TURNS = 3
CPU_ROUNDS = 8
EXPERTS = 6
STOCK = "transformers Mixtral, all trained"
KINDS = {STOCK: "stock", "ours, all trained": "all", "ours, stage 1": "post_pretrain", "ours, stage 2": "review"}
CUDA_SHAPE = dict(
    hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
    vocab_size=49152
)  # fmt: skip
CPU_SHAPE = dict(
    hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
    vocab_size=4096
)  # fmt: skip
CUDA_BATCH, CPU_BATCH = (16, 512), (2, 256)
STAGES = {"stage-1": "post_pretrain", "stage-2": "review", "full": "full"}
PRECISION_BATCH, PRECISION_EXPERTS = (2, 512), 3
# Precision of the step, and whether frozen weights are held in bf16.
WAYS: dict[str, tuple[Precision, bool]] = {
    "float32": ("float32", False),
    "bf16 autocast alone": ("bfloat16", False),
    "bfloat16": ("bfloat16", True),
}


def step_times(cuda: bool) -> dict[str, Any]:
    """Milliseconds, peak memory and trained parameters by method, at SmolLM2's shape on CUDA, a tiny one on CPU."""
    shape, (rows, length) = (CUDA_SHAPE, CUDA_BATCH) if cuda else (CPU_SHAPE, CPU_BATCH)
    words = ", ".join(f"{name.removesuffix('_size')} {value}" for name, value in shape.items())
    described = f"{words}, {EXPERTS} experts, top-2, batch {rows} x {length}"
    return {"shape": described, "rows": cuda_times() if cuda else cpu_times()}


def cuda_times() -> dict[str, dict[str, float]]:
    contenders = {name: lambda kind=kind: contender(kind, CUDA_SHAPE, EXPERTS) for name, kind in KINDS.items()}
    # With fp32 weights transformers multiplies in fp32 even under autocast: this is it at its best.
    contenders |= {
        f"{STOCK}, weights in bf16": lambda: contender("stock", CUDA_SHAPE, EXPERTS, True),
        "ours, stage 1, weights in bf16": lambda: contender("post_pretrain", CUDA_SHAPE, EXPERTS, True),
    }
    measured = {}
    for name, make in contenders.items():
        measured[name] = measure(make, *CUDA_BATCH, steps=5)
        gc.collect()
        torch.cuda.empty_cache()
    return measured


def cpu_times() -> dict[str, dict[str, float]]:
    torch.set_num_threads(1)
    steps = {name: stepper(*contender(kind, CPU_SHAPE, EXPERTS), *CPU_BATCH) for name, kind in KINDS.items()}
    best = dict.fromkeys(KINDS, float("inf"))
    for _ in range(CPU_ROUNDS):
        for name, (step, _) in steps.items():
            started = time.process_time()
            step()
            best[name] = min(best[name], time.process_time() - started)
    measured = {}
    for name, kind in KINDS.items():
        memory = in_a_process_of_its_own(grown_memory, kind)
        measured[name] = {"ms": 1000 * best[name], "gib": memory / 2**30, "trained": steps[name][1]}
    return measured


def grown_memory(kind: str) -> int:
    """Bytes by which this process's peak of resident memory grows over three steps."""
    torch.set_num_threads(1)
    before = _peak()
    step, _ = stepper(*contender(kind, CPU_SHAPE, EXPERTS), *CPU_BATCH)
    for _ in range(3):
        step()
    return _peak() - before


def _peak() -> int:
    """Peak resident bytes of this process since it began; getrusage would count what its parent had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def contender(kind: str, shape: dict[str, int], experts: int, half: bool = False) -> tuple[torch.nn.Module, Any]:
    """(model, objective): the stock Mixtral with everything trained, or ours in a stage; half: weights in bf16."""
    if kind == "full":
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True)), objectives.next_token()
    config = MixtralConfig(**shape, num_local_experts=experts, num_experts_per_tok=2, tie_word_embeddings=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, experts_implementation="grouped_mm")
    if half:
        model.to(torch.bfloat16)
    if kind == "stock":
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        return model, objectives.post_pretrain(0.01, 2, "paper")
    split_experts(model)
    set_trainable(model, kind)
    if kind == "review":
        return model, objectives.review(1.0, "paper", [0])
    return model, objectives.post_pretrain(0.01, 2, "paper")


def stepper(model: torch.nn.Module, objective: Any, rows: int, length: int) -> tuple[Callable[..., None], int]:
    """(one training step, parameters that it trains); the step takes its precision."""
    device = next(model.parameters()).device
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = make_optimizer(named, Plan(0, 1, 1, rows, rows, 1e-4, 0))
    tokens = torch.randint(model.config.vocab_size, (rows, length), device=device)
    languages = torch.randint(2, (rows, length), device=device)
    batch = Batch(tokens, tokens, languages, languages, languages)

    keep_routers_fp32(model)

    def step(precision: Precision = "auto") -> None:
        with autocast(device, precision):
            loss, _ = objective(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, sum(parameter.numel() for parameter in named.values())


def measure(make: Callable[[], tuple[torch.nn.Module, Any]], rows: int, length: int, steps: int) -> dict[str, float]:
    """On CUDA: the fastest of some turns, after one that does not count, and the peak of allocated memory."""
    step, trained = stepper(*make(), rows, length)

    def turn(count: int) -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(count):
            step()
        torch.cuda.synchronize()
        return (time.perf_counter() - started) / count

    turn(1)
    torch.cuda.reset_peak_memory_stats()
    best = min(turn(steps) for _ in range(TURNS))
    return {"ms": 1000 * best, "gib": torch.cuda.max_memory_allocated() / 2**30, "trained": trained}


def precision_times(stage: str, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of steps of a stage at SmolLM2's shape, by way; one model steps in all ways in turns."""
    torch.set_num_threads(1)
    model, objective = contender(STAGES[stage], CUDA_SHAPE, PRECISION_EXPERTS)
    step, _ = stepper(model, objective, *PRECISION_BATCH)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    step("float32")
    for _ in range(rounds):
        for way in WAYS:
            held = FrozenWeights(model, in_memory(model)) if WAYS[way][1] else None
            started = time.process_time()
            step(WAYS[way][0])
            seconds[way].append(time.process_time() - started)
            if held:
                held.restore()
    return seconds


def precision_memory(stage: str, way: str) -> int:
    """Bytes by which this process's peak of resident memory grows over two steps."""
    torch.set_num_threads(1)
    before = _peak()
    model, objective = contender(STAGES[stage], CUDA_SHAPE, PRECISION_EXPERTS)
    if WAYS[way][1]:
        # Never restored, so that no values are needed.
        FrozenWeights(model, {})
    step, _ = stepper(model, objective, *PRECISION_BATCH)
    for _ in range(2):
        step(WAYS[way][0])
    return _peak() - before


def compare_precisions(stages: list[str], rounds: int, memory: bool) -> None:
    for stage in stages:
        seconds = in_a_process_of_its_own(precision_times, stage, rounds)
        first = statistics.median(seconds["float32"])
        for way, taken in seconds.items():
            middle = statistics.median(taken)
            spread = f"{min(taken):.2f} to {max(taken):.2f}"
            print(f"{stage:<8} {way:<20} {middle:6.2f} CPU s ({spread}; {first / middle:.2f}x)", flush=True)
        for way in WAYS if memory else ():
            grown = in_a_process_of_its_own(precision_memory, stage, way)
            print(f"{stage:<8} {way:<20} {grown / 2**30:6.2f} GiB", flush=True)


def in_a_process_of_its_own(call: Callable[..., Any], *arguments: Any) -> Any:
    with multiprocessing.get_context("spawn").Pool(1) as alone:
        return alone.apply(call, arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", choices=STAGES, help="compare float32 with bfloat16 on a CPU")
    parser.add_argument("--rounds", type=int, default=5, help="of --precision: steps in each way")
    parser.add_argument("--no-memory", action="store_true", help="of --precision: CPU seconds alone")
    chosen = parser.parse_args()
    if chosen.precision:
        compare_precisions(chosen.precision, chosen.rounds, not chosen.no_memory)
        return
    measured = step_times(torch.cuda.is_available())
    print(measured["shape"])
    peer = measured["rows"][STOCK]
    for name, row in measured["rows"].items():
        print(
            f"{name:<52} {row['ms']:8.1f} ms ({row['ms'] / peer['ms']:.2f})   "
            f"{row['gib']:6.3f} GiB ({row['gib'] / peer['gib']:.2f})   "
            f"{row['trained']:,} trained"
        )


if __name__ == "__main__":
    main()
