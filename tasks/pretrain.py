"""Pre-training on the original languages: a dense LLaMA-shaped model, and Lory out of its first steps.

    dense warm-up   steps [0, w)       one dense model, w = the first 5% by default
    dense           steps [w, total)   the twin goes on as it is
    lory            steps [w, total)   every FFN duplicated into E experts, random routers, a second warm-up of the rate

Both go on from the same weights and AdamW moments and read the same instances in the same order, so what differs is Lory
(papers.md 1.5). AdamW's moments are carried over the switch: an expert that was weighted 1/E sees 1/E of the dense gradient,
so its first moment is divided by E and its second by E squared, and its steps keep their size from the first one on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from storage.artifact import Artifact, Draft
from storage.errors import EclectusError
from tasks.settings import Settings
from tasks.step import step
from tasks.training import MOMENTS, TrainingSettings, initial_moments, run_training, workplace


class ArchitectureSettings(Settings):
    """The shape of a dense model trained from scratch."""

    model_width: int = Field(64, ge=8, description="Width of the model (d).")
    model_layers: int = Field(4, ge=1, description="Transformer layers.")
    model_heads: int = Field(4, ge=1, description="Attention heads; must divide the width.")
    model_key_value_heads: int = Field(4, ge=1, description="Key-value heads (GQA); must divide the heads.")
    model_tied_embeddings: bool = Field(
        False,
        description="One matrix for input and output embeddings. Tokens that training never saw then share a direction, by which "
        "routers tell new languages apart; a small model trained for minutes is worse for it.",
    )
    model_feed_forward: int = Field(172, ge=8, description="Width of the feed-forward network (SwiGLU).")


class LorySettings(Settings):
    """Lory's own settings (papers.md 1)."""

    lory_experts: int = Field(
        8, ge=1, description="Experts E of every layer, merged into one network for each segment."
    )
    lory_segment: int = Field(64, ge=1, description="Tokens T of a routing segment.")
    lory_first_segment: Literal["stop_gradient", "uniform"] = Field(
        "stop_gradient",
        description="How the first segment is routed in training: by itself, detached (the paper), or by uniform weights.",
    )
    lory_router_init: float = Field(0.3, gt=0, description="Standard deviation of the routers' random initial weights.")
    lory_rewarm_steps: int = Field(
        60, ge=0, description="Steps of a second learning-rate warm-up after the switch to experts."
    )
    lory_moments: Literal["carry", "reset"] = Field(
        "carry", description="AdamW's moments at the switch: carried over to the experts, scaled, or reset to zero."
    )


class PretrainSettings(ArchitectureSettings, LorySettings, TrainingSettings):
    """Settings of pre-training."""

    pretrain_steps: int = Field(
        700, ge=2, description="Training steps of the dense and of the Lory model, warm-up included."
    )
    pretrain_batch: int = Field(4, ge=1, description="Instances in a batch, over all workers.")
    pretrain_learning_rate: float = Field(
        4e-3, gt=0, description="Peak learning rate of pre-training (cosine schedule)."
    )
    pretrain_warmup_steps: int = Field(40, ge=0, description="Steps of linear learning-rate warm-up.")
    dense_warmup: float = Field(
        0.05, gt=0, lt=1, description="Part of the steps that train the dense model before its networks become experts."
    )

    def check_shape(self) -> None:
        """Raises EclectusError when width, heads and workers do not fit each other."""
        if self.model_width % self.model_heads or self.model_heads % self.model_key_value_heads:
            raise EclectusError(
                f"model_width {self.model_width}, model_heads {self.model_heads} and model_key_value_heads "
                f"{self.model_key_value_heads} do not fit: each must be a multiple of the next"
            )
        if self.training_workers and self.pretrain_batch % self.training_workers:
            raise EclectusError(
                f"pretrain_batch {self.pretrain_batch} cannot be shared by training_workers {self.training_workers}; make it a multiple"
            )

    @property
    def switch_step(self) -> int:
        """The step at which the dense warm-up ends."""
        return min(self.pretrain_steps - 1, max(1, round(self.dense_warmup * self.pretrain_steps)))


class PretrainStageSettings(PretrainSettings):
    """One stage of pre-training, as a step sees it."""

    pretrain_stage: Literal["warmup", "dense", "lory"] = Field(
        description="Which stage: dense warm-up, dense twin or Lory."
    )

    def key_values(self) -> dict[str, Any]:
        """Dense stages do not depend on Lory's settings: a change of those leaves the twin as it is."""
        values = super().key_values()
        return (
            values
            if self.pretrain_stage == "lory"
            else {k: v for k, v in values.items() if k not in LorySettings.model_fields}
        )


