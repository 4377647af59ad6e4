"""Pre-training on the original languages: a dense LLaMA-shaped model, and Lory out of its first steps.

    dense warm-up   steps [0, w)       one dense model, w = the first 5% by default
    dense           steps [w, total)   the twin goes on as it is
    lory            steps [w, total)   every FFN duplicated into E experts, random routers, a second warm-up of the rate
    expert_choice   steps [w, total)   baseline: experts choose their tokens (models/pretraining/stages.py)
    top_k           steps [w, total)   baseline: tokens choose their experts, transformers' Mixtral
    document_pools  steps [w, total)   baseline: top_k with a pool of experts for each document (EMO)
    dense_equal_flops  steps [0, total)  control: a dense model with an FFN so wide that its step costs what Lory's does

A LLaMA checkpoint can replace the warm-up (`dense_start`); then w = 0. The control does not fit the warm-up's shapes,
so it trains from scratch, on the same instances in the same order at the same rates.
All other stages continue from the same weights and AdamW moments and read the same instances in the same order, so
only the model differs (docs/methods.md 1.5). FLOPs do not count as equal (1.8): each checkpoint's statistics hold those
of a step and of the whole training, all and active parameters, and seconds. AdamW's moments are carried over the
switch: an expert with weight 1/E gets 1/E of the dense gradient, so its first moment is divided by E and its second by
E squared, and update sizes stay the same.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from eclectus.storage.artifact import Artifact, Draft
from eclectus.storage.errors import EclectusError
from eclectus.tasks.settings import BASIC, Settings
from eclectus.tasks.step import step
from eclectus.tasks.training.check_base import check_dense_start
from eclectus.tasks.training.precision import LARGE, dense_parameters, parameters_in, vocabulary_in
from eclectus.tasks.training.run_training import (
    TrainingSettings,
    check_tokens,
    initial_moments,
    resume_directory,
    run_training,
)

if TYPE_CHECKING:
    from eclectus.models.checkpoints.proof import StepZero
    from eclectus.models.pretraining.stages import Stage
    from eclectus.models.sharding.blueprint import Blueprint
    from eclectus.models.sharding.slices import Slices
    from eclectus.models.training.loop import Report
    from eclectus.models.training.process import Process


# Stages that train a stock LLaMA, and those that start from random weights.
DENSE = ("warmup", "dense", "dense_equal_flops")
FROM_SCRATCH = ("warmup", "dense_equal_flops")


class ArchitectureSettings(Settings):
    """The shape of a dense model trained from scratch."""

    model_preset: Literal["custom", "laptop", "30m", "100m", "0.3b", "1.5b"] = Field(
        "custom",
        description="A named shape that replaces the other model settings: 0.3b and 1.5b are the Lory paper's, 30m and "
        "100m suit one GPU. custom: use the other model settings.",
        json_schema_extra=BASIC,
    )
    model_width: int = Field(64, ge=8, description="Width of the model (d).")
    model_layers: int = Field(4, ge=1, description="Transformer layers.")
    model_heads: int = Field(4, ge=1, description="Attention heads; must divide the width.")
    model_key_value_heads: int = Field(4, ge=1, description="Key-value heads (GQA); must divide the heads.")
    model_tied_embeddings: bool = Field(
        False,
        description="One matrix for input and output embeddings. Tokens never seen in training then share a direction, "
        "by which routers recognise new languages; a small model trained for minutes scores worse.",
    )
    model_feed_forward: int = Field(172, ge=8, description="Width of the feed-forward network (SwiGLU).")


class LorySettings(Settings):
    """Lory's own settings (docs/methods.md 1)."""

    lory_experts: int = Field(
        8,
        ge=1,
        description="Experts E in every layer, merged into one network for each segment.",
        json_schema_extra=BASIC,
    )
    lory_segment: int = Field(64, ge=1, description="Tokens T in a routing segment.")
    lory_routing: Literal["causal_segment", "prefix", "dense"] = Field(
        "causal_segment",
        description="What a segment is routed by: the previous segment (the paper), the first segment of the instance, "
        "or nothing (expert 0 alone).",
    )
    lory_first_segment: Literal["stop_gradient", "uniform"] = Field(
        "stop_gradient",
        description="How the first segment is routed in training: by itself, without gradient (the paper), or with "
        "uniform weights.",
    )
    lory_router_init: float = Field(
        0.1,
        gt=0,
        description="Standard deviation of the routers' initial weights; for other widths use about 0.8 / sqrt(width).",
    )
    lory_rewarm_steps: int = Field(
        60, ge=0, description="Steps of a second learning-rate warm-up after the switch to experts."
    )
    lory_moments: Literal["carry", "reset"] = Field(
        "carry", description="AdamW's moments at the switch: carried over to the experts, scaled, or reset to zero."
    )


