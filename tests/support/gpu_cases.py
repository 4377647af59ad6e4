"""Every model that is trained, small, with its objective and changes to the plan, for a step on a GPU."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from eclectus.models.extension.lory import extend_lory, post_pretrain_lory, review_lory
from eclectus.models.extension.methods import open_method, open_review
from eclectus.models.lory.model import LoryForCausalLM
from eclectus.models.losses import objectives
from eclectus.models.losses.step import Objective, Pass
from eclectus.models.mixture.upcycle import upcycle
from eclectus.models.pretraining.baselines import ExpertChoiceForCausalLM, top_k_from_dense
from eclectus.models.pretraining.document_pools import document_pools_from_dense, pooled
from tests.support.tiny_training import SHAPE, tiny_dense

DOMAINS = ["a", "b"]
CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
Case = tuple[Any, Objective, dict[str, Any]]


def _pretrained(kind: str, **changes: Any) -> Callable[[], Case]:
    def make() -> Case:
        dense = tiny_dense()
        model, objective = {
            "dense": lambda: (dense, objectives.next_token(DOMAINS)),
            "lory": lambda: (LoryForCausalLM.from_dense(dense, num_experts=4, segment_length=8), objectives.lory()),
            "prefix": lambda: (
                LoryForCausalLM.from_dense(dense, num_experts=4, segment_length=8, routing="prefix"),
                objectives.lory(),
            ),
            "expert_choice": lambda: (ExpertChoiceForCausalLM.from_dense(dense, 4), objectives.next_token(DOMAINS)),
            "top_k": lambda: (top_k_from_dense(dense, 4, 2), objectives.balanced(DOMAINS)),
            "pools": lambda: (document_pools_from_dense(dense, 4, 2, 4), pooled(DOMAINS)),
        }[kind]()
        if kind in ("top_k", "pools"):
            # As models/pretraining/stages.py chooses it where there is a GPU.
            model.set_experts_implementation("masked")
        return model, objective, changes

    return make


def _apart(kind: str) -> Callable[[], Case]:
    """With `pack_document_mask`."""

    def make() -> Case:
        model, objective, changes = _pretrained(kind)()
        return model, dataclasses.replace(objective, document_mask=True), changes

    return make


def _extended(method: str, family: str = "llama", stage: int = 1, **changes: Any) -> Callable[[], Case]:
    def make() -> Case:
        place = Path(tempfile.mkdtemp())
        torch.manual_seed(0)
        config = CONFIGS[family](**SHAPE, num_key_value_heads=1, head_dim=8)
        AutoModelForCausalLM.from_config(config).save_pretrained(place / "dense")
        start = place / "dense"
        if method in ("moe_lpr", "moe_all", "one_stage"):
            upcycle(place / "dense", place / "moe", experts=3)
            start = place / "moe"
        model = open_method(method, start) if stage == 1 else open_review(start)
        objective = {
            "moe_lpr": objectives.post_pretrain(0.01, 2, "paper"),
            "moe_all": objectives.post_pretrain(0.01, 2, "released"),
            "one_stage": objectives.one_stage(0.01, 2, "paper", 0.1, "paper", [0]),
        }.get(method, objectives.next_token())
        return model, objectives.review(0.1, "paper", [0]) if stage == 2 else objective, changes

    return make


def _extended_lory(stage: int) -> Callable[[], Case]:
    def make() -> Case:
        place = Path(tempfile.mkdtemp())
        LoryForCausalLM.from_dense(tiny_dense(), num_experts=2, segment_length=8).save_pretrained(place / "base")
        extend_lory(place / "base", place / "wider")
        if stage == 1:
            return open_method("moe_lpr", place / "wider"), post_pretrain_lory(), {}
        return open_review(place / "wider"), review_lory(0.1, [0]), {}

    return make


def _faulty(metric: Callable[[Any], Any]) -> Callable[[], Case]:
    """A dense model whose metrics do something with the logits and labels that they should not."""

    def measured(done: Pass) -> dict[str, Any]:
        metric(done)
        return {}

    return lambda: (tiny_dense(), Objective([objectives.NextToken()], metrics=measured), {})


# What is found of each fault.
FAULTS = {
    "item": "DataDependentOutputException",
    "nonzero": "DynamicOutputShapeException",
    "boolean indexing": "boolean indexing",
    "to the CPU": "a copy to the CPU",
    "from the CPU": "a copy from the CPU that waits",
    "from Python": "NotImplementedError",
    "mixed devices": "a tensor on the CPU",
    "float64": "float64",
    "no kernel": "no CUDA kernel",
}
CASES: dict[str, Callable[[], Case]] = {
    "item": _faulty(lambda done: done.output.logits.sum().item()),
    "nonzero": _faulty(lambda done: (done.batch.labels > 0).nonzero()),
    "boolean indexing": _faulty(lambda done: done.batch.labels[done.batch.labels > 0]),
    "to the CPU": _faulty(lambda done: done.output.logits.cpu()),
    "from the CPU": _faulty(lambda done: torch.zeros(3).to(done.output.logits.device)),
    "from Python": _faulty(lambda done: torch.tensor([1, 2], device=done.output.logits.device)),
    "mixed devices": _faulty(lambda done: done.output.logits + torch.ones(64)),
    "float64": _faulty(lambda done: done.output.logits.double()),
    "no kernel": _faulty(lambda done: torch.ops.aten.mkldnn_linear(done.output.logits, done.output.logits)),
    **{kind: _pretrained(kind) for kind in ("dense", "lory", "prefix", "expert_choice", "top_k", "pools")},
    "dense apart": _apart("dense"),
    "lory apart": _apart("lory"),
    "dense recomputed": _pretrained("dense", recomputed=True),
    "lory recomputed": _pretrained("lory", recomputed=True),
    **{f"stage 1 {family}": _extended("moe_lpr", family) for family in CONFIGS},
    "stage 2": _extended("moe_lpr", stage=2),
    **{method: _extended(method) for method in ("full", "lora", "llama_pro", "moe_all", "one_stage")},
    "lory stage 1": _extended_lory(1),
    "lory stage 2": _extended_lory(2),
}
