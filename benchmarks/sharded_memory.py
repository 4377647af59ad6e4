"""Peak resident memory of sharded training, process by process: python benchmarks/sharded_memory.py FOLDER [JOB ...]

A dense model of 60M parameters with random weights and a mixture of 6 experts made of it (about 300M) are written to
FOLDER. Each job (moe_lpr, review, full, lory, expert_choice) runs the production stage for 3 steps in 1, 2 and 4
processes on gloo. The largest resident size of each process is read from outside, from /proc, and reset between phases:

    born      reading, sharding, the proof and the digests
    trained   three steps
    saved     the checkpoint

allowed = (weights + gradients + AdamW's moments) / processes + one layer + 400 MB, of which importing torch and
transformers takes most ("imports"). Memory is what counts here; seconds are not measured.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

WIDTH, INNER, LAYERS, HEADS, VOCABULARY, EXPERTS = 768, 2048, 10, 12, 8192, 6
LENGTH, ROWS, STEPS = 32, 16, 3
JOBS = ("moe_lpr", "review", "full", "lory", "expert_choice")
PROCESSES = (1, 2, 4)
MEGABYTE = 2**20
ALLOWANCE = 400 * MEGABYTE


def prepare(folder: Path) -> None:
    """Writes base, mixture, tokenizer and instances, unless they are there."""
    import torch
    from random_instances import write_random_instances
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from eclectus.models.mixture.upcycle import upcycle

    if (folder / "moe").exists():
        return
    torch.manual_seed(0)
    shape = dict(hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS, num_attention_heads=HEADS)
    dense = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **shape))
    dense.save_pretrained(folder / "dense")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w1"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", unk_token="w1").save_pretrained(folder / "dense")
    place = folder / "instances"
    place.mkdir()
    write_random_instances(place, ROWS, LENGTH, VOCABULARY, ["en"])
    upcycle(folder / "dense", folder / "moe", experts=EXPERTS)


def parameters(job: str) -> tuple[int, int, int]:
    """(all parameters, those that train, those of a layer)."""
    attention, ffn, rest = 4 * WIDTH**2 + 2 * WIDTH, 3 * WIDTH * INNER, 2 * VOCABULARY * WIDTH + WIDTH
    experts, router = (1, 0) if job == "full" else (EXPERTS, EXPERTS * WIDTH)
    layer = attention + experts * ffn + router
    total = LAYERS * layer + rest
    trained = {"moe_lpr": LAYERS * ((experts - 1) * ffn + router), "review": LAYERS * router}.get(job, total)
    return total, trained, layer


def work(folder: Path, job: str, out: Path) -> None:
    """What a process does; it says when a phase ends and waits until its memory was read."""
    import eclectus.models.training.loop as loop
    from eclectus.models.training.process import Process
    from eclectus.tasks.training import extend_stage, pretrain
    from eclectus.tasks.training.extend_settings import ExtendStageSettings

    def ended(phase: str) -> None:
        print(f"PHASE {phase}", flush=True)
        sys.stdin.readline()

    process, train = Process.current(), loop.train

    def watched(*arguments: Any, **named: Any) -> Any:
        ended("born")
        result = train(*arguments, **named)
        ended("trained")
        return result

    loop.train = watched
    ended("imports")
    data = str(folder / "instances")
    common = dict(training_sharded=True, micro_batch=4, checkpoint_every=99, log_every=1)
    if job in ("lory", "expert_choice"):
        chosen = pretrain.PretrainStageSettings(
            pretrain_stage=job, dense_start=str(folder / "dense"), pretrain_steps=STEPS, pretrain_batch=4,
            lory_experts=EXPERTS, lory_segment=8, **common,
        )  # fmt: skip
        dense = str(folder / "dense")
        pretrain.train_stage(
            process, lambda *_, **__: None, data, dense, chosen.model_dump(), dense, None, str(out / "work"), str(out)
        )
    else:
        stage: Any = "review" if job == "review" else "post_pretrain"
        settings = ExtendStageSettings(
            extend_stage=stage, original_languages=["en"], extension_method="full" if job == "full" else "moe_lpr",
            post_pretrain_steps=STEPS, review_steps=STEPS, post_pretrain_batch=4, review_batch=4, **common,
        )  # fmt: skip
        start = str(folder / ("dense" if job == "full" else "moe"))
        extend_stage.train_stage(
            process, lambda *_, **__: None, data, start, settings.model_dump(), str(out / "work"), str(out / "model")
        )
    ended("saved")


def peaks(folder: Path, job: str, count: int) -> dict[str, list[int]]:
    """By phase, the largest resident bytes of each process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = folder / f"{job} {count} {port}"
    out.mkdir()
    group = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "memory"}
    command = [sys.executable, __file__, "--work", str(folder), job, str(out)]
    running = []
    for rank in range(count):
        own = {**(group if count > 1 else {}), "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": 1}
        environment = {**os.environ, **{name: str(value) for name, value in own.items()}}
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        running.append(subprocess.Popen(command, env=environment, **pipes))
    found: dict[str, list[int]] = {}
    for phase in ("imports", "born", "trained", "saved"):
        for process in running:
            while (line := process.stdout.readline()) and line != f"PHASE {phase}\n":
                pass
            if not line:
                raise SystemExit(f"a process of {job} ended before {phase}")
            found.setdefault(phase, []).append(_peak(process.pid))
        for process in running:
            Path(f"/proc/{process.pid}/clear_refs").write_text("5")
            process.stdin.write("\n")
            process.stdin.flush()
    if any(process.wait() for process in running):
        raise SystemExit(f"a process of {job} failed")
    subprocess.run(["rm", "-rf", str(out)], check=True)
    return found


def _peak(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def main(folder: Path, jobs: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--prepare", str(folder)]
    subprocess.run(command, check=True)
    print(
        "| job | processes | allowed | imports | born | trained | saved | within |\n|---|---|---|---|---|---|---|---|"
    )
    for job in jobs:
        total, trained, layer = parameters(job)
        for count in PROCESSES:
            allowed = (4 * total + 12 * trained) // count + 4 * layer + ALLOWANCE
            found = peaks(folder, job, count)
            phases = " | ".join(str(max(found[phase]) // MEGABYTE) for phase in ("imports", "born", "trained", "saved"))
            within = max(max(each) for each in found.values()) <= allowed
            print(f"| {job} | {count} | {allowed // MEGABYTE} | {phases} | {'yes' if within else 'no'} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "--work":
        work(Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
    elif sys.argv[1] == "--prepare":
        prepare(Path(sys.argv[2]))
    else:
        main(Path(sys.argv[1]), sys.argv[2:] or list(JOBS))
