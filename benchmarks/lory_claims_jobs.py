"""The trainings of `lory_claims.py`: sizes, models, one job from a dense warm-up to scores on held-out text.

A job trains with the production loop (`eclectus.models.training.loop.train`), objectives and evaluation. All jobs of a
seed start from the same dense warm-up and read the same instances in the same order. Needs torch, transformers,
safetensors and NumPy.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lory_claims_data import PARTS, held_out
from lory_claims_routing import with_fixed_weights
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from eclectus.models import LoryConfig
from eclectus.models.evaluation.scoring import Windows, score
from eclectus.models.losses import objectives
from eclectus.models.pretraining import stages
from eclectus.models.sharding.blueprint import Blueprint
from eclectus.models.sharding.slices import InMemory
from eclectus.models.training.flops import step_flops, training_costs
from eclectus.models.training.instances import Instances
from eclectus.models.training.loop import Plan, train
from eclectus.models.training.process import Process

MODELS = ("dense", "lory", "prefix", "expert_choice", "segment_choice", "top_k", "dense_wide", "emo")
NEVER = 10**9

logging.disable_progress_bar()


@dataclass(frozen=True)
class Size:
    """A model size and how it is trained. shape: fields of LlamaConfig; the rest as in `Plan` and `LoryConfig`.

    experts, segment: E and T. context: tokens of a window that are only read, at least the longest T that is compared
    (0: T). jobs: trainings at the same time on one GPU. windows: most windows of held-out text to score. cut:
    characters of the passages into which training documents are cut, 0 for none: if documents are longer than
    instances, grouping them has little effect.
    """

    shape: dict[str, Any]
    vocabulary: int
    length: int
    segment: int
    batch: int
    tokens: float
    learning_rate: float
    jobs: int
    micro: int = 64
    windows: int = NEVER
    experts: int = 8
    context: int = 0
    cut: int = 0

    @property
    def read_only(self) -> int:
        return self.context or self.segment

    @property
    def steps(self) -> int:
        return round(self.tokens / (self.batch * self.length))


def _preset(name: str) -> dict[str, Any]:
    config = LoryConfig.preset(name).to_dict()
    names = (
        "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads tie_word_embeddings"
    )
    return {each: config[each] for each in names.split()}


# Small enough to be bound by what it can hold within minutes: untied embeddings, a small vocabulary and small batches
# bring it past the plateau of the first steps soonest, and one head of 32 trains as well as two of 16 in less time. 32
# experts, as the paper's best models have (docs/log.md, 2026-11-24).
_SMALL = dict(_preset("laptop"), tie_word_embeddings=False)
_SMALLEST = dict(
    _SMALL, hidden_size=32, intermediate_size=88, num_hidden_layers=3, num_attention_heads=1, num_key_value_heads=1
)
SIZES = {
    "laptop": Size(_SMALLEST, 1024, 256, 32, 4, 8e6, 8e-3, 14, windows=1000, experts=32, context=64, cut=256),
    "width64": Size(_SMALL, 1024, 512, 64, 2, 2.5e6, 4e-3, 14, windows=400),
    "wide": Size(_SMALL | dict(hidden_size=128, intermediate_size=344), 1024, 512, 64, 2, 2.5e6, 3e-3, 12, windows=400),
    "30m": Size(_preset("30m"), 16384, 1024, 128, 8, 22e6, 2e-3, 8),
    "100m": Size(_preset("100m"), 16384, 1024, 128, 16, 33e6, 1e-3, 4, micro=16),
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One training. model: one of MODELS, or "warmup". variant: name of a deviation from the defaults, which are the
    other fields.

    dense_wide is the control of equal FLOPs: a dense model with an FFN so wide that a step costs what Lory's does. It
    starts from no warm-up, whose shapes do not fit, but trains from step 0 by the same plan.

    experts, segment: 0 takes the size's. router_init: standard deviation of the routers' initial weights, in units of
    1/sqrt(width): about that of their logits. cuts, active: of top_k: parts that an FFN is cut into, and experts per
    token; each has FFNs of experts * cuts. capacity: of expert_choice. pool: of emo: experts in a document's pool, 0
    for a random number.
    """

    model: str
    grouping: str = "similarity"
    seed: int = 0
    variant: str = ""
    experts: int = 0
    segment: int = 0
    router_init: float = 0.8
    router_rate: float = 1.0
    expert_rate: float = 1.0
    rewarm: int = 30
    moments: str = "carry"
    dense_share: float = 0.05
    first_segment: str = "stop_gradient"
    cuts: int = 2
    active: int = 2
    capacity: float = 1.0
    pool: int = 0

    @property
    def warm(self) -> str:
        """Name of the dense warm-up that this job starts from; empty if it starts from none."""
        return "" if self.model == "dense_wide" else f"{self.grouping}-{self.seed}-{self.dense_share}"

    @property
    def name(self) -> str:
        return f"{self.model} {self.variant}".strip() + f" / {self.grouping} / seed {self.seed}"