class PretrainSettings(ArchitectureSettings, LorySettings, TrainingSettings):
    """Settings of pre-training."""

    dense_start: str = Field(
        "",
        description="Dense LLaMA checkpoint to start from instead of a warm-up from scratch: a folder, a .gguf file or "
        "a name on the hub. Its tokenizer is used; model settings have no effect. Empty: train one.",
    )
    pretrain_baselines: list[
        Literal["prefix", "expert_choice", "top_k", "document_pools", "dense_equal_flops", "random"]
    ] = Field(
        [],
        description="Baselines to train besides Lory and its dense twin, for the same steps: prefix (Lory routed once, "
        "by the first segment), expert_choice and top_k (token-level mixtures of equal active size), document_pools "
        "(top_k whose tokens choose within a pool of experts that their document shares), dense_equal_flops (a dense "
        "model with a wider feed-forward network, whose step costs as many FLOPs as Lory's), random (Lory and twin on "
        "instances of documents in random order).",
    )
    baseline_top_k: int = Field(
        2,
        ge=1,
        description="Experts per token in the baselines top_k and document_pools, each 1/k as wide as the dense "
        "network.",
    )
    baseline_pool: int = Field(
        0,
        ge=0,
        description="Experts in a document's pool in the baseline document_pools, a multiple of baseline_top_k; 0 "
        "draws a number for each document and scores with all experts, as the paper does.",
    )
    training_compiled: bool = Field(
        False,
        description="Compile the layers with torch.compile: takes minutes at the start, same results; for long "
        "trainings on GPUs.",
    )
    pretrain_steps: int = Field(
        700,
        ge=2,
        description="Training steps of the dense and of the Lory model, warm-up included.",
        json_schema_extra=BASIC,
    )
    pretrain_batch: int = Field(4, ge=1, description="Instances in a batch, over all workers.")
    pretrain_learning_rate: float = Field(
        4e-3, gt=0, description="Peak learning rate of pre-training (cosine schedule).", json_schema_extra=BASIC
    )
    pretrain_warmup_steps: int = Field(40, ge=0, description="Steps of linear learning-rate warm-up.")
    dense_warmup: float = Field(
        0.05, gt=0, lt=1, description="Share of the steps that train the dense model before the switch to experts."
    )

    def check_together(self) -> None:
        super().check_together()
        if not self.pretrains:
            return
        self.check_batch("pretrain_batch")
        if self.dense_start and "dense_equal_flops" in self.pretrain_baselines:
            raise EclectusError(
                "pretrain_baselines has dense_equal_flops, which trains from scratch and is no control of models that "
                "start from dense_start; leave out one of the two"
            )
        if self.has_custom_shape:
            self._check_shape()
        self._check_baselines()

    def _check_shape(self) -> None:
        if self.model_width % self.model_heads or self.model_heads % self.model_key_value_heads:
            raise EclectusError(
                f"model_width {self.model_width}, model_heads {self.model_heads} and model_key_value_heads "
                f"{self.model_key_value_heads} do not fit: each must be a multiple of the next"
            )
        if (self.model_width // self.model_heads) % 2:
            raise EclectusError(
                f"model_width {self.model_width} and model_heads {self.model_heads} give heads of "
                f"{self.model_width // self.model_heads} dimensions, and rotary positions need an even number; change "
                "one of them"
            )

    def _check_baselines(self) -> None:
        """Raises EclectusError for token-level mixtures that cannot be cut out of the dense feed-forward network."""
        chosen = [name for name in ("top_k", "document_pools") if name in self.pretrain_baselines]
        if not chosen:
            return
        cuts, pool, most = self.baseline_top_k, self.baseline_pool, self.lory_experts * self.baseline_top_k
        if self.has_custom_shape and self.model_feed_forward % cuts:
            raise EclectusError(
                f"baseline_top_k {cuts} does not divide model_feed_forward {self.model_feed_forward}, which the "
                f"baseline {chosen[0]} cuts into so many experts; change one of them"
            )
        if "document_pools" in chosen and pool and (pool % cuts or pool > most):
            raise EclectusError(
                f"baseline_pool {pool} must be 0 or a multiple of baseline_top_k {cuts}, at most {most} (lory_experts "
                "times baseline_top_k)"
            )

    @property
    def pretrains(self) -> bool:
        """Whether a model is pre-trained at all; otherwise these settings have no effect."""
        return True

    @property
    def has_custom_shape(self) -> bool:
        """Whether the model's shape is that of the settings, not of a preset or a checkpoint."""
        return not self.dense_start and self.model_preset == "custom"

    @property
    def trains_routers(self) -> bool:
        """Whether Lory has routers, which learn from the second segment on."""
        return self.lory_experts > 1 and self.lory_routing != "dense"

    @property
    def switch_step(self) -> int:
        """The step at which the dense warm-up ends; 0 if a checkpoint replaces it."""
        if self.dense_start:
            return 0
        return min(self.pretrain_steps - 1, max(1, round(self.dense_warmup * self.pretrain_steps)))


class PretrainStageSettings(PretrainSettings):
    """Settings of the step `pretrain`: one stage."""

    pretrain_stage: Literal[
        "warmup", "dense", "lory", "expert_choice", "top_k", "document_pools", "dense_equal_flops"
    ] = Field(description="Which stage: dense warm-up, dense twin, Lory or a baseline.")
    reordered: bool = Field(
        False, description="Read the instances in an order of the seed's own in the first epoch, too; not as packed."
    )

    def parameters_of_model(self, inputs: Mapping[str, Any]) -> int:
        """Those of the dense model, so that all models of a run train in one precision."""
        if self.dense_start:
            return parameters_in(inputs["start"].path)
        if self.model_preset != "custom":
            # Their table is next to PyTorch; the names say the size.
            return 0 if self.model_preset == "laptop" else LARGE
        return dense_parameters(
            {
                "hidden_size": self.model_width,
                "intermediate_size": self.model_feed_forward,
                "num_hidden_layers": self.model_layers,
                "num_attention_heads": self.model_heads,
                "num_key_value_heads": self.model_key_value_heads,
                "tie_word_embeddings": self.model_tied_embeddings,
                "vocab_size": vocabulary_in(inputs["instances"].path),
            }
        )

    @property
    def from_scratch(self) -> bool:
        """Whether the stage starts from random weights, at step 0."""
        return self.pretrain_stage in FROM_SCRATCH

    @property
    def routed(self) -> bool:
        """Whether the stage trains routers over merged experts."""
        return self.pretrain_stage == "lory" and self.trains_routers

    def key_values(self) -> dict[str, Any]:
        """Without settings that the stage does not depend on; so a change of Lory's reuses the dense twin."""
        # The list of baselines changes no stage; the checkpoint to start from is an input.
        values = {k: v for k, v in super().key_values().items() if k != "pretrain_baselines"}
        values["dense_start"] = bool(self.dense_start)
        if not self.reordered:
            values.pop("reordered")
        if self.pretrain_stage in DENSE:
            # Lory's FLOPs, which the control must equal, depend on these.
            kept = (
                {"lory_experts", "lory_segment", "lory_routing"} if self.pretrain_stage == "dense_equal_flops" else ()
            )
            values = {k: v for k, v in values.items() if k not in LorySettings.model_fields or k in kept}
        if self.pretrain_stage not in ("top_k", "document_pools"):
            values.pop("baseline_top_k")
        if self.pretrain_stage != "document_pools":
            values.pop("baseline_pool")
        return values


@step(makes="checkpoint", version=4)
def pretrain(
    instances: Artifact, tokenizer: Artifact, settings: PretrainStageSettings, out: Draft, start: Artifact | None = None
) -> None:
    """Trains one stage. start: the dense checkpoint to start from, for all stages but those of FROM_SCRATCH."""
    if settings.from_scratch != (start is None):
        raise EclectusError(
            f"stage '{settings.pretrain_stage}' of pre-training starts from "
            + (
                "nothing, but was given a checkpoint"
                if settings.from_scratch
                else "the dense warm-up; give it as start"
            )
        )
    settings.check_together()
    length = json.loads(instances.file("instances.json").read_text())["length"]
    if settings.routed:
        check_segment(settings, length)
    if settings.dense_start and start is not None:
        check_dense_start(start.name, length, start.path)
    settings.note_precision()
    with resume_directory("pretrain", instances, tokenizer, start, settings.key_values()) as work:
        out.statistics = run_training(
            settings,
            train_stage,
            {
                "instances": instances.path,
                "tokenizer": tokenizer.path,
                "settings": settings.model_dump(),
                "start": start.path if start else None,
                "moments": None if settings.dense_start else initial_moments(start),
                "work": str(work),
                "out": str(out.path),
            },
            what=f"training {settings.pretrain_stage.replace('_', '-')}",
        )


def check_segment(settings: PretrainSettings, length: int) -> None:
    """Raises EclectusError for segments that leave no second one in instances of this many tokens."""
    if settings.trains_routers and settings.lory_segment >= length:
        raise EclectusError(
            f"lory_segment {settings.lory_segment} leaves no second segment in instances of {length} tokens, so no "
            "router would ever learn; lower it, or raise instance_tokens"
        )


def train_stage(
    process: Process,
    report: Report,
    instances: str,
    tokenizer: str,
    settings: dict[str, Any],
    start: str | None,
    moments: str | None,
    work: str,
    out: str,
) -> dict[str, Any]:
    """Runs on every training worker; rank 0 writes the checkpoint into `out`. Returns its statistics.

    training_flops is over all steps from 0, the dense warm-up's too; the seconds are of this stage alone.
    """
    from eclectus.models.checkpoints.side_files import has_tokenizer
    from eclectus.models.checkpoints.tensor_files import CheckpointError
    from eclectus.models.pretraining.checkpoint import save_trained, stored_moments
    from eclectus.models.pretraining.routing_profiles import routing_profiles, write_profiles
    from eclectus.models.pretraining.stages import make_causal
    from eclectus.models.training.clock import TrainingClock
    from eclectus.models.training.flops import step_flops, training_costs
    from eclectus.models.training.instances import Instances
    from eclectus.models.training.loop import train
    from eclectus.tasks.packing.tokenizer import load_tokenizer

    chosen = PretrainStageSettings(**settings)
    data, tokens = Instances(instances, chosen.reordered), load_tokenizer(tokenizer)
    stage, switch = chosen.pretrain_stage, chosen.switch_step
    clock = TrainingClock(report, process, Path(work))
    rewarmed = stage not in DENSE and switch and chosen.lory_rewarm_steps
    plan = chosen.plan(
        start=0 if chosen.from_scratch else switch,
        stop=switch if stage == "warmup" else chosen.pretrain_steps,
        total=chosen.pretrain_steps,
        batch=chosen.pretrain_batch,
        learning_rate=chosen.pretrain_learning_rate,
        warmup=chosen.pretrain_warmup_steps,
        rewarm=(switch, chosen.lory_rewarm_steps) if rewarmed else None,
        compiled=chosen.training_compiled,
    )
    with ExitStack() as files:
        dense = files.enter_context(_dense(start, chosen, data, tokens))
        check_tokens(data, dense.model, start or "warm-up")
        before = step_flops(dense.model, plan, process.world, data.length).times(plan.start)
        made = _stage(chosen, dense, stored_moments(moments, files), data)
        costs = training_costs(made.blueprint.model, plan, process.world, data.length, before)
        model = _made(made.blueprint, process, plan.sharded)
        proof = _proof(chosen, model, start, process)
        # A model from scratch is held by its blueprint.
        dense.values = made.blueprint.values = {}
        after = train(model, data, made.objective, plan, process, Path(work), clock.report, made.moments)
    seconds = clock.read()
    moments_after = after if stage == "warmup" else None
    # The optimizer is in a circle of references, and would hold its moments while the checkpoint is written.
    del after
    gc.collect()
    profiles = None
    if stage == "expert_choice":
        make_causal(model, data, plan, process)
    elif stage == "document_pools":
        model.config.selection = "causal"
    elif chosen.routed:
        profiles = routing_profiles(model, data, chosen.micro_batch, process)
    # A checkpoint to start from has more than a tokenizer: sampling settings, chat templates.
    beside = Path(start) if start and has_tokenizer(Path(start)) else Path(tokenizer)
    try:
        save_trained(model, beside, Path(out), moments_after, process)
    except CheckpointError as error:
        raise EclectusError(str(error)) from error
    if profiles and process.is_main:
        write_profiles(Path(out), profiles)
    return {
        "model": type(model).__name__,
        **costs,
        **seconds,
        "steps": plan.stop,
        "tokens": plan.stop * plan.batch * data.length,
        "epochs": round(plan.stop * plan.batch / len(data), 3),
        "step_zero": asdict(proof) if proof else None,
    }


def _made(blueprint: Blueprint, process: Process, sharded: bool) -> Any:
    try:
        return blueprint.make(process, sharded)
    except ValueError as error:
        raise EclectusError(f"the dense checkpoint to start from cannot be opened: {error}") from error


def _proof(settings: PretrainStageSettings, model: Any, start: str | None, process: Process) -> StepZero | None:
    """The proof that the stage starts as the checkpoint in `start`, on rank 0; None from scratch, and where experts
    choose."""
    from eclectus.models.checkpoints.proof import StepZeroError, prove_start
    from eclectus.models.training.parallel import is_sharded

    # An expert may be chosen by no one or by several, so expert_choice does not start as the dense model.
    if start is None or settings.pretrain_stage == "expert_choice":
        return None
    if not is_sharded(model) and not process.is_main:
        return None
    try:
        what = f"the start of stage {settings.pretrain_stage}"
        return prove_start(model, Path(start), what, process=process if is_sharded(model) else None)
    except StepZeroError as error:
        raise EclectusError(str(error)) from error


def _dense(start: str | None, settings: PretrainStageSettings, data: Any, tokenizer: Any) -> Blueprint:
    """The dense model that the stage starts from."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from eclectus.models.checkpoints.tokenizer_files import vocabulary_size
    from eclectus.models.lory.config import PRESETS
    from eclectus.models.sharding.blueprint import Blueprint, stock_blueprint

    if start is not None:
        try:
            return stock_blueprint(start)
        except ValueError as error:
            raise EclectusError(f"the dense checkpoint to start from cannot be opened: {error}") from error
    shape: dict[str, Any] = {
        "hidden_size": settings.model_width,
        "intermediate_size": settings.model_feed_forward,
        "num_hidden_layers": settings.model_layers,
        "num_attention_heads": settings.model_heads,
        "num_key_value_heads": settings.model_key_value_heads,
        "tie_word_embeddings": settings.model_tied_embeddings,
    }
    if settings.model_preset != "custom":
        preset = PRESETS[settings.model_preset]
        shape = {name: preset[name] for name in shape if name in preset}
    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=vocabulary_size(tokenizer),
        max_position_embeddings=data.length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **shape,
    )
    return Blueprint.of(LlamaForCausalLM(config))


def _stage(settings: PretrainStageSettings, dense: Blueprint, moments: Mapping[str, Slices], data: Any) -> Stage:
    """What the stage trains, made from the dense model and its moments."""
    import torch
    from transformers import LlamaForCausalLM

    from eclectus.models.pretraining import stages
    from eclectus.models.sharding.blueprint import Blueprint
    from eclectus.models.training import objectives

    stage, domains = settings.pretrain_stage, data.domains
    if stage == "dense_equal_flops":
        config = stages.equal_flops_config(
            dense.model.config,
            settings.lory_experts,
            data.length,
            segment_length=settings.lory_segment,
            routing=settings.lory_routing,
        )
        torch.manual_seed(settings.seed)
        return stages.Stage(Blueprint.of(LlamaForCausalLM(config)), {}, objectives.next_token(domains))
    if stage in ("warmup", "dense"):
        return stages.Stage(dense, moments, objectives.next_token(domains))
    moments = moments if settings.lory_moments == "carry" else {}
    experts = settings.lory_experts
    if stage == "expert_choice":
        return stages.expert_choice_from_dense(dense, moments, domains, experts, settings.seed)
    if stage == "top_k":
        try:
            return stages.top_k_of_dense(dense, moments, domains, experts, settings.baseline_top_k, settings.seed)
        except ValueError as error:
            raise EclectusError(f"baseline_top_k: {error}") from error
    if stage == "document_pools":
        chosen = settings.baseline_top_k, settings.seed, settings.baseline_pool
        try:
            return stages.document_pools_of_dense(dense, moments, domains, experts, *chosen)
        except ValueError as error:
            raise EclectusError(f"baseline_top_k, baseline_pool: {error}") from error
    return stages.lory_from_dense(
        dense,
        moments,
        domains,
        experts,
        segment_length=settings.lory_segment,
        routing=settings.lory_routing,
        first_segment=settings.lory_first_segment,
        router_initializer_range=settings.lory_router_init,
        seed=settings.seed,
    )
