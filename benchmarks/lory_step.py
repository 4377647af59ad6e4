"""A Lory training step compared with its dense twin's, and our merge with the direct one, measured in one run.

    python benchmarks/lory_step.py                                   tiny and mid sizes, CPU (and CUDA if available)
    python benchmarks/lory_step.py --hidden 1024 --ffn 2816 --layers 4 --length 4096 --batch 4 --device cuda

Twin: a stock LlamaForCausalLM of the same shape. A step is forward, loss and backward; the optimizer, whose cost
is proportional to the parameters (E times the FFN's), is timed separately. The variants take turns, so that a busy
machine slows all of them; the fastest turn of each counts (of its CPU seconds with --cpu-seconds). Memory is the peak
of what a step allocates on top of model and inputs, from the CUDA allocator or the CPU profiler. CUDA runs in bf16
autocast, the CPU in fp32.
"""

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "5")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from eclectus.models import LoryConfig, LoryForCausalLM
from eclectus.models.lory.merge import merged_ffn, reference_merged_ffn

SIZES = {
    "tiny": dict(hidden=64, ffn=172, layers=4, heads=4, segment=64, length=512, batch=16, vocab=4096),
    "mid": dict(hidden=256, ffn=688, layers=4, heads=4, segment=256, length=1024, batch=4, vocab=8192),
}


def build(size: argparse.Namespace, kind: str, experts: int) -> torch.nn.Module:
    """The dense twin ("dense") or the Lory model ("lory") of a size."""
    shape = dict(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=size.ffn,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=size.length,
        tie_word_embeddings=True,
        use_cache=False,
    )
    torch.manual_seed(0)
    if kind == "dense":
        return LlamaForCausalLM(LlamaConfig(**shape)).to(size.device)
    config = LoryConfig(**shape, num_experts=experts, segment_length=size.segment, router_initializer_range=0.3)
    return LoryForCausalLM(config).to(size.device)


def model_step(model: torch.nn.Module, size: argparse.Namespace) -> Callable[[], None]:
    """One forward and backward pass on fixed random tokens."""
    tokens = torch.randint(size.vocab, (size.batch, size.length), device=size.device)

    def step() -> None:
        with torch.autocast(size.device, dtype=torch.bfloat16, enabled=size.device == "cuda"):
            loss = model(tokens, labels=tokens).loss
        loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def merge_step(size: argparse.Namespace, merge: Callable) -> Callable[[], None]:
    """One forward and backward pass of one layer's merged FFN."""
    dtype = torch.bfloat16 if size.device == "cuda" else torch.float32
    segments = size.batch * size.length // size.segment
    make = dict(device=size.device, dtype=dtype)
    x = torch.randn(segments, size.segment, size.hidden, **make).requires_grad_()
    weights = torch.randn(segments, size.experts, **make).softmax(-1).requires_grad_()
    experts = (torch.randn(size.experts, 3 * size.ffn, size.hidden, **make) * 0.05).requires_grad_()
    gradient = torch.randn_like(x)
    return lambda: torch.autograd.grad(merge(x, weights, experts), (x, weights, experts), gradient)


def dense_ffn_step(size: argparse.Namespace) -> Callable[[], None]:
    """One forward and backward pass of the stock FFN on as many tokens."""
    dtype = torch.bfloat16 if size.device == "cuda" else torch.float32
    ffn = build(argparse.Namespace(**{**vars(size), "layers": 1}), "dense", 1).model.layers[0].mlp.to(dtype)
    x = torch.randn(size.batch, size.length, size.hidden, device=size.device, dtype=dtype, requires_grad=True)
    gradient = torch.randn_like(x)
    return lambda: torch.autograd.grad(ffn(x), (x, *ffn.parameters()), gradient)


def optimizer_step(model: torch.nn.Module) -> Callable[[], None]:
    """One fused AdamW step with gradients in place."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True).step


def fastest(steps: dict[str, Callable[[], None]], device: str, turns: int, cpu_seconds: bool) -> dict[str, float]:
    """Seconds of each variant's fastest turn, after two turns of warm-up."""
    clock, best = time.process_time if cpu_seconds else time.perf_counter, dict.fromkeys(steps, float("inf"))
    for turn in range(turns + 2):
        for name, step in steps.items():
            if device == "cuda":
                torch.cuda.synchronize()
            begin = clock()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn >= 2:
                best[name] = min(best[name], clock() - begin)
    return best


def peak_bytes(step: Callable[[], None], device: str) -> int:
    """Memory that a step allocates in addition to what is in use before it."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    allocations, pending = [], list(profiler.profiler.kineto_results.experimental_event_tree())
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        if event.tag.name == "Allocation":
            allocations.append((event.start_time_ns, event.extra_fields.alloc_size))
    return max(accumulate(size for _, size in sorted(allocations)))


def contender(size: argparse.Namespace, name: str) -> Callable[[], None]:
    """The step named in the tables below."""
    if name in ("dense", "lory"):
        return model_step(build(size, name, size.experts), size)
    if name == "dense FFN":
        return dense_ffn_step(size)
    return merge_step(size, {"merge": merged_ffn, "straightforward": reference_merged_ffn}[name])


def report(size: argparse.Namespace) -> None:
    """Prints the ratios for one size on one device."""
    shape = " ".join(f"{key} {value}" for key, value in vars(size).items() if key != "size")
    print(f"\n{shape}")
    print(f"{'':18}{'ms':>10}{'ratio':>8}{'MiB':>10}{'ratio':>8}")
    for names, what in ((("dense", "lory"), "step"), (("straightforward", "merge", "dense FFN"), "one FFN")):
        steps = {name: contender(size, name) for name in names}
        seconds = fastest(steps, size.device, size.turns, size.cpu_seconds)
        memory = {name: peak_bytes(step, size.device) / 2**20 for name, step in steps.items()}
        print(f"{what} (ratio to {names[0]})")
        for name in names:
            times, bytes_ = seconds[name] / seconds[names[0]], memory[name] / memory[names[0]]
            print(f"  {name:16}{seconds[name] * 1e3:10.2f}{times:8.3f}{memory[name]:10.1f}{bytes_:8.3f}")
    steps = {name: optimizer_step(build(size, name, size.experts)) for name in ("dense", "lory")}
    seconds = fastest(steps, size.device, size.turns, size.cpu_seconds)
    print("AdamW step        " + ", ".join(f"{name} {value * 1e3:.2f} ms" for name, value in seconds.items()))


def main() -> None:
    """Parses the size and runs on every requested device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*SIZES, "all"], default="all", help="a named size, or all of them")
    for name, kind in (("hidden", "width"), ("ffn", "FFN width"), ("layers", "layers"), ("heads", "heads"),
                       ("segment", "tokens in a segment"), ("length", "tokens in a row"), ("batch", "rows"),
                       ("vocab", "vocabulary")):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, help=f"{kind}; overrides the named size")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--turns", type=int, default=10, help="measured turns of each contender")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; all when 0")
    parser.add_argument(
        "--cpu-seconds",
        action="store_true",
        help="time by the CPU seconds of this process, for a machine that others use too",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="both when there is a GPU")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    given = {key: value for key, value in vars(options).items() if value is not None}
    custom = any(key in given for key in SIZES["tiny"])
    names = ["mid"] if custom and options.size == "all" else list(SIZES) if options.size == "all" else [options.size]
    devices = [options.device] if options.device else ["cpu", "cuda"][: 1 + torch.cuda.is_available()]
    for device in devices:
        for name in names:
            size = argparse.Namespace(**{**SIZES[name], **given, "device": device})
            report(size)


if __name__ == "__main__":
    main()
