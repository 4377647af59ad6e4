"""The trainings behind `lpr_claims.py`: each job is one function call in a worker process, and gives one result.

    base      a dense Llama trained here, or a pretrained model unpacked to a folder
    words     a pretrained base with new words in its vocabulary, whose rows train with every method
    upcycle   the base as a mixture, with the check of equality; copies, or random new experts
    stage1    post-pretraining on the expanded languages; scored as "no review"
    review    the review on a stage-1 checkpoint
    single    the baselines and ablations of one stage

All train with `eclectus.models.training.loop.train` and the objectives of `eclectus.models.losses.objectives`: the
benchmark runs the production code. Jobs hand checkpoints to each other in a folder. Each is scored on both held-out
parts, `valid` and `held` (lpr_data).
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import io
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lpr_sizes import Review
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from eclectus.models.checkpoints.door import open_model
from eclectus.models.checkpoints.side_files import REPORT
from eclectus.models.evaluation.scoring import Windows, plan_windows, score
from eclectus.models.extension.methods import MixedInstances, open_method, untrained_digest
from eclectus.models.losses import objectives
from eclectus.models.losses.router_losses import language_prior_loss
from eclectus.models.losses.step import Loss, Objective, Pass, Term
from eclectus.models.mixture.experts import frozen_digest, set_trainable, split_experts
from eclectus.models.mixture.export import export_checkpoint
from eclectus.models.mixture.upcycle import upcycle
from eclectus.models.sharding.slices import in_memory
from eclectus.models.training.flops import training_costs
from eclectus.models.training.instances import Batch, Instances
from eclectus.models.training.loop import Plan, train
from eclectus.models.training.precision import FrozenWeights, autocast, is_half
from eclectus.models.training.process import Process, trim_heap

logging.disable_progress_bar()


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Runs one job in this process; the result is the job with bits per byte, seconds and the frozen digest."""
    torch.set_num_threads(job["threads"])
    started, computed = time.monotonic(), time.process_time()
    # What a run left that was killed between its checkpoint and its result.
    shutil.rmtree(job["out"], ignore_errors=True)
    with contextlib.redirect_stderr(io.StringIO()):
        result = JOBS[job["kind"]](job)
    if work := unfinished(job):
        shutil.rmtree(work, ignore_errors=True)
    # What a worker's heap has free would be missing in the others' next jobs.
    gc.collect()
    trim_heap()
    result["job_cpu_seconds"] = round(time.process_time() - computed, 1)
    result["seconds"] = round(time.monotonic() - started, 1)
    if torch.cuda.is_available():
        result["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.empty_cache()
    return {**job, **result}


def unfinished(job: dict[str, Any]) -> Path | None:
    """Where a job that resumes keeps checkpoints of its training and scores so far, until its result is there."""
    return Path(f"{job['out']}-unfinished") if "checkpoint_every" in job else None


def train_base(job: dict[str, Any]) -> dict[str, Any]:
    """A dense model of the original languages; a pretrained one is only unpacked."""
    out = Path(job["out"])
    if job["shape"] is None:
        model = open_pretrained(job["base_model"], out)
    else:
        torch.manual_seed(job["seed"])
        data = Instances(Path(job["packed"]) / "base")
        config = LlamaConfig(
            **job["shape"],
            vocab_size=data.vocabulary,
            max_position_embeddings=max(1024, job["length"]),
            tie_word_embeddings=True,
        )
        model = LlamaForCausalLM(config)
        fit(model, data, objectives.next_token(), job)
        model.save_pretrained(out)
    return {**scores(model, job), "parameters": count(model)}


def take_words(job: dict[str, Any]) -> dict[str, Any]:
    """The base with new words: copied, and scored as it is."""
    shutil.copytree(job["base_model"], job["out"], dirs_exist_ok=True)
    model = open_model(job["out"])
    return {**scores(model, job), "parameters": count(model)}


def opened(method: str, job: dict[str, Any]) -> torch.nn.Module:
    """The model of a method, ready for its stage 1."""
    words: dict[str, Any] = {"new_words": True} if job.get("new_words") else {}
    return open_method(method, job["start"], seed=job["seed"], **words)


def open_pretrained(source: str, out: Path) -> torch.nn.Module:
    """A pretrained dense model in fp32, also written to `out` with its tokenizer. source: folder, .gguf, hub name."""
    from transformers import AutoTokenizer

    path = Path(source)
    gguf = dict(gguf_file=path.name) if path.suffix == ".gguf" else {}
    name = path.parent if gguf else source
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **gguf)
    if gguf:
        # A model out of a GGUF file refuses to be saved, though its weights are plain fp32 by then.
        settings = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
        plain = type(model)(type(model.config)(**settings))
        plain.load_state_dict(model.state_dict())
        model = plain
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(name, **gguf).save_pretrained(out)
    return model


