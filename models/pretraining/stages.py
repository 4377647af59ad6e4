"""The models of pre-training, made from a dense one: Lory and its baselines, each with its objective.

    dense            the dense twin, unchanged
    lory             LoryForCausalLM, FFNs copied into E experts, routing as configured      docs/methods.md 1.2
    expert_choice    token-level Expert Choice of E experts, capacity 1                      docs/methods.md 1.7
    top_k            transformers' Mixtral of E K experts, each 1/K of the dense FFN wide    pretraining/baselines.py
    document_pools   top_k, each document's tokens in a pool of its own          pretraining/document_pools.py
    dense_equal_flops  a dense model with a wider FFN, whose step costs what Lory's does: from scratch, as no FFN fits

All but the last have the dense model's active size, so that stages of equal steps see equal tokens. Their FLOPs are not
equal: merging costs Lory 4 E / (3 T) of the FFN's (models/training/flops.py). AdamW's moments are carried over: an
expert that sees 1/E of the dense gradient gets 1/E of the first moment and 1/E^2 of the second.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig

from eclectus.models.attention.document_mask import within_documents
from eclectus.models.lory.config import LoryConfig
from eclectus.models.lory.model import LoryForCausalLM
from eclectus.models.losses import objectives
from eclectus.models.pretraining.baselines import ExpertChoiceForCausalLM, calibrate
from eclectus.models.pretraining.blueprints import (
    document_pool_blueprint,
    duplicated_moments,
    expert_choice_blueprint,
    lory_blueprint,
    top_k_blueprint,
    top_k_moments,
)
from eclectus.models.pretraining.document_pools import pooled
from eclectus.models.sharding.blueprint import Blueprint
from eclectus.models.sharding.slices import Slices
from eclectus.models.training.flops import count_flops, equal_flops_width
from eclectus.models.training.instances import Instances
from eclectus.models.training.loop import Objective, Plan
from eclectus.models.training.precision import autocast
from eclectus.models.training.process import Process

CALIBRATION_STEPS = 20


class Stage(NamedTuple):
    """What a stage of pre-training starts from."""

    blueprint: Blueprint
    moments: Mapping[str, Slices]
    objective: Objective


def lory_from_dense(
    dense: Blueprint, moments: Mapping[str, Slices], domains: Sequence[str], experts: int, seed: int = 0, **config: Any
) -> Stage:
    """config: other arguments of `LoryForCausalLM.from_dense`."""
    blueprint, share = lory_blueprint(dense, experts, seed, **config), None
    if blueprint.model.config.routing == "dense":
        # Expert 0 gets the whole gradient. The routers are not used, and DDP would wait for their gradients.
        share = 1.0
        for name, parameter in blueprint.model.named_parameters():
            parameter.requires_grad = ".router." not in name
    return Stage(blueprint, duplicated_moments(moments, experts, share), objectives.lory(domains))


def equal_flops_config(dense: LlamaConfig, experts: int, length: int, **config: Any) -> LlamaConfig:
    """The dense configuration with an FFN so wide that a training step costs no less than this Lory model's.

    length: tokens in an instance. config: other fields of LoryConfig; segment_length decides most.
    """
    fields = {name: value for name, value in dense.to_dict().items() if name not in ("model_type", "auto_map")}
    with torch.device("meta"):
        lory = LoryForCausalLM(LoryConfig(**{**fields, "num_experts": experts, **config}))
    width = equal_flops_width(dense, count_flops(lory, 1, length), 1, length)
    return LlamaConfig(**{**dense.to_dict(), "intermediate_size": width})


def expert_choice_from_dense(
    dense: Blueprint, moments: Mapping[str, Slices], domains: Sequence[str], experts: int, seed: int, **config: Any
) -> Stage:
    """After training, `make_causal` replaces the choice within a batch by thresholds.

    config: other arguments of `ExpertChoiceForCausalLM.from_dense`.
    """
    blueprint = expert_choice_blueprint(dense, experts, seed, **config)
    return Stage(blueprint, duplicated_moments(moments, experts), objectives.next_token(domains))


def top_k_of_dense(
    dense: Blueprint,
    moments: Mapping[str, Slices],
    domains: Sequence[str],
    experts: int,
    top_k: int,
    seed: int,
    cuts: int | None = None,
) -> Stage:
    """top_k, cuts: as in `top_k_from_dense`, which raises ValueError for others."""
    blueprint = top_k_blueprint(dense, experts, top_k, cuts or top_k, seed)
    _choose_experts_implementation(blueprint.model)
    return Stage(blueprint, top_k_moments(moments, experts, cuts or top_k), objectives.balanced(domains))


def document_pools_of_dense(
    dense: Blueprint,
    moments: Mapping[str, Slices],
    domains: Sequence[str],
    experts: int,
    top_k: int,
    seed: int,
    pool_size: int = 0,
) -> Stage:
    """After training, `config.selection = "causal"` makes scoring causal.

    Raises ValueError for a top_k or pool_size that does not fit (`document_pools_from_dense`).
    """
    blueprint = document_pool_blueprint(dense, experts, top_k, pool_size, seed)
    _choose_experts_implementation(blueprint.model)
    return Stage(blueprint, top_k_moments(moments, experts, top_k), pooled(domains))


def _choose_experts_implementation(model: Any) -> None:
    """A loop over experts is fastest on CPU; on CUDA it would wait for the device at every expert."""
    model.set_experts_implementation("masked" if torch.cuda.is_available() else "eager")


def make_causal(model: ExpertChoiceForCausalLM, instances: Instances, plan: Plan, process: Process) -> None:
    """Sets the thresholds of a trained Expert Choice model from its last training batches, so that scoring is causal.

    The batches have the size that the experts chose from in training, and are the same in every process.
    """
    size = min(plan.micro_batch, plan.batch // process.world)
    steps = range(max(0, plan.stop - CALIBRATION_STEPS), plan.stop)
    rows = [instances.rows_of_step(step, plan.batch, plan.seed)[:size] for step in steps]
    model.eval()

    def read() -> Iterator[torch.Tensor]:
        for each in rows:
            batch = instances.batch(each)
            inside = within_documents(model, batch.documents if plan.document_mask else None, process.device)
            with inside, autocast(process.device, plan.precision):
                yield batch.tokens.to(process.device)

    calibrate(model, read())
