"""A training step of ours beside transformers' own Mixtral that trains all its experts, in time and memory.

Each contender has several turns, of which the fastest counts. A step is forward, loss, backward, clipping and AdamW. bf16 autocast on CUDA, fp32 on the CPU; transformers' experts run on `grouped_mm` too.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, MixtralConfig

from models import objectives
from models.experts import set_trainable, split_experts
from models.instances import Batch
from models.optimizer import make_optimizer
from models.train import Plan, autocast

TURNS = 3


def step_times(cuda: bool) -> dict[str, Any]:
    """Milliseconds, peak memory and trained parameters by contender, at SmolLM2's shape on CUDA, a tiny one on a CPU."""
    if cuda:
        shape = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9)
        shape |= dict(num_key_value_heads=3, vocab_size=49152)
        rows, length, experts, steps = 16, 512, 6, 5
    else:
        shape = dict(
            hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4
        )
        shape |= dict(vocab_size=4096)
        rows, length, experts, steps = 2, 256, 6, 2
    contenders = {
        "transformers Mixtral, all trained": lambda: contender("stock", shape, experts),
        "ours, all trained": lambda: contender("all", shape, experts),
        "ours, stage 1": lambda: contender("post_pretrain", shape, experts),
        "ours, stage 2": lambda: contender("review", shape, experts),
    }
    if cuda:
        # With fp32 weights transformers multiplies in fp32 even under autocast: this is it at its best.
        contenders |= {
            "transformers Mixtral, all trained, weights in bf16": lambda: contender("stock", shape, experts, True),
            "ours, stage 1, weights in bf16": lambda: contender("post_pretrain", shape, experts, True),
        }
    measured = {}
    for name, make in contenders.items():
        measured[name] = measure(make, rows, length, steps)
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
    words = ", ".join(f"{name.removesuffix('_size')} {value}" for name, value in shape.items())
    return {"shape": f"{words}, {experts} experts, top-2, batch {rows} x {length}", "rows": measured}


def contender(kind: str, shape: dict[str, int], experts: int, half: bool = False) -> tuple[torch.nn.Module, Any]:
    """(model, objective): the stock Mixtral with everything trained, or ours in a stage; half: weights in bf16."""
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


def measure(make: Callable[[], tuple[torch.nn.Module, Any]], rows: int, length: int, steps: int) -> dict[str, float]:
    """The fastest of some turns, after one that does not count."""
    model, objective = make()
    device = next(model.parameters()).device
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = make_optimizer(named, Plan(0, 1, 1, rows, rows, 1e-4, 0))
    tokens = torch.randint(model.config.vocab_size, (rows, length), device=device)
    languages = torch.randint(2, (rows, length), device=device)
    batch = Batch(tokens, tokens, languages, languages, languages)

    def turn(count: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(count):
            with autocast(device):
                loss, _ = objective(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / count

    turn(1)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    best = min(turn(steps) for _ in range(TURNS))
    memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    trained = sum(parameter.numel() for parameter in named.values())
    return {"ms": 1000 * best, "gib": memory, "trained": trained}