@step(makes="checkpoint", version=1)
def pretrain(
    instances: Artifact, tokenizer: Artifact, settings: PretrainStageSettings, out: Draft, start: Artifact | None = None
) -> None:
    """Trains one stage. start: the checkpoint of the dense warm-up, for the stages `dense` and `lory`."""
    if (settings.pretrain_stage == "warmup") != (start is None):
        raise EclectusError(
            f"stage '{settings.pretrain_stage}' of pre-training starts from the dense warm-up, and only that from nothing"
        )
    settings.check_shape()
    with workplace("pretrain", instances, tokenizer, start, settings.key_values()) as work:
        out.statistics = run_training(
            settings,
            "tasks.pretrain:train_stage",
            {
                "instances": instances.path,
                "tokenizer": tokenizer.path,
                "settings": settings.model_dump(),
                "start": start.path if start else None,
                "moments": initial_moments(start),
                "work": str(work),
                "out": str(out.path),
            },
            what=f"training {settings.pretrain_stage}",
        )


def train_stage(
    place: Any,
    tell: Any,
    instances: str,
    tokenizer: str,
    settings: dict[str, Any],
    start: str | None,
    moments: str | None,
    work: str,
    out: str,
) -> dict[str, Any]:
    """Runs on every training worker; rank 0 writes the checkpoint into `out` and returns its statistics."""
    from models import objectives
    from models.checkpoint import load_moments_file, save_model
    from models.instances import Instances
    from models.train import train
    from tasks.tokenizer import load_tokenizer

    chosen = PretrainStageSettings(**settings)
    data, tokens, state = Instances(instances), load_tokenizer(tokenizer), load_moments_file(moments)
    stage, switch = chosen.pretrain_stage, chosen.switch_step
    if stage == "lory":
        model, state = _lory(start, chosen, state)
    else:
        model = _dense(start, chosen, data, tokens)
    plan = chosen.plan(
        start=0 if stage == "warmup" else switch,
        stop=switch if stage == "warmup" else chosen.pretrain_steps,
        total=chosen.pretrain_steps,
        batch=chosen.pretrain_batch,
        learning_rate=chosen.pretrain_learning_rate,
        warmup=chosen.pretrain_warmup_steps,
        rewarm=(switch, chosen.lory_rewarm_steps) if stage == "lory" and chosen.lory_rewarm_steps else None,
    )
    objective = objectives.lory(data.domains) if stage == "lory" else objectives.next_token(data.domains)
    after = train(model, data, objective, plan, place, Path(work), tell, state)
    save_model(model, tokens, Path(out), after if stage == "warmup" else None, MOMENTS, place)
    return {
        "model": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": plan.stop,
        "tokens": (plan.stop if stage == "warmup" else chosen.pretrain_steps) * plan.batch * data.length,
        "epochs": round(plan.stop * plan.batch / len(data), 3),
    }


def _dense(start: str | None, settings: PretrainStageSettings, data: Any, tokenizer: Any) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if start is not None:
        return LlamaForCausalLM.from_pretrained(start, dtype=torch.float32)
    torch.manual_seed(settings.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings.model_width,
            intermediate_size=settings.model_feed_forward,
            num_hidden_layers=settings.model_layers,
            num_attention_heads=settings.model_heads,
            num_key_value_heads=settings.model_key_value_heads,
            max_position_embeddings=data.length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            tie_word_embeddings=settings.model_tied_embeddings,
        )
    )


def _lory(start: str, settings: PretrainStageSettings, moments: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The dense warm-up's model with duplicated experts, and AdamW's moments for it."""
    import torch
    from transformers import LlamaForCausalLM

    from models.checkpoint import duplicated_moments
    from models.lory import LoryForCausalLM

    model = LoryForCausalLM.from_dense(
        LlamaForCausalLM.from_pretrained(start, dtype=torch.float32),
        num_experts=settings.lory_experts,
        segment_length=settings.lory_segment,
        first_segment=settings.lory_first_segment,
        router_initializer_range=settings.lory_router_init,
        seed=settings.seed,
    )
    return model, duplicated_moments(moments, settings.lory_experts) if settings.lory_moments == "carry" else {}
