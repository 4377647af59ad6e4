"""Extension to new languages: MoE-LPR's two training stages on an upcycled checkpoint (papers.md 2.2, 2.3).

    post_pretrain   new experts and routers learn the expanded languages     next-token + alpha * balance
    review          the routers alone replay a little of all languages       next-token + gamma * LPR

The original weights are parameters without gradients, so they cannot move; their hash is checked at every checkpoint all
the same, and a change ends the training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from storage.artifact import Artifact, Draft
from storage.errors import EclectusError
from tasks.settings import Settings
from tasks.step import step
from tasks.training import TrainingSettings, run_training, workplace
from tasks.upcycle import UpcycleSettings

Stage = Literal["post_pretrain", "review"]


class PostPretrainSettings(Settings):
    post_pretrain_steps: int = Field(300, ge=1, description="Training steps of stage 1, on the expanded languages.")
    post_pretrain_batch: int = Field(4, ge=1, description="Instances in a batch of stage 1, over all workers.")
    post_pretrain_learning_rate: float = Field(
        1.5e-4, gt=0, description="Peak learning rate of stage 1 (cosine schedule)."
    )
    post_pretrain_warmup_steps: int = Field(30, ge=0, description="Steps of linear learning-rate warm-up in stage 1.")
    balance_weight: float = Field(0.01, ge=0, description="Weight alpha of the load-balance loss in stage 1.")
    balance_scaling: Literal["paper", "released"] = Field(
        "paper", description="The balance loss as in the paper (uniform routing gives 1) or as released (gives top-k)."
    )


class ReviewSettings(Settings):
    review_steps: int = Field(250, ge=1, description="Training steps of stage 2, the review of all languages.")
    review_batch: int = Field(4, ge=1, description="Instances in a batch of stage 2, over all workers.")
    review_learning_rate: float = Field(
        2e-2, gt=0, description="Peak learning rate of stage 2, which trains routers only."
    )
    review_warmup_steps: int = Field(20, ge=0, description="Steps of linear learning-rate warm-up in stage 2.")
    lpr_weight: float = Field(3.0, ge=0, description="Weight gamma of the language priors routing loss in stage 2.")
    lpr_loss: Literal["paper", "released"] = Field(
        "paper", description="The language priors loss on logits (the paper) or on probabilities (the released code)."
    )


class ExtendSettings(UpcycleSettings, PostPretrainSettings, ReviewSettings, TrainingSettings):
    """Settings of extending a dense checkpoint to new languages."""


class ExtendStageSettings(ExtendSettings):
    """One stage of extension, as a step sees it."""

    extend_stage: Stage = Field(description="Which stage: post_pretrain or review.")
    original_languages: list[str] = Field(description="The languages that the dense model knows, as ISO 639-1 codes.")

    def key_values(self) -> dict[str, Any]:
        """A stage does not depend on the other stage's settings."""
        other = ReviewSettings if self.extend_stage == "post_pretrain" else PostPretrainSettings
        return {name: value for name, value in super().key_values().items() if name not in other.model_fields}

    def stage_value(self, name: str) -> Any:
        return getattr(self, f"{self.extend_stage}_{name}")


@step(makes="checkpoint", version=1)
def extend(instances: Artifact, checkpoint: Artifact, settings: ExtendStageSettings, out: Draft) -> None:
    """Trains one stage on an upcycled checkpoint; gives a stock checkpoint."""
    with workplace("extend", instances, checkpoint, settings.key_values()) as work:
        out.statistics = run_training(
            settings,
            "tasks.extend:train_stage",
            {
                "instances": instances.path,
                "checkpoint": checkpoint.path,
                "settings": settings.model_dump(),
                "work": str(work),
                "out": str(out.path),
            },
            what=f"training {settings.extend_stage.replace('_', '-')}",
        )


def train_stage(
    place: Any, tell: Any, instances: str, checkpoint: str, settings: dict[str, Any], work: str, out: str
) -> dict[str, Any]:
    """Runs on every training worker; rank 0 writes the checkpoint into `out` and returns its statistics."""
    import torch
    from transformers import AutoModelForCausalLM

    from models.experts import frozen_digest, set_trainable, split_experts
    from models.export import export_checkpoint
    from models.instances import Instances
    from models.train import train

    chosen = ExtendStageSettings(**settings)
    data = Instances(instances)
    model = split_experts(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32))
    set_trainable(model, chosen.extend_stage)
    frozen = frozen_digest(model)

    def check_frozen(step: int) -> None:
        if frozen_digest(model) != frozen:
            raise EclectusError(f"an original weight changed before training step {step}; nothing was kept")

    plan = chosen.plan(
        start=0,
        stop=chosen.stage_value("steps"),
        total=chosen.stage_value("steps"),
        batch=chosen.stage_value("batch"),
        learning_rate=chosen.stage_value("learning_rate"),
        warmup=chosen.stage_value("warmup_steps"),
    )
    train(model, data, _objective(chosen, data), plan, place, Path(work), tell, checked=check_frozen)
    check_frozen(plan.stop)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if place.leads:
        export_checkpoint(model, Path(out), side_files=Path(checkpoint))
    return {
        "model": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "parameters_trained": trained,
        "frozen_sha256": frozen,
        "steps": plan.stop,
        "tokens": plan.stop * plan.batch * data.length,
        "epochs": round(plan.stop * plan.batch / len(data), 3),
    }


def _objective(settings: ExtendStageSettings, data: Any) -> Any:
    from models import objectives

    if settings.extend_stage == "post_pretrain":
        return objectives.post_pretrain(settings.balance_weight, settings.extension_top_k, settings.balance_scaling)
    known = [number for number, language in enumerate(data.languages) if language in settings.original_languages]
    return objectives.review(settings.lpr_weight, settings.lpr_loss, known)
