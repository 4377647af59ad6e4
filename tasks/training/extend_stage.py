"""One stage of an extension, as every training worker runs it: model made, proved, trained and written.

A model that is trained sharded is never whole in a process: each reads its own part (models/sharding/blueprint.py).
"""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eclectus.storage.errors import EclectusError
from eclectus.tasks.training.extend_settings import ExtendStageSettings, recipe_of
from eclectus.tasks.training.run_training import check_tokens
from eclectus.tasks.training.unchanged_weights import UnchangedWeights

if TYPE_CHECKING:
    from eclectus.models.checkpoints.proof import StepZero
    from eclectus.models.sharding.blueprint import Blueprint
    from eclectus.models.training.loop import Report
    from eclectus.models.training.plan import Plan
    from eclectus.models.training.process import Process


def train_stage(
    process: Process,
    report: Report,
    instances: str,
    checkpoint: str,
    settings: dict[str, Any],
    work: str,
    out: str,
    review: str | None = None,
    original: str | None = None,
) -> dict[str, Any]:
    """Runs on every training worker; rank 0 writes the checkpoint into `out`. Returns its statistics."""
    import torch

    from eclectus.models.checkpoints.tensor_files import CheckpointError, read_config
    from eclectus.models.extension.methods import frozen_experts, save_method
    from eclectus.models.forecast.ahead import look_ahead
    from eclectus.models.forecast.job import Job
    from eclectus.models.training.clock import TrainingClock
    from eclectus.models.training.flops import training_costs
    from eclectus.models.training.loop import train
    from eclectus.models.training.parallel import is_sharded
    from eclectus.models.training.precision import compute_dtype

    chosen = ExtendStageSettings(**settings)
    process = chosen.topology(process)
    data, steps = _data(chosen, instances, review)
    clock = TrainingClock(report, process, Path(work))
    plan = plan_of(chosen, steps)
    with blueprint_of(chosen, checkpoint) as blueprint:
        check_tokens(data, blueprint.model, checkpoint)
        costs = training_costs(blueprint.model, plan, process.world, data.length)
        objective = objective_of(chosen, data.languages, read_config(Path(checkpoint)), frozen_experts(checkpoint))
        job = Job.on(data, blueprint.model, objective, plan, process, holds_frozen=True, checks_frozen=True)
        ahead = look_ahead(
            job, process, clock.report, Path(work), costs["flops_per_step"], blueprint.values, chosen.training_forecast
        )
        unchanged = _made(chosen, blueprint, process, plan.sharded)
        proof = _proof(chosen, unchanged.model, checkpoint, process)
        mass = _new_token_mass(unchanged.model, original, process)
        dtype = compute_dtype(chosen.training_precision, process.device)
        if dtype == torch.bfloat16:
            unchanged.hold_in_bfloat16()
        model = unchanged.model
        with ahead:
            train(model, data, objective, plan, process, Path(work), ahead.report, check=unchanged.check)
        # The optimizer is in a circle of references, and would hold its moments while the checkpoint is written.
        gc.collect()
        unchanged.check(plan.stop)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        statistics = {
            "model": type(model).__name__,
            "method": chosen.extension_method,
            **costs,
            "parameters_trained": trained,
            "precision": str(dtype).removeprefix("torch."),
            **clock.read(),
            "steps": plan.stop,
            "tokens": plan.stop * plan.batch * data.length,
            "epochs": round(plan.stop * plan.batch / len(data), 3),
            "step_zero": asdict(proof) if proof else None,
        }
        del model
        together = process if is_sharded(unchanged.model) else None
        if process.is_main or together:
            if (digest := unchanged.restore(steps)) is not None:
                statistics["frozen_sha256"] = digest
            after = _new_token_mass(unchanged.model, original, process)
            if mass is not None:
                statistics["new_token_mass"] = {"before": mass, "after": after}
            try:
                save_method(unchanged.model, Path(out), Path(checkpoint), together)
            except CheckpointError as error:
                raise EclectusError(str(error)) from error
        if process.is_main:
            _note_training(Path(out), chosen, data)
    return statistics


def plan_of(settings: ExtendStageSettings, steps: int) -> Plan:
    """The plan of a stage of so many steps."""
    budget = settings.budget
    return settings.plan(
        start=0,
        stop=steps,
        total=steps,
        batch=budget.batch,
        learning_rate=budget.learning_rate,
        warmup=budget.warmup_steps,
    )


def _made(settings: ExtendStageSettings, blueprint: Blueprint, process: Process, sharded: bool) -> UnchangedWeights:
    try:
        return UnchangedWeights(blueprint, settings.extension_method, process, sharded)
    except ValueError as error:
        raise EclectusError(str(error)) from error


