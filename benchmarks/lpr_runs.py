"""The trainings behind `lpr_claims.py`: each job is one function call in a worker process, and gives one result.

    base      a dense Llama on English, or SmolLM2 out of its GGUF
    upcycle   the base as a mixture, with its proof; copies, or random new experts
    stage1    post-pretraining on the expanded languages; scored as "no review"
    review    the review on a stage-1 checkpoint
    single    the baselines and ablations of one stage

All train with `models.train.train` and the objectives of `models.objectives`; what is measured is what ships. Jobs hand
checkpoints to each other in a scratch folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from models import objectives
from models.dense_base import REPORT
from models.evaluate import Windows, plan_windows, score
from models.experts import frozen_digest, set_trainable, split_experts
from models.export import export_checkpoint
from models.extension_baselines import MixedInstances, one_stage, open_method, save_method, untrained_digest
from models.instances import Instances
from models.losses import balance_loss, language_prior_loss
from models.place import Place
from models.train import Objective, Plan, autocast, train
from models.upcycle import upcycle

ORIGINAL = "en"


@dataclasses.dataclass(frozen=True)
class Size:
    """A base and how long everything trains. base_steps, stage1_steps: on a CPU, on a GPU."""

    name: str
    tokenizer: str
    expanded: tuple[str, ...]
    experts: int
    batch: int
    micro_batch: int
    base_steps: tuple[int, int]
    base_batch: int
    stage1_steps: tuple[int, int]
    review_steps: tuple[int, int]
    base_rate: float
    stage1_rate: float
    review_rate: float
    gamma: float
    shape: dict[str, int] | None
    length: int = 512


SIZES = {
    size.name: size
    for size in (
        Size(
            "laptop", "bpe-4096.json", ("el", "hu", "tr"), 4, 8, 8, (600, 2000), 16, (200, 200), (150, 150),
            4e-3, 4e-3, 1e-2, 3.0, dict(hidden_size=64, intermediate_size=176, num_hidden_layers=4, num_attention_heads=4),
        ),
        Size(
            "30m", "bpe-8192.json", ("el", "hu", "tr"), 6, 32, 32, (300, 1200), 32, (60, 400), (40, 150),
            1e-3, 1e-3, 5e-3, 3.0, dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8),
        ),
        Size(
            "smollm", "smollm.json", ("el", "hu", "tr", "es"), 6, 32, 16, (0, 0), 0, (20, 150), (10, 60),
            0.0, 5e-4, 5e-3, 1.0, None,
        ),
        Size(
            "tiny", "bpe-4096.json", ("el", "hu", "tr"), 4, 4, 4, (20, 20), 4, (8, 8), (6, 6),
            4e-3, 4e-3, 1e-2, 3.0, dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2), 128,
        ),
    )
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Review:
    """Settings of a review; what differs from these defaults is a point of the sweep.

    next_token_on "expanded" and away (weight of -log(1 - G_0) on tokens of expanded languages) are ours, beyond the paper.
    """

    gamma: float
    rate: float
    steps: int
    form: str = "paper"
    weight_decay: float = 0.1
    next_token_on: str = "all"
    away: float = 0.0


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Runs one job in this process; the result repeats the job, with bits per byte, seconds and the proof of the hash."""
    torch.set_num_threads(job["threads"])
    started = time.monotonic()
    with contextlib.redirect_stderr(None) if not job.get("loud") else contextlib.nullcontext():
        result = JOBS[job["kind"]](job)
    result["seconds"] = round(time.monotonic() - started, 1)
    if torch.cuda.is_available():
        result["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.empty_cache()
    return {**job, **result}


def train_base(job: dict[str, Any]) -> dict[str, Any]:
    """A dense model of English text; SmolLM2 is only unpacked."""
    size, out = SIZES[job["size"]], Path(job["out"])
    if size.shape is None:
        loaded = AutoModelForCausalLM.from_pretrained(job["gguf"], gguf_file="base.gguf", dtype=torch.float32)
        # A model out of a GGUF file refuses to be saved, though its weights are plain fp32 by then.
        config = LlamaConfig(**{k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"})
        model = LlamaForCausalLM(config)
        model.load_state_dict(loaded.state_dict())
    else:
        torch.manual_seed(job["seed"])
        data = Instances(Path(job["packed"]) / "english")
        config = LlamaConfig(
            **size.shape,
            vocab_size=data.vocabulary,
            max_position_embeddings=max(1024, size.length),
            tie_word_embeddings=True,
        )
        model = LlamaForCausalLM(config)
        steps = job["steps"]
        plan = Plan(0, steps, steps, size.base_batch, size.base_batch, size.base_rate, steps // 20 + 1, log_every=100)
        fit(model, data, objectives.next_token(), plan)
    model.save_pretrained(out)
    return {"bpb": bits_per_byte(model, job), "parameters": count(model)}


def make_moe(job: dict[str, Any]) -> dict[str, Any]:
    """Upcycles the base; the result is the proof."""
    report = upcycle(
        job["base"],
        job["out"],
        experts=job["experts"],
        top_k=job["top_k"],
        init=job["init"],
        drop_ratio=job.get("drop_ratio", 0.5),
        seed=job["seed"],
    )
    return {"proof": report.proof, "max_abs_delta": report.max_abs_delta, "base_digest": report.base_digest}


def train_stage1(job: dict[str, Any]) -> dict[str, Any]:
    """Post-pretraining: new experts and routers, on the expanded languages alone."""
    model = open_method("moe_lpr", job["moe"])
    before = frozen_digest(model)
    objective = objectives.post_pretrain(job["alpha"], model.config.num_experts_per_tok, "paper")
    if job.get("balance_new_only"):
        objective = balance_new_only(job["alpha"], model.config.num_experts_per_tok)
    speed = fit(model, Instances(Path(job["packed"]) / "expanded"), objective, stage_plan(job))
    proof = same_digest(frozen_digest(model), before, job)
    export_checkpoint(model, job["out"], side_files=job["moe"])
    return {"bpb": bits_per_byte(model, job), **proof, **speed, **routing_share(model, job)}


def train_review(job: dict[str, Any]) -> dict[str, Any]:
    """The review of a stage-1 checkpoint: routers alone, on the replay."""
    settings = Review(**job["review"])
    model = split_experts(AutoModelForCausalLM.from_pretrained(job["start"], dtype=torch.float32))
    set_trainable(model, "review")
    before, still = frozen_digest(model), untrained_digest(model)
    data = Instances(Path(job["packed"]) / "review")
    known = [data.languages.index(ORIGINAL)]
    if settings.next_token_on == "all" and settings.away == 0:
        objective = objectives.review(settings.gamma, settings.form, known)
    else:
        objective = review_beyond(settings, known)
    plan = dataclasses.replace(
        stage_plan(job),
        stop=settings.steps,
        total=settings.steps,
        warmup=settings.steps // 15 + 1,
        learning_rate=settings.rate,
        weight_decay=settings.weight_decay,
    )
    speed = fit(model, data, objective, plan)
    proof = same_digest(frozen_digest(model), before, job)
    proof["all_but_routers_unchanged"] = untrained_digest(model) == still
    return {"bpb": bits_per_byte(model, job), **proof, **speed, **routing_share(model, job)}


def train_single(job: dict[str, Any]) -> dict[str, Any]:
    """A method of one stage: the baselines, and MoE-LPR in one stage."""
    method = job["method"]
    replay = method in ("one_stage", "full_replay")
    model = open_method("full" if method == "full_replay" else method, job["start"])
    still = untrained_digest(model)
    data: Instances = Instances(Path(job["packed"]) / "expanded")
    if replay:
        data = MixedInstances(data, Instances(Path(job["packed"]) / "review"), job["replay_share"])
    if method == "moe_all":
        objective = objectives.post_pretrain(job["alpha"], 2, "paper")
    elif method == "one_stage":
        known = [data.languages.index(ORIGINAL)]
        objective = one_stage(job["alpha"], 2, "paper", job["gamma"], "paper", known)
    else:
        objective = objectives.next_token()
    trained = count(model, trained=True)
    speed = fit(model, data, objective, stage_plan(job))
    result = {"untrained_unchanged": untrained_digest(model) == still, "trained": trained, **speed}
    if hasattr(model, "merge_and_unload"):
        with tempfile.TemporaryDirectory(dir=job["scratch"]) as place:
            save_method(model, place, job["start"])
            model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    return {"bpb": bits_per_byte(model, job), "parameters": count(model), **result}


JOBS = {
    "base": train_base,
    "upcycle": make_moe,
    "stage1": train_stage1,
    "review": train_review,
    "single": train_single,
}


def stage_plan(job: dict[str, Any]) -> Plan:
    """The plan of a stage of one job: its steps and learning rate, the size's batches."""
    size = SIZES[job["size"]]
    steps = job["steps"]
    return Plan(
        0, steps, steps, size.batch, size.micro_batch, job["rate"], steps // 10 + 1, seed=job["seed"], log_every=100
    )


def fit(model: torch.nn.Module, data: Instances, objective: Objective, plan: Plan) -> dict[str, float]:
    """Trains by the production loop, without checkpoints to go on from; returns seconds a step."""
    with tempfile.TemporaryDirectory() as work:
        started = time.monotonic()
        plan = dataclasses.replace(plan, checkpoint_every=plan.stop + 1)
        train(model, data, objective, plan, Place.current(), Path(work), lambda *_, **__: None)
        return {"seconds_a_step": round((time.monotonic() - started) / plan.stop, 4)}


def same_digest(after: str, before: str, job: dict[str, Any]) -> dict[str, Any]:
    """Whether the original weights are bit by bit those from before the stage, and the base's own."""
    report = json.loads((Path(job.get("moe", job.get("start"))) / REPORT).read_text())
    return {"frozen_unchanged": after == before, "frozen_is_base": after == report["base_digest"]}


def held_out(job: dict[str, Any]) -> tuple[Any, Windows]:
    """The held-out file and its windows: an eighth of each is context."""
    size = SIZES[job["size"]]
    held = np.load(Path(job["packed"]) / "held.npz")
    context = size.length // 8
    table = plan_windows(held["lengths"].tolist(), size.length, context)
    return held, Windows(held["tokens"], held["owners"], table, context, size.length, held["bytes_a_token"])


def bits_per_byte(model: torch.nn.Module, job: dict[str, Any]) -> dict[str, float]:
    """By language, on the held-out documents."""
    held, windows = held_out(job)
    sums = score(model, windows, len(held["streams"]), Place.current(), 16, lambda *_: None)
    scored = sums.tokens * held["bytes_a_token"]
    by_language = {}
    for number, language in enumerate(held["streams"].tolist()):
        own = held["language"] == number
        by_language[language] = float(sums.bits[own].sum() / scored[own].sum())
    return by_language


@torch.no_grad()
def routing_share(model: torch.nn.Module, job: dict[str, Any]) -> dict[str, Any]:
    """Weight that expert 0 has after the top K's renormalisation, by language and layer: what the prior is about."""
    held, windows = held_out(job)
    place, top_k = Place.current(), model.config.num_experts_per_tok
    model.to(place.device).eval()
    shares = {}
    starts = np.concatenate([[0], np.cumsum(held["lengths"])])
    for number, language in enumerate(held["streams"].tolist()):
        rows = held["tokens"][starts[number] : starts[number + 1]][: 8 * windows.length]
        tokens = torch.from_numpy(rows[: len(rows) // windows.length * windows.length]).view(-1, windows.length)
        if not len(tokens):
            continue
        with autocast(place.device):
            output = model(input_ids=tokens.to(place.device), use_cache=False, output_router_logits=True)
        by_layer = []
        for logits in output.router_logits:
            best = logits.float().softmax(-1).topk(top_k, dim=-1)
            weight = (best.values * (best.indices == 0)).sum(-1) / best.values.sum(-1)
            by_layer.append(round(weight.mean().item(), 4))
        shares[language] = by_layer
    return {"expert_0_weight": shares}


def count(model: torch.nn.Module, trained: bool = False) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad or not trained)


def review_beyond(settings: Review, known: list[int]) -> Objective:
    """A review with what the paper does not have: next-token on expanded tokens only, a prior that pushes these away."""

    def objective(model: torch.nn.Module, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        output = model(input_ids=batch.tokens, use_cache=False, output_router_logits=True)
        original = torch.isin(batch.languages, torch.tensor(known, device=batch.languages.device))
        labels = batch.labels
        if settings.next_token_on == "expanded":
            labels = labels.masked_fill(original, -100)
        # At least one token: a batch of original text alone would be a mean over nothing.
        labels[:, -1] = batch.labels[:, -1]
        loss = objectives.next_token_loss(output.logits, labels)
        prior = language_prior_loss(output.router_logits, original.flatten(), settings.form)
        total = loss + settings.gamma * prior
        if settings.away:
            turned = [logits.roll(-1, dims=-1) for logits in output.router_logits]
            others = turned[0].shape[-1] - 1
            added = (~original & (batch.languages >= 0)).flatten()
            total = total + settings.away * language_prior_loss(turned, added, "paper", original_experts=others)
        return total, {"lpr_loss": prior}

    return objective


def balance_new_only(alpha: float, top_k: int) -> Objective:
    """Stage 1 with the balance over new experts alone (ours): nothing forces expanded tokens to the original expert."""

    def objective(model: torch.nn.Module, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        output = model(input_ids=batch.tokens, use_cache=False, output_router_logits=True)
        loss = objectives.next_token_loss(output.logits, batch.labels)
        balance = balance_loss([logits[:, 1:] for logits in output.router_logits], top_k, "paper")
        return loss + alpha * balance, {"balance_loss": balance}

    return objective


@contextlib.contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A folder for checkpoints that pass between jobs; gone at the end."""
    parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(dir=parent))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