class Shuffled(Instances):
    """Instances in a different order for each seed, so that seeds differ in data too."""

    def __init__(self, place: Path, seed: int) -> None:
        super().__init__(place)
        self._order = np.random.default_rng([seed, 7]).permutation(len(self))

    def rows_of_step(self, step: int, size: int, seed: int) -> np.ndarray:
        return self._order[super().rows_of_step(step, size, seed)]


@dataclass
class MetricsLog:
    """Collects the metrics that the training loop reports."""

    rows: list[dict[str, float]] = field(default_factory=list)

    def __call__(self, kind: str, **values: Any) -> None:
        if kind == "metrics":
            self.rows.append({"step": values["step"], **values["values"]})


def plan_of(size: Size, job: Job) -> Plan:
    """Warm-up of the rate over the first 5% of the steps, cosine to a tenth."""
    switch = max(1, round(job.dense_share * size.steps))
    warm, dense = job.model == "warmup", job.model in ("dense", "dense_wide")
    return Plan(
        start=0 if warm or not job.warm else switch,
        stop=switch if warm else size.steps,
        total=size.steps,
        batch=size.batch,
        micro_batch=size.micro,
        learning_rate=size.learning_rate,
        warmup=max(1, round(0.05 * size.steps)),
        rewarm=(switch, job.rewarm) if job.rewarm and not warm and not dense else None,
        router_rate=job.router_rate if job.model in ("lory", "prefix") else 1.0,
        expert_rate=job.expert_rate if job.model in ("lory", "prefix") else 1.0,
        seed=job.seed,
        checkpoint_every=NEVER,
        log_every=max(1, size.steps // 25),
    )


def build(job: Job, size: Size, dense: LlamaForCausalLM, moments: dict[str, torch.Tensor]) -> tuple:
    """(model, AdamW's moments for it, objective) of a job, out of the dense warm-up."""
    experts, seed, segment = job.experts or size.experts, job.seed, job.segment or size.segment
    if job.model in ("dense", "warmup", "dense_wide"):
        return dense, moments, objectives.next_token()
    given = Blueprint.of(dense), {name: InMemory(value) for name, value in moments.items()}, (), experts
    if job.model == "top_k":
        stage = stages.top_k_of_dense(*given, job.active, seed, job.cuts)
    elif job.model == "emo":
        stage = stages.document_pools_of_dense(*given, job.active, seed, pool_size=job.pool)
    elif job.model == "expert_choice":
        stage = stages.expert_choice_from_dense(*given, seed, capacity=job.capacity)
    elif job.model == "segment_choice":
        stage = stages.expert_choice_from_dense(*given, seed, segment_length=segment)
    else:
        stage = stages.lory_from_dense(
            *given,
            segment_length=segment,
            router_initializer_range=job.router_init / size.shape["hidden_size"] ** 0.5,
            seed=seed,
            routing="prefix" if job.model == "prefix" else "causal_segment",
            first_segment=job.first_segment,
        )
    return stage.blueprint.make(), stage.moments if job.moments == "carry" else {}, stage.objective


def run_job(job: Job, size: Size, data: Path, work: Path) -> dict[str, Any]:
    """Trains and scores; a warm-up leaves its model under `work` instead. data: what `--prepare` wrote."""
    process, log, begun = Process.current(), MetricsLog(), time.monotonic()
    instances = Shuffled(work / job.grouping, job.seed)
    warm = work / "warm" / job.warm
    torch.manual_seed(job.seed)
    if job.model in ("warmup", "dense_wide"):
        dense, moments = LlamaForCausalLM(config_of(size, job)), {}
    else:
        dense = LlamaForCausalLM.from_pretrained(warm, dtype=torch.float32)
        moments = load_file(warm / "moments.safetensors")
    model, moments, objective = build(job, size, dense, moments)
    plan = plan_of(size, job)
    cost = cost_of(model, plan, size)
    computed = time.process_time()
    after = train(model, instances, objective, plan, process, work / "none", log, moments)
    trained, computed = time.monotonic(), time.process_time() - computed
    result: dict[str, Any] = {
        "steps": plan.stop - plan.start,
        "tokens": size.steps * size.batch * size.length,
        "epochs": round(size.steps * size.batch / len(instances), 2),
        **cost,
        "cpu_seconds": round(computed, 1),
        "training": log.rows[-1],
        "losses": [round(row["loss"], 4) for row in log.rows],
    }
    if job.model == "warmup":
        model.save_pretrained(warm)
        save_file({name: value.contiguous().cpu() for name, value in after.items()}, warm / "moments.part")
        (warm / "moments.part").rename(warm / "moments.safetensors")
    else:
        windows, *about = held_out(data, size.vocabulary, size.length, size.read_only)
        windows = replace(windows, table=windows.table[: size.windows])
        if job.model == "emo":
            model.config.selection = "causal"
        result["scores"] = scored(model, windows, *about, process)
        if job.model == "lory" and not job.variant:
            shares = [np.array(layer) for layer in result["scores"]["routing"]]
            result["fixed_routing"] = with_fixed_weights(model, windows, shares, process)
        if job.model == "expert_choice":
            stages.make_causal(model, instances, plan, process)
            result["scores_by_threshold"] = scored(model, windows, *about, process)
    result |= {"seconds": round(trained - begun, 1), "scoring_seconds": round(time.monotonic() - trained, 1)}
    return result


def config_of(size: Size, job: Job | None = None) -> LlamaConfig:
    """The dense shape; that of `dense_wide` is as wide as Lory's FLOPs allow."""
    config = LlamaConfig(vocab_size=size.vocabulary, max_position_embeddings=size.length, **size.shape)
    if job is None or job.model != "dense_wide":
        return config
    experts, segment = job.experts or size.experts, job.segment or size.segment
    return stages.equal_flops_config(config, experts, size.length, segment_length=segment)


def cost_of(model: nn.Module, plan: Plan, size: Size) -> dict[str, Any]:
    """Parameters, and FLOPs per step and over the whole training, warm-up included; ratios are to the dense twin.

    flops_relative is of matrix products alone, as torch's FlopCounterMode counts them on CPU; with attention, which is
    the same in all models of a size, it is nearer to 1.
    """
    with torch.device("meta"):
        dense = LlamaForCausalLM(config_of(size))
    twin = step_flops(dense, plan, 1, size.length)
    flops = step_flops(model, plan, 1, size.length)
    return {
        **training_costs(model, plan, 1, size.length, twin.times(plan.start)),
        "flops_relative": round(flops.relative(twin), 4),
        "flops_relative_with_attention": round(flops.total / twin.total, 4),
    }


def scored(
    model: nn.Module,
    windows: Windows,
    domains: list[str],
    domain_of: np.ndarray,
    part_of: np.ndarray,
    process: Process,
    batch: int = 16,
) -> dict[str, Any]:
    """Bits, bytes and tokens by part and domain, and the mean routing weights by layer and domain, on held-out text.

    by_document: the same by document, in the order of the held-out file, for intervals over works.
    """
    sums = score(model, windows, len(domains), process, batch, lambda done, total: None)
    size = sums.tokens * windows.bytes_per_token
    columns = {"bits": sums.bits, "bytes": size, "tokens": sums.tokens}
    parts = {}
    for i, part in enumerate(PARTS):
        parts[part] = {
            name: np.bincount(domain_of, values * (part_of == i), len(domains)).round(3).tolist()
            for name, values in columns.items()
        }
    shares = [layer / np.maximum(sums.routed, 1)[:, None] for layer in sums.shares]
    positions = sums.positions.sum(0)
    return {
        "domains": domains,
        **parts,
        "by_document": {name: values.round(2).tolist() for name, values in columns.items()},
        "bits_per_byte_by_position": (positions[:, 0] / np.maximum(positions[:, 1], 1)).round(4).tolist(),
        "routing": [layer.round(5).tolist() for layer in shares],
        "divergence": [round(divergence(layer), 5) for layer in shares],
    }


def divergence(rows: np.ndarray) -> float:
    """Mean Jensen-Shannon divergence in bits over all pairs of distributions, the rows of [S, E]."""

    def entropy(p: np.ndarray) -> np.ndarray:
        return -(p * np.log2(np.clip(p, 1e-12, None))).sum(-1)

    rows = rows[rows.sum(-1) > 0]
    rows = rows / rows.sum(-1, keepdims=True)
    a, b = np.triu_indices(len(rows), 1)
    return float((entropy((rows[a] + rows[b]) / 2) - (entropy(rows[a]) + entropy(rows[b])) / 2).mean())


def step_times(size: Size, work: Path, models: list[str], compiled: bool) -> list[dict[str, Any]]:
    """Seconds of a training step and peak memory of each model, alone on the device, in the production loop."""
    process, rows = Process.current(), []
    instances = Instances(work / "similarity")
    plan = Plan(0, 50, NEVER, size.batch, size.micro, 1e-5, 1, checkpoint_every=NEVER, log_every=10)
    for name in models:
        for compile_it in (False, True) if compiled else (False,):
            torch.manual_seed(0)
            dense = LlamaForCausalLM(config_of(size, Job(name)))
            model, _, objective = build(Job(name), size, dense, {})
            if compile_it:
                model.compile()
            if process.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            log = MetricsLog()
            train(model, instances, objective, plan, process, work / "none", log)
            best = max(row["tokens_per_second"] for row in log.rows[1:])
            peak = torch.cuda.max_memory_allocated() if process.device.type == "cuda" else 0
            rows.append(
                {
                    "model": name,
                    "compiled": compile_it,
                    "milliseconds": round(1e3 * size.batch * size.length / best, 3),
                    "peak_megabytes": round(peak / 2**20),
                    "parameters": sum(p.numel() for p in model.parameters()),
                }
            )
            del model, dense
            if process.device.type == "cuda":
                torch.cuda.empty_cache()
    return rows
