"""Training steps on one GPU: time, MFU and memory by model, and that the GPU computes what the CPU does.

    python benchmarks/gpu.py [--out gpu.md] [--minutes 8] [--only lory ...]
    python benchmarks/gpu.py --device cpu --size tiny                       (to see that it works, in half a minute)

Needs PyTorch and transformers alone, no installation of this repository, no file. Models have random weights and read
random tokens, through the training loop itself (models/training/loop.py: bf16 autocast, AdamW, clipping). Steps are
timed by the window of WINDOW steps after as many to warm up; memory is the most that PyTorch had allocated.

    dense           a Llama of Lory's 0.3B shape
    lory E 8, 32    the same with E experts per layer, segments of 256 tokens
    stage 1, 2      a mixture of 6 such FFNs, top 2: new experts and routers train, then routers alone
    Mixtral         transformers' own of the same shape in a plain loop: experts and routers train, all of them

Equality: small models of each kind, a training step's loss and gradients on the device against the CPU, both in
float32 without TF32 and both in bfloat16 (norm of the difference over the norm of the gradient; a token near the border
between two experts may go to the other one). The tables are written after every row, so a run that is stopped leaves
what it had; a row that does not fit in memory says so.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from random_instances import write_random_instances
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from eclectus.models.lory.config import LoryConfig
from eclectus.models.lory.model import LoryForCausalLM
from eclectus.models.losses import objectives
from eclectus.models.losses.step import Objective, Step
from eclectus.models.mixture.experts import set_trainable, split_experts
from eclectus.models.training.instances import Batch, Instances
from eclectus.models.training.loop import train
from eclectus.models.training.plan import Plan
from eclectus.models.training.precision import autocast, keep_routers_fp32
from eclectus.models.training.process import Process
from eclectus.models.training.throughput import flops_per_token, peak_flops

WINDOW = 6
SIZES: dict[str, dict[str, int]] = {
    "0.3B": {
        "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 16,
        "num_key_value_heads": 16, "vocab_size": 32_000, "max_position_embeddings": 2048,
        "batch": 8, "micro_batch": 8, "segment": 256,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "vocab_size": 512, "max_position_embeddings": 128,
        "batch": 4, "micro_batch": 2, "segment": 32,
    },
}  # fmt: skip
EQUAL = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Allowed norm of the difference of all gradients, over their norm."""
Made = tuple[Any, Objective]


def shape(size: dict[str, int]) -> dict[str, int]:
    return {name: value for name, value in size.items() if name not in ("batch", "micro_batch", "segment")}


def dense(size: dict[str, int]) -> Made:
    return LlamaForCausalLM(LlamaConfig(**shape(size))), objectives.next_token()


def lory(experts: int) -> Callable[[dict[str, int]], Made]:
    def make(size: dict[str, int]) -> Made:
        config = LoryConfig(**shape(size), num_experts=experts, segment_length=size["segment"])
        return LoryForCausalLM(config), objectives.lory()

    return make


def mixtral(size: dict[str, int]) -> Made:
    model = MixtralForCausalLM(MixtralConfig(**shape(size), num_local_experts=6, num_experts_per_tok=2))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".experts." in name or ".gate." in name)
    return model, objectives.balanced()


def stage(number: int) -> Callable[[dict[str, int]], Made]:
    def make(size: dict[str, int]) -> Made:
        model = split_experts(mixtral(size)[0])
        set_trainable(model, "post_pretrain" if number == 1 else "review")
        return model, objectives.post_pretrain(0.01, 2, "paper") if number == 1 else objectives.review(
            0.1, "paper", [0]
        )

    return make


ROWS: dict[str, Callable[[dict[str, int]], Made]] = {
    "dense": dense, "lory E 8": lory(8), "lory E 32": lory(32), "stage 1": stage(1), "stage 2": stage(2),
    "transformers' Mixtral": mixtral,
}  # fmt: skip


def our_steps(model: Any, objective: Objective, size: dict[str, int], process: Process, place: Path) -> float:
    """Tokens per second of the training loop."""
    found: dict[str, float] = {}

    def report(kind: str, **values: Any) -> None:
        if kind == "metrics":
            found.update(values["values"])

    plan = Plan(0, 2 * WINDOW, 2 * WINDOW, size["batch"], size["micro_batch"], 1e-4, 2, log_every=WINDOW)
    length, vocabulary = size["max_position_embeddings"], size["vocab_size"]
    write_random_instances(place, 4 * size["batch"], length, vocabulary, ["en", "el"])
    train(model, Instances(place), objective, plan, process, place, report)
    return found["tokens_per_second"]