def make_moe(job: dict[str, Any]) -> dict[str, Any]:
    """Upcycles the base; returns the report of the check."""
    report = upcycle(job["start"], job["out"], seed=job["seed"], **job["upcycle"])
    return {"proof": report.proof, "max_abs_delta": report.max_abs_delta, "base_digest": report.base_digest}


def train_stage1(job: dict[str, Any]) -> dict[str, Any]:
    """Post-pretraining: new experts and routers, on the expanded languages alone."""
    model = opened("moe_lpr", job)
    before = frozen_digest(model)
    objective = objectives.post_pretrain(job["alpha"], model.config.num_experts_per_tok, "paper")
    data = Instances(Path(job["packed"]) / "expanded")
    speed = fit(model, data, objective, job)
    proof = same_digest(frozen_digest(model), before, job)
    export_checkpoint(model, job["out"], side_files=job["start"])
    return {**scores(model, job), **proof, **speed, **routing_share(model, job)}


def train_review(job: dict[str, Any]) -> dict[str, Any]:
    """The review of a stage-1 checkpoint: routers alone, on the replay."""
    settings = Review(**job["review"])
    model = split_experts(AutoModelForCausalLM.from_pretrained(job["start"], dtype=torch.float32))
    set_trainable(model, "review")
    before, still = frozen_digest(model), untrained_digest(model)
    data = Instances(Path(job["packed"]) / "review")
    if settings.away:
        objective = review_beyond(settings, known_languages(job, data))
    else:
        objective = objectives.review(settings.gamma, settings.form, known_languages(job, data))
    speed = fit(model, data, objective, job)
    proof = same_digest(frozen_digest(model), before, job)
    proof["all_but_routers_unchanged"] = untrained_digest(model) == still
    if job.get("led"):
        # Of a real base: for `eclectus evaluate`, which compares its conversations, and to be served.
        export_checkpoint(model, job["out"], side_files=job["start"])
    return {**scores(model, job), **proof, **speed, **routing_share(model, job)}


def train_single(job: dict[str, Any]) -> dict[str, Any]:
    """A method of one stage: the baselines, and MoE-LPR in one stage."""
    method = job["method"]
    model = opened("full" if method == "full_replay" else method, job)
    still = untrained_digest(model)
    data: Instances = Instances(Path(job["packed"]) / "expanded")
    if job["replay_share"]:
        data = MixedInstances(data, Instances(Path(job["packed"]) / "review"), job["replay_share"])
    if method == "moe_all":
        objective = objectives.post_pretrain(job["alpha"], 2, "paper")
    elif method == "one_stage":
        objective = objectives.one_stage(job["alpha"], 2, "paper", job["gamma"], "paper", known_languages(job, data))
    else:
        objective = objectives.next_token()
    trained = count(model, trained=True)
    speed = fit(model, data, objective, job)
    result = {"untrained_unchanged": untrained_digest(model) == still, "trained": trained, **speed}
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    return {**scores(model, job), "parameters": count(model), **result}


