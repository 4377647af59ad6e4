"""Settings of pre-training: the architecture, Lory's routing, and what one stage is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field

from eclectus.storage.errors import EclectusError
from eclectus.tasks.settings import BASIC, LaterSetting, Settings
from eclectus.tasks.training.precision import LARGE, dense_parameters, parameters_in, vocabulary_in
from eclectus.tasks.training.run_training import TrainingSettings

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
        description="Dense LLaMA checkpoint to start from instead of a warm-up from scratch: a folder, a .gguf file, "
        "an artifact's name or tag, or a name on the hub. Its tokenizer is used; model settings have no effect. Empty: "
        "train one.",
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
    reordered: bool = LaterSetting(
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

    @classmethod
    def recorded(cls, values: Mapping[str, Any]) -> Self:
        """As in `Settings`; keys say only whether there was a checkpoint to start from, which is an input."""
        start = "a checkpoint" if values.get("dense_start") else ""
        return super().recorded({**values, "dense_start": start})

    def key_values(self) -> dict[str, Any]:
        """Without settings that the stage does not depend on; so a change of Lory's reuses the dense twin."""
        # The list of baselines changes no stage; the checkpoint to start from is an input.
        values = {k: v for k, v in super().key_values().items() if k != "pretrain_baselines"}
        values["dense_start"] = bool(self.dense_start)
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


def check_segment(settings: PretrainSettings, length: int) -> None:
    """Raises EclectusError for segments that leave no second one in instances of this many tokens."""
    if settings.trains_routers and settings.lory_segment >= length:
        raise EclectusError(
            f"lory_segment {settings.lory_segment} leaves no second segment in instances of {length} tokens, so no "
            "router would ever learn; lower it, or raise instance_tokens"
        )