def _proof(settings: ExtendStageSettings, model: Any, checkpoint: str, process: Process) -> StepZero | None:
    """The proof that training starts as the checkpoint, on rank 0."""
    from eclectus.models.checkpoints.proof import StepZeroError
    from eclectus.models.extension.methods import prove_method
    from eclectus.models.training.parallel import is_sharded

    if not is_sharded(model) and not process.is_main:
        return None
    try:
        return prove_method(model, settings.extension_method, checkpoint, process if is_sharded(model) else None)
    except StepZeroError as error:
        raise EclectusError(str(error)) from error


def _new_token_mass(model: Any, original: str | None, process: Process) -> dict[str, float] | None:
    """What new words take of the probability on original text; None without new words or without such text.

    original: of `_original_text`.
    """
    import torch

    from eclectus.models.extension.new_rows import new_token_mass
    from eclectus.models.extension.split_vocabulary import new_rows_of
    from eclectus.models.training.parallel import is_sharded

    if original is None or not (count := new_rows_of(model.config)):
        return None
    rows = np.load(original)
    if not len(rows) or not (process.is_main or is_sharded(model)):
        return None
    return new_token_mass(model, torch.from_numpy(rows), model.config.vocab_size - count)


def _data(settings: ExtendStageSettings, instances: str, review: str | None) -> tuple[Any, int]:
    """(instances, training steps); where one stage replaces two, both stages' instances and tokens."""
    from eclectus.models.extension.methods import MixedInstances
    from eclectus.models.training.instances import Instances

    data, steps = Instances(instances, settings.reordered), settings.budget.steps
    if review is None:
        return data, steps
    replayed = settings.review_steps * settings.review_batch
    steps = mixed_steps(settings)
    share = replayed / (replayed + settings.post_pretrain_steps * settings.post_pretrain_batch)
    return MixedInstances(data, Instances(review), share), steps


def mixed_steps(settings: ExtendStageSettings) -> int:
    """Training steps of one stage that reads both stages' tokens."""
    return settings.budget.steps + settings.review_steps * settings.review_batch // settings.post_pretrain_batch


def blueprint_of(
    settings: ExtendStageSettings, checkpoint: str | Blueprint, frozen: int | Sequence[int] | None = None
) -> Blueprint:
    """What a stage trains. checkpoint, frozen: as `method_blueprint`."""
    from eclectus.models.extension.methods import method_blueprint, review_blueprint

    try:
        if settings.extend_stage == "review":
            return review_blueprint(checkpoint, frozen)
        return method_blueprint(
            settings.extension_method,
            checkpoint,
            lora_rank=settings.lora_rank,
            new_words=settings.new_words,
            new_blocks=settings.llama_pro_blocks or None,
            seed=settings.seed,
            frozen=frozen,
        )
    except ValueError as error:
        raise EclectusError(str(error)) from error


def _note_training(out: Path, settings: ExtendStageSettings, data: Any) -> None:
    """Adds the stage to upcycle.json, if there is one; a later extension and the model card read it."""
    path = out / "upcycle.json"
    if path.is_file():
        made = json.loads(path.read_text())
        stage = {"stage": settings.extend_stage, "method": settings.extension_method, "languages": list(data.languages)}
        made["trained"] = [*made.get("trained", []), stage]
        path.write_text(json.dumps(made, indent=2) + "\n")


def objective_of(
    settings: ExtendStageSettings, languages: Sequence[str], config: Mapping[str, Any], frozen: int | Sequence[int]
) -> Any:
    """The objective of a stage. languages: of the instances. config: config.json of the checkpoint it starts from.

    frozen: its leading experts that stay frozen.
    """
    from eclectus.models.extension import lory as lory_extension
    from eclectus.models.losses import objectives

    lory, top_k = config.get("model_type") == "lory", config.get("num_experts_per_tok")
    known = [number for number, language in enumerate(languages) if language in settings.original_languages]
    recipe, alpha, scaling = recipe_of(settings.extension_method), settings.balance_weight, settings.balance_scaling
    gamma = settings.lpr_weight if recipe.prior else 0.0
    prior = gamma, settings.lpr_loss, known, frozen
    if settings.extend_stage == "review":
        return lory_extension.review_lory(gamma, known) if lory else objectives.review(*prior)
    if lory:
        return lory_extension.post_pretrain_lory()
    if recipe.mixed:
        return objectives.one_stage(alpha, config["num_experts_per_tok"], scaling, *prior)
    return objectives.post_pretrain(alpha, top_k, scaling) if top_k else objectives.next_token()
