"""Forecasts beside what came true: python benchmarks/forecast.py FOLDER [CONFIGURATION ...]
Forecasts for GPUs beside published figures: python benchmarks/forecast.py --published

Bases with random weights, mixtures of 6 experts made of them, and random instances are written to FOLDER. Each
configuration runs the production stage (`train_stage` of tasks/training) on the CPU for its steps, in 1 or 2 processes
on gloo with one thread each, with `training_forecast always`: the stage reports its forecast before the first step, and
at the end the seconds of its steps and the largest resident size of its fullest process. The table shows forecast /
actual of one and the same process; a load of the machine that changes between probe and training shows as an error of
the time. The last line counts the configurations whose error is within 15%.

The published figures are torchtitan's (docs/performance.md of its repository): tokens per second and GPU of FSDP2 with
bfloat16 parameters. They hold for its own models; ours train under autocast, with float32 weights and residual stream.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXPERTS, SEGMENT, WITHIN = 6, 64, 0.15


@dataclass(frozen=True)
class Configuration:
    """method: dense, lory, top_k, expert_choice (pre-training), moe_lpr, review, full (extension).

    batch, micro: instances in a step, and at once in a process.
    """

    method: str
    width: int
    layers: int
    vocabulary: int
    length: int
    batch: int
    micro: int
    workers: int = 1
    steps: int = 20
    recompute: bool = False
    sharded: bool = False

    @property
    def base(self) -> str:
        return f"dense-{self.width}-{self.layers}-{self.vocabulary}"


CONFIGURATIONS = {
    "dense 64": Configuration("dense", 64, 4, 4096, 256, 4, 4, steps=60),
    "dense 64, 2 workers": Configuration("dense", 64, 4, 4096, 256, 4, 2, workers=2, steps=60),
    "dense 256, several micro-batches": Configuration("dense", 256, 6, 4096, 256, 4, 1, steps=12),
    "dense 512, long": Configuration("dense", 512, 12, 8192, 1024, 1, 1, steps=6),
    "Lory 128": Configuration("lory", 128, 4, 4096, 512, 4, 4, steps=20),
    "Lory 256, 2 workers": Configuration("lory", 256, 4, 4096, 256, 4, 2, workers=2, steps=12),
    "top_k 128": Configuration("top_k", 128, 4, 4096, 512, 2, 2, steps=20),
    "stage 1": Configuration("moe_lpr", 256, 6, 8192, 256, 4, 2, steps=12),
    "stage 2": Configuration("review", 256, 6, 8192, 256, 4, 4, steps=12),
    "full, recomputed": Configuration("full", 384, 6, 8192, 512, 2, 2, steps=8, recompute=True),
    "stage 1, 2 workers, sharded": Configuration("moe_lpr", 256, 6, 8192, 256, 4, 2, workers=2, steps=10, sharded=True),
}


def prepare(folder: Path, configuration: Configuration) -> None:
    """Writes base, mixture, tokenizer and instances of a configuration, unless they are there."""
    import torch
    from random_instances import write_random_instances
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from eclectus.models.mixture.upcycle import upcycle

    base, vocabulary, length = folder / configuration.base, configuration.vocabulary, configuration.length
    if not base.exists():
        torch.manual_seed(0)
        width = configuration.width
        config = LlamaConfig(
            vocab_size=vocabulary, hidden_size=width, intermediate_size=-(-8 * width // 3 // 8) * 8,
            num_hidden_layers=configuration.layers, num_attention_heads=width // 32, max_position_embeddings=2048,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(base)
        words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w1"))
        PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", unk_token="w1").save_pretrained(base)
    if configuration.method in ("moe_lpr", "review") and not (folder / f"moe-{base.name}").exists():
        upcycle(base, folder / f"moe-{base.name}", experts=EXPERTS)
    place = folder / f"instances-{vocabulary}-{length}"
    if place.exists():
        return
    place.mkdir()
    write_random_instances(place, 64, length, vocabulary, ["en", "el"])


def work(folder: Path, configuration: Configuration, out: Path) -> None:
    """What a process does. Rank 0 prints the reports of the forecast."""
    from eclectus.models.training.process import Process
    from eclectus.tasks.training import extend_stage, pretrain
    from eclectus.tasks.training.extend_settings import ExtendStageSettings

    process = Process.current()

    def report(kind: str, **values: Any) -> None:
        if process.is_main and kind in ("forecast", "came_true"):
            print(json.dumps({kind: values.get("values", values)}), flush=True)

    data = str(folder / f"instances-{configuration.vocabulary}-{configuration.length}")
    dense, method, steps = str(folder / configuration.base), configuration.method, configuration.steps
    common: dict[str, Any] = dict(
        training_sharded=configuration.sharded, training_recompute=configuration.recompute,
        micro_batch=configuration.micro, checkpoint_every=max(2, steps // 2), log_every=5, training_forecast="always",
    )  # fmt: skip
    if method in ("dense", "lory", "top_k", "expert_choice"):
        chosen: Any = pretrain.PretrainStageSettings(
            pretrain_stage=method, dense_start=dense, pretrain_steps=steps, pretrain_batch=configuration.batch,
            lory_experts=EXPERTS, lory_segment=SEGMENT, **common,
        )  # fmt: skip
        pretrain.train_stage(
            process, report, data, dense, chosen.model_dump(), dense, None, str(out / "work"), str(out / "model")
        )
        return
    chosen = ExtendStageSettings(
        extend_stage="review" if method == "review" else "post_pretrain", original_languages=["en"],
        extension_method="full" if method == "full" else "moe_lpr", post_pretrain_steps=steps, review_steps=steps,
        post_pretrain_batch=configuration.batch, review_batch=configuration.batch, **common,
    )  # fmt: skip
    start = dense if method == "full" else str(folder / f"moe-{configuration.base}")
    extend_stage.train_stage(process, report, data, start, chosen.model_dump(), str(out / "work"), str(out / "model"))


def reports(folder: Path, name: str) -> dict[str, dict[str, Any]]:
    """The forecast of a configuration and what came true, as rank 0 reported them."""
    configuration = CONFIGURATIONS[name]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out, count = folder / f"run {port}", configuration.workers
    out.mkdir()
    group = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "forecast"}
    command, running = [sys.executable, __file__, "--work", str(folder), name, str(out)], []
    for rank in range(count):
        own = {**(group if count > 1 else {}), "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": 1}
        environment = {**os.environ, **{name: str(value) for name, value in own.items()}}
        running.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    lines = running[0].communicate()[0].splitlines()
    if any(process.wait() for process in running):
        raise SystemExit(f"a process of '{name}' failed")
    subprocess.run(["rm", "-rf", str(out)], check=True)
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        if line.startswith("{"):
            found |= json.loads(line)
    return found


LLAMA_2_13B = dict(vocab_size=32_000, hidden_size=5120, intermediate_size=13_824, num_hidden_layers=40,
                   num_attention_heads=40)  # fmt: skip
LLAMA_2_70B = dict(vocab_size=32_000, hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80,
                   num_attention_heads=64, num_key_value_heads=8)  # fmt: skip
LLAMA_3_8B = dict(vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
                  num_attention_heads=32, num_key_value_heads=8)  # fmt: skip
# Model, GPU, how many, instances of each, length, recomputed, tokens per second and GPU as published.
PUBLISHED = [
    ("Llama 2 13B, nothing recomputed", LLAMA_2_13B, "a100-80", 64, 2, 4096, False, "2,162"),
    ("Llama 2 70B, recomputed", LLAMA_2_70B, "a100-80", 64, 2, 4096, True, "353"),
    ("Llama 3 8B, recomputed", LLAMA_3_8B, "a100-80", 64, 1, 8192, True, "2,904, of every second layer"),
    ("Llama 3.1 8B, recomputed", LLAMA_3_8B, "h100", 8, 2, 8192, True, "5,762, of some operators"),
    ("Llama 3.1 8B, nothing recomputed", LLAMA_3_8B, "h100", 8, 2, 8192, False, ""),
]


def published() -> None:
    """Prints forecasts of published trainings."""
    import dataclasses

    import torch
    from transformers import LlamaConfig

    from eclectus.models.forecast.gpus import GPUS
    from eclectus.models.forecast.job import Job
    from eclectus.models.forecast.roofline import step_on
    from eclectus.models.forecast.simulation import simulate
    from eclectus.models.losses import objectives
    from eclectus.models.sharding.blueprint import Blueprint
    from eclectus.models.training.plan import Plan

    print("| model | GPUs | tokens/s per GPU, forecast | published |\n|---|---|---|---|")
    for name, shape, kind, count, rows, length, recomputed, figure in PUBLISHED:
        gpu = GPUS[kind]
        if kind == "h100":
            # These have HBM2e of 2.4 TB/s.
            gpu = dataclasses.replace(gpu, bandwidth=2400)
        model = Blueprint.of_config(LlamaConfig(max_position_embeddings=length, **shape)).model
        plan = Plan(0, 10, 10, rows * count, rows, 1e-4, 2, sharded=True, recomputed=recomputed)
        job = Job(model, objectives.next_token(), plan, count, length, device=torch.device("cuda"))
        seconds = step_on(gpu, job, simulate(job), sum(each.numel() for each in model.parameters()))
        print(f"| {name} | {count} {kind} | {rows * length / seconds:,.0f} | {figure} |", flush=True)


def main(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    print(
        "| configuration | seconds, forecast | actual | ratio | CPU s, forecast | actual | ratio | MB, forecast "
        "| actual | ratio | load |\n|---|---|---|---|---|---|---|---|---|---|---|"
    )
    within = {"seconds": 0, "cpu_seconds": 0, "memory": 0}
    for name in names:
        subprocess.run([sys.executable, __file__, "--prepare", str(folder), name], check=True)
        found = reports(folder, name)
        ahead, actual = found["forecast"], found["came_true"]
        print(f"{name}: {ahead['seconds_by']}; {ahead['memory_by']}", file=sys.stderr, flush=True)
        cells = []
        for what, unit in (("seconds", 1), ("cpu_seconds", 1), ("memory", 1e6)):
            ratio = ahead[what] / actual[what]
            within[what] += abs(ratio - 1) <= WITHIN
            digits = 0 if unit > 1 else 1
            cells += [f"{ahead[what] / unit:.{digits}f}", f"{actual[what] / unit:.{digits}f}", f"{ratio:.2f}"]
        print(f"| {name} | {' | '.join(cells)} | {os.getloadavg()[0]:.1f} |", flush=True)
    print(f"\nwithin 15% of {len(names)}: {within}")


if __name__ == "__main__":
    if sys.argv[1] == "--work":
        work(Path(sys.argv[2]), CONFIGURATIONS[sys.argv[3]], Path(sys.argv[4]))
    elif sys.argv[1] == "--prepare":
        prepare(Path(sys.argv[2]), CONFIGURATIONS[sys.argv[3]])
    elif sys.argv[1] == "--published":
        published()
    else:
        main(Path(sys.argv[1]), sys.argv[2:] or list(CONFIGURATIONS))