def their_steps(model: Any, size: dict[str, int], process: Process) -> float:
    """Tokens per second of transformers' model in a plain loop: its own loss, autocast, fused AdamW."""
    trained = [parameter for parameter in model.to(process.device).train().parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-4, fused=True)
    begun, tokens = 0.0, size["batch"] * size["max_position_embeddings"]
    for step in range(2 * WINDOW):
        if step == WINDOW:
            wait(process.device)
            begun = time.perf_counter()
        for _ in range(size["batch"] // size["micro_batch"]):
            ids = torch.randint(size["vocab_size"], (size["micro_batch"], size["max_position_embeddings"]))
            ids = ids.to(process.device)
            with autocast(process.device):
                loss = model(input_ids=ids, labels=ids, output_router_logits=True, use_cache=False).loss
            (loss * size["micro_batch"] / size["batch"]).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    wait(process.device)
    return WINDOW * tokens / (time.perf_counter() - begun)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(name: str, size: dict[str, int], process: Process) -> str:
    """A row of the table."""
    device = process.device
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    torch.manual_seed(0)
    try:
        with torch.device(device):
            model, objective = ROWS[name](size)
        count = sum(parameter.numel() for parameter in model.parameters())
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        per_token = flops_per_token(model, size["max_position_embeddings"])
        with tempfile.TemporaryDirectory() as place:
            theirs = name == "transformers' Mixtral"
            speed = their_steps(model, size, process) if theirs else our_steps(
                model, objective, size, process, Path(place)
            )  # fmt: skip
    except torch.OutOfMemoryError:
        return f"| {name} | does not fit in memory | | | | |"
    step = size["batch"] * size["max_position_embeddings"] / speed
    memory = f"{torch.cuda.max_memory_allocated(device) / 1e9:.1f}" if device.type == "cuda" else "-"
    mfu = speed * per_token / peak_flops(device)
    return f"| {name} | {count / 1e6:,.4g} | {trained / 1e6:,.4g} | {1e3 * step:,.0f} | {mfu:.1%} | {memory} |"


def gradients(name: str, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Gradients of one step of a small model, and its loss, on the CPU in fp32."""
    size = SIZES["tiny"]
    torch.manual_seed(0)
    model, objective = ROWS[name](size)
    model.to(device).train()
    keep_routers_fp32(model)
    ids = torch.randint(size["vocab_size"], (2, size["max_position_embeddings"]))
    languages = (torch.arange(ids.shape[1]) % 2).expand(2, -1).contiguous()
    step = Step(objective, [Batch(ids, ids, languages, torch.zeros_like(ids), languages)], Process(device=device))
    with autocast(device, "bfloat16" if dtype == torch.bfloat16 else "float32"):
        loss, _ = step.measure(model, 0)
    loss.backward()
    found = {each: p.grad.float().cpu() for each, p in model.named_parameters() if p.grad is not None}
    return {**found, "loss": loss.detach().float().cpu()}


def compared(name: str, device: torch.device) -> Iterator[str]:
    """Rows of the table of differences."""
    for dtype, allowed in EQUAL.items():
        expected, found = (gradients(name, each, dtype) for each in (torch.device("cpu"), device))
        loss = float((found.pop("loss") - expected.pop("loss")).abs())
        apart = sum(float((found[each] - expected[each]).double().square().sum()) for each in expected)
        worst = (apart / sum(float(each.double().square().sum()) for each in expected.values())) ** 0.5
        verdict = "equal" if worst <= allowed and found.keys() == expected.keys() else "DIFFERS"
        yield f"| {name} | {str(dtype).removeprefix('torch.')} | {loss:.1e} | {worst:.1e} | {allowed:g} | {verdict} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu.md"), help="the tables, Markdown")
    parser.add_argument("--minutes", type=float, default=8.0, help="no row begins after this")
    parser.add_argument("--only", nargs="*", choices=list(ROWS), default=list(ROWS), help="these rows")
    parser.add_argument("--size", choices=list(SIZES), default="0.3B")
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    chosen = parser.parse_args()
    if chosen.device == "cuda" and not torch.cuda.is_available():
        sys.exit("PyTorch finds no GPU here; --device cpu --size tiny shows that the benchmark works")
    device = torch.device(chosen.device, 0) if chosen.device == "cuda" else torch.device("cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    size, begun = SIZES[chosen.size], time.monotonic()
    lines = [f"{what}, torch {torch.__version__}, transformers {transformers.__version__}, "
             f"{size['batch']} x {size['max_position_embeddings']} tokens a step, "
             f"{time.strftime('%Y-%m-%d', time.gmtime())}"]  # fmt: skip

    def show(rows: Iterator[str] | list[str]) -> None:
        for row in rows:
            lines.append(row)
            print(row, flush=True)
            chosen.out.write_text("\n".join(lines) + "\n", "utf-8")

    def early(name: str) -> bool:
        if time.monotonic() - begun < 60 * chosen.minutes:
            return True
        show([f"| {name} | not run: {chosen.minutes:g} minutes are over | | | | |"])
        return False

    show(["", "| a step | CPU and device in | loss | gradients | allowed | |", "|---|---|---|---|---|---|"])
    for name in chosen.only:
        if early(name):
            show(compared(name, device))
    show(["", "| | parameters, M | trained, M | ms a step | MFU | memory, GB |", "|---|---|---|---|---|---|"])
    for name in chosen.only:
        if early(name):
            show([timed(name, size, Process(device=device))])
    if any("DIFFERS" in line for line in lines):
        sys.exit(1)


if __name__ == "__main__":
    main()