JOBS = {
    "base": train_base,
    "words": take_words,
    "upcycle": make_moe,
    "stage1": train_stage1,
    "review": train_review,
    "single": train_single,
}


def known_languages(job: dict[str, Any], data: Instances) -> list[int]:
    return [data.languages.index(language) for language in job["original"]]


def stage_plan(job: dict[str, Any]) -> Plan:
    """The plan of one training, with a tenth of the steps as warm-up."""
    steps, batch, micro = job["steps"], job["batch"], min(job["batch"], job["micro_batch"])
    every, precision = job.get("checkpoint_every", steps + 1), job.get("precision", "auto")
    more = dict(seed=job["seed"], log_every=100, checkpoint_every=every, precision=precision)
    return Plan(0, steps, steps, batch, micro, job["rate"], steps // 10 + 1, **more)


def fit(model: torch.nn.Module, data: Instances, objective: Objective, job: dict[str, Any]) -> dict[str, float]:
    """Trains with the production loop, from the job's last checkpoint if it keeps any; returns what it cost.

    Frozen weights are held in bf16 where the job trains in it. What was spent before a kill is not in the cost.
    """
    plan, process = stage_plan(job), Process.current()
    costs = training_costs(model, plan, 1, data.length)
    with tempfile.TemporaryDirectory() as temporary:
        work = unfinished(job) or Path(temporary)
        started, computed = time.monotonic(), time.process_time()
        held = FrozenWeights(model, in_memory(model)) if is_half(plan.precision, process.device) else None
        train(model, data, objective, plan, process, work, lambda *_, **__: None)
        if held:
            held.restore()
    return {
        "all_parameters": costs["parameters"],
        "active_parameters": costs["active_parameters"],
        "training_flops": costs["training_flops"],
        "cpu_seconds": round(time.process_time() - computed, 1),
        "seconds_a_step": round((time.monotonic() - started) / plan.stop, 4),
    }


def same_digest(after: str, before: str, job: dict[str, Any]) -> dict[str, Any]:
    """Whether the original weights are bit by bit those from before the stage, and the base's own."""
    report = json.loads((Path(job["start"]) / REPORT).read_text())
    return {"frozen_unchanged": after == before, "frozen_is_base": after == report["base_digest"]}


def scores(model: torch.nn.Module, job: dict[str, Any]) -> dict[str, Any]:
    """Bits per byte by language on both held-out parts, and tasks where the size has some and the job is reported.

    documents: by part, bits of every document, and its scored bytes, in the order of the held-out file.
    """
    found: dict[str, Any] = {"documents": {}}
    for part in ("valid", "held"):
        found[part], found["documents"][part] = bits_per_byte(model, job, part)
    if job.get("tasks") and (job["kind"] == "base" or job.get("title")):
        from lpr_tasks import task_scores

        work = unfinished(job)
        kept = work and work / "answers"
        found["tasks"] = task_scores(model, **job["tasks"], kept=kept, precision=job.get("precision", "auto"))
    return found


def held_out(job: dict[str, Any], part: str) -> tuple[dict[str, Any], Windows]:
    """The held-out file and its windows: an eighth of each is context."""
    held = dict(np.load(Path(job["packed"]) / f"{part}.npz"))
    context = job["length"] // 8
    if job.get("led"):
        held |= _led(held, context)
    table = plan_windows(
        held["lengths"].tolist(), job["length"], context, [bool(job.get("led"))] * len(held["lengths"])
    )
    return held, Windows(held["tokens"], held["owners"], table, context, job["length"], held["bytes_a_token"])


def _led(held: dict[str, Any], context: int) -> dict[str, Any]:
    """Streams that begin with their own last tokens, unscored, as context: every token of a document is scored then.

    Models with different tokenizers are compared on the same bytes only so.
    """
    tokens, owners, begin = [], [], 0
    for length in held["lengths"].tolist():
        stream = slice(begin, begin + length)
        tokens += [np.resize(held["tokens"][stream][-context:], context), held["tokens"][stream]]
        owners += [np.full(context, -1), held["owners"][stream]]
        begin += length
    return {"tokens": np.concatenate(tokens), "owners": np.concatenate(owners), "lengths": held["lengths"] + context}


def bits_per_byte(
    model: torch.nn.Module, job: dict[str, Any], part: str
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """(by language, bits and bytes by document) on the documents of one part."""
    held, windows = held_out(job, part)
    work = unfinished(job)
    kept = work and work / f"scores-{part}"
    given = (model, windows, len(held["streams"]), Process.current(), 16, lambda *_: None, kept)
    sums = score(*given, precision=job.get("precision", "auto"))
    scored = sums.tokens * held["bytes_a_token"]
    by_language = {}
    for number, language in enumerate(held["streams"].tolist()):
        own = held["language"] == number
        by_language[language] = float(sums.bits[own].sum() / scored[own].sum())
    return by_language, {"bits": sums.bits.round(3).tolist(), "bytes": scored.round(2).tolist()}


@torch.no_grad()
def routing_share(model: torch.nn.Module, job: dict[str, Any]) -> dict[str, Any]:
    """Weight that expert 0 has after the top K's renormalisation, by language and layer: what the prior is about."""
    held, windows = held_out(job, "held")
    process, top_k = Process.current(), model.config.num_experts_per_tok
    model.to(process.device).eval()
    shares = {}
    starts = np.concatenate([[0], np.cumsum(held["lengths"])])
    for number, language in enumerate(held["streams"].tolist()):
        rows = held["tokens"][starts[number] : starts[number + 1]][: 8 * windows.length]
        tokens = torch.from_numpy(rows[: len(rows) // windows.length * windows.length]).view(-1, windows.length)
        if not len(tokens):
            continue
        with autocast(process.device):
            output = model(input_ids=tokens.to(process.device), use_cache=False, output_router_logits=True)
        by_layer = []
        for logits in output.router_logits:
            best = logits.float().softmax(-1).topk(top_k, dim=-1)
            weight = (best.values * (best.indices == 0)).sum(-1) / best.values.sum(-1)
            by_layer.append(round(weight.mean().item(), 4))
        shares[language] = by_layer
    return {"expert_0_weight": shares}


def count(model: torch.nn.Module, trained: bool = False) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad or not trained)


def review_beyond(settings: Review, known: list[int], original_experts: int | list[int] = 1) -> Objective:
    """A review that also pushes tokens of expanded languages away from the original experts (ours, not the paper's)."""
    usual = objectives.review(settings.gamma, settings.form, known, original_experts)
    return dataclasses.replace(usual, losses=[*usual.losses, Away(settings.away, known, original_experts)])


class Away(Loss):
    """Mean over tokens of other languages than the original ones of -log of the new experts' probability."""

    name = "away_loss"

    def __init__(self, weight: float, original_languages: list[int], original_experts: int | list[int]) -> None:
        self.weight, self.languages, self.experts = weight, original_languages, original_experts

    def count(self, batch: Batch) -> torch.Tensor:
        return self.added(batch).sum()

    def measure(self, done: Pass, statistic: torch.Tensor | None) -> tuple[torch.Tensor, dict[str, Term]]:
        by_layer = done.output.router_logits
        old = [self.experts] * len(by_layer) if isinstance(self.experts, int) else self.experts
        # The new experts come first, so that the prior's sum over leading experts is theirs.
        turned = [logits.roll(-each, dims=-1) for logits, each in zip(by_layer, old, strict=True)]
        new = [logits.shape[-1] - each for logits, each in zip(by_layer, old, strict=True)]
        return language_prior_loss(turned, self.added(done.batch), "paper", original_experts=new), {}

    def added(self, batch: Batch) -> torch.Tensor:
        return ~objectives.in_languages(batch, self.languages) & (batch.languages >= 0)
