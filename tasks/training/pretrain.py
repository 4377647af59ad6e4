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
from typing import TYPE_CHECKING, Any

from eclectus.storage.artifact import Artifact, Draft
from eclectus.storage.errors import EclectusError
from eclectus.tasks.first_losses import keep_first_losses
from eclectus.tasks.step import step
from eclectus.tasks.training.check_base import check_dense_start
from eclectus.tasks.training.pretrain_settings import DENSE, PretrainStageSettings, check_segment
from eclectus.tasks.training.run_training import check_tokens, initial_moments, resume_directory, run_training

if TYPE_CHECKING:
    from transformers import LlamaConfig

    from eclectus.models.checkpoints.proof import StepZero
    from eclectus.models.pretraining.stages import Stage
    from eclectus.models.sharding.blueprint import Blueprint
    from eclectus.models.sharding.slices import Slices
    from eclectus.models.training.loop import Report
    from eclectus.models.training.plan import Plan
    from eclectus.models.training.process import Process


@step(makes="checkpoint", version=5)
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
        keep_first_losses(work, instances)


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
    from eclectus.models.forecast.ahead import look_ahead
    from eclectus.models.forecast.job import Job
    from eclectus.models.pretraining.checkpoint import save_trained, stored_moments
    from eclectus.models.pretraining.routing_profiles import routing_profiles, write_profiles
    from eclectus.models.pretraining.stages import make_causal
    from eclectus.models.training.clock import TrainingClock
    from eclectus.models.training.flops import step_flops, training_costs
    from eclectus.models.training.instances import Instances
    from eclectus.models.training.loop import train
    from eclectus.models.training.parallel import is_sharded
    from eclectus.models.training.precision import is_half
    from eclectus.tasks.packing.tokenizer import load_tokenizer

    chosen = PretrainStageSettings(**settings)
    process = chosen.topology(process)
    data, tokens = Instances(instances, chosen.reordered), load_tokenizer(tokenizer)
    stage = chosen.pretrain_stage
    clock = TrainingClock(report, process, Path(work))
    plan = plan_of(chosen)
    with ExitStack() as files:
        dense = files.enter_context(_dense(start, chosen, data, tokens))
        check_tokens(data, dense.model, start or "warm-up")
        before = step_flops(dense.model, plan, process.world, data.length).times(plan.start)
        made = stage_of(chosen, dense, stored_moments(moments, files), data)
        costs = training_costs(made.blueprint.model, plan, process.world, data.length, before)
        job = Job.on(data, made.blueprint.model, made.objective, plan, process, keeps_moments=stage == "warmup")
        ahead = look_ahead(
            job,
            process,
            clock.report,
            Path(work),
            costs["flops_per_step"],
            made.blueprint.values,
            chosen.training_forecast,
        )
        half, proved = is_half(plan.precision, process.device), _is_proved(chosen, start)
        model = _made(made.blueprint, process, plan.sharded, half and not proved)
        proof = _proof(chosen, model, start, process) if start and proved else None
        if is_sharded(model) and half and proved:
            # The proof computes in float32, the training gathers matrices in bfloat16; sharded modules keep their type.
            del model
            gc.collect()
            model = _made(made.blueprint, process, plan.sharded, half=True)
        # A model from scratch is held by its blueprint.
        dense.values = made.blueprint.values = {}
        with ahead:
            after = train(model, data, made.objective, plan, process, Path(work), ahead.report, made.moments)
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
        profiles = routing_profiles(model, data, chosen.micro_batch, process, plan.document_mask, plan.precision)
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


def plan_of(settings: PretrainStageSettings) -> Plan:
    """The plan of a stage."""
    stage, switch = settings.pretrain_stage, settings.switch_step
    rewarmed = stage not in DENSE and switch and settings.lory_rewarm_steps
    return settings.plan(
        start=0 if settings.from_scratch else switch,
        stop=switch if stage == "warmup" else settings.pretrain_steps,
        total=settings.pretrain_steps,
        batch=settings.pretrain_batch,
        learning_rate=settings.pretrain_learning_rate,
        warmup=settings.pretrain_warmup_steps,
        rewarm=(switch, settings.lory_rewarm_steps) if rewarmed else None,
    )


def _made(blueprint: Blueprint, process: Process, sharded: bool, half: bool = False) -> Any:
    try:
        return blueprint.make(process, sharded, half=half)
    except ValueError as error:
        raise EclectusError(f"the dense checkpoint to start from cannot be opened: {error}") from error


def _is_proved(settings: PretrainStageSettings, start: str | None) -> bool:
    """Whether the stage starts as the checkpoint in `start` computes: not from scratch, nor where experts choose."""
    # A token may be chosen by no expert or by several.
    return start is not None and settings.pretrain_stage != "expert_choice"


def _proof(settings: PretrainStageSettings, model: Any, start: str, process: Process) -> StepZero | None:
    """The proof that the stage starts as the checkpoint in `start`, on rank 0."""
    from eclectus.models.checkpoints.proof import StepZeroError, prove_start
    from eclectus.models.training.parallel import is_sharded

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
    from transformers import LlamaForCausalLM

    from eclectus.models.checkpoints.tokenizer_files import vocabulary_size
    from eclectus.models.sharding.blueprint import Blueprint, stock_blueprint

    if start is not None:
        try:
            return stock_blueprint(start)
        except ValueError as error:
            raise EclectusError(f"the dense checkpoint to start from cannot be opened: {error}") from error
    torch.manual_seed(settings.seed)
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return Blueprint.of(LlamaForCausalLM(dense_config(settings, vocabulary_size(tokenizer), data.length, **special)))


def dense_config(settings: PretrainStageSettings, vocabulary: int, length: int, **fields: Any) -> LlamaConfig:
    """The configuration of a dense model that is trained from scratch. fields: others of LlamaConfig."""
    from transformers import LlamaConfig

    from eclectus.models.lory.config import PRESETS

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
    return LlamaConfig(vocab_size=vocabulary, max_position_embeddings=length, **fields, **shape)


def stage_of(settings: PretrainStageSettings, dense: Blueprint, moments: Mapping[str, Slices], data: Any) -> Stage:
    """What the stage trains, made from the dense model and its moments."""
    import torch
    from transformers import LlamaForCausalLM

    from eclectus.models.losses import objectives
    from eclectus.models.pretraining import stages
    from eclectus.models.sharding.blueprint import Blueprint

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
