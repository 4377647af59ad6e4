"""Settings of extension to new languages: method, the two stages, and what each stage's result depends on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from eclectus.storage.errors import EclectusError
from eclectus.tasks.settings import BASIC, LaterSetting, Settings
from eclectus.tasks.training.layer_similarity import LayerSimilaritySettings
from eclectus.tasks.training.precision import parameters_in
from eclectus.tasks.training.run_training import TrainingSettings
from eclectus.tasks.training.upcycle import UpcycleSettings
from eclectus.tasks.training.without_torch import without_torch

if TYPE_CHECKING:
    from eclectus.models.extension.recipes import Recipe

Stage = Literal["post_pretrain", "review"]
Method = Literal[
    "moe_lpr", "full", "lora", "llama_pro", "moe_all", "no_review", "no_lpr", "random_experts", "one_stage"
]


# Methods with a second stage, as in models/extension/recipes.py.
REVIEWED = ("moe_lpr", "no_lpr", "random_experts")


class MethodSettings(Settings):
    """How a model is extended to new languages."""

    extension_method: Method = Field(
        "moe_lpr",
        description="moe_lpr, or a baseline or ablation on the same data and steps. Baselines: full (fine-tuning), "
        "lora, llama_pro (new blocks), moe_all (every weight of the mixture). Ablations: no_review, no_lpr (review "
        "without the prior), random_experts, one_stage (both losses on mixed data).",
        json_schema_extra=BASIC,
    )
    lora_rank: int = Field(8, ge=1, description="Rank of the adapters of extension_method lora.")
    llama_pro_blocks: int = Field(
        0, ge=0, description="New blocks of extension_method llama_pro; 0: half as many as the model has."
    )


class PostPretrainSettings(Settings):
    post_pretrain_steps: int = Field(
        300, ge=1, description="Training steps of stage 1, on the expanded languages.", json_schema_extra=BASIC
    )
    post_pretrain_batch: int = Field(4, ge=1, description="Instances in a batch of stage 1, over all workers.")
    post_pretrain_learning_rate: float = Field(
        1.5e-4, gt=0, description="Peak learning rate of stage 1 (cosine schedule)."
    )
    post_pretrain_warmup_steps: int = Field(30, ge=0, description="Steps of linear learning-rate warm-up in stage 1.")
    balance_weight: float = Field(0.01, ge=0, description="Weight alpha of the load-balance loss in stage 1.")
    balance_scaling: Literal["paper", "released"] = Field(
        "paper",
        description="Scale of the balance loss under uniform routing: 1, as in the paper, or top-k, as in the released "
        "code.",
    )


class ReviewSettings(Settings):
    review_steps: int = Field(
        250, ge=1, description="Training steps of stage 2, the review of all languages.", json_schema_extra=BASIC
    )
    review_batch: int = Field(4, ge=1, description="Instances in a batch of stage 2, over all workers.")
    review_learning_rate: float = Field(
        2e-2, gt=0, description="Peak learning rate of stage 2, which trains routers only."
    )
    review_warmup_steps: int = Field(20, ge=0, description="Steps of linear learning-rate warm-up in stage 2.")
    lpr_weight: float = Field(1.0, ge=0, description="Weight gamma of the language priors routing loss in stage 2.")
    lpr_loss: Literal["paper", "released"] = Field(
        "paper",
        description="The language priors routing loss on logits (the paper) or on probabilities (the released code).",
    )


class ExtendSettings(
    UpcycleSettings,
    MethodSettings,
    PostPretrainSettings,
    ReviewSettings,
    TrainingSettings,
    LayerSimilaritySettings,
):
    """Settings of extending a dense checkpoint to new languages."""

    def check_together(self) -> None:
        super().check_together()
        if not self.extends:
            return
        self.check_batch("post_pretrain_batch")
        if self.extension_method in REVIEWED:
            self.check_batch("review_batch")
        if self.extension_expert_budget and self.extension_experts_per_layer:
            raise EclectusError(
                "extension_experts_per_layer and extension_expert_budget both say how many experts a layer gets; "
                "leave one out"
            )

    @property
    def extends(self) -> bool:
        """Whether a model is extended at all; otherwise these settings have no effect."""
        return True


@dataclass(frozen=True)
class StageBudget:
    """Length and learning rate of one stage. batch: instances over all workers."""

    steps: int
    batch: int
    learning_rate: float
    warmup_steps: int


class ExtendStageSettings(MethodSettings, PostPretrainSettings, ReviewSettings, TrainingSettings):
    """Settings of the step `extend`: one stage."""

    extend_stage: Stage = Field(description="Which stage: post_pretrain or review.")
    original_languages: list[str] = Field(description="Languages of the dense model, as ISO 639-1 codes.")
    new_words: bool = LaterSetting(
        False, description="Whether the rows that extension_vocabulary added train in stage 1."
    )
    reordered: bool = LaterSetting(
        False, description="Read the instances in an order of the seed's own in the first epoch, too; not as packed."
    )

    def key_values(self) -> dict[str, Any]:
        """Without the settings of the other stage and of other methods, on which the result does not depend."""
        unused = set(
            ReviewSettings.model_fields if self.extend_stage == "post_pretrain" else PostPretrainSettings.model_fields
        )
        if self.extension_method == "one_stage":
            unused = {"review_learning_rate", "review_warmup_steps"}
        unused |= set() if self.training_compiled else {"training_compiled"}
        unused |= {"lora_rank"} if self.extension_method != "lora" else set()
        unused |= {"llama_pro_blocks"} if self.extension_method != "llama_pro" else set()
        return {name: value for name, value in super().key_values().items() if name not in unused}

    def parameters_of_model(self, inputs: Mapping[str, Any]) -> int:
        return parameters_in(inputs["checkpoint"].path)

    @property
    def budget(self) -> StageBudget:
        if self.extend_stage == "review":
            return StageBudget(
                self.review_steps, self.review_batch, self.review_learning_rate, self.review_warmup_steps
            )
        return StageBudget(
            self.post_pretrain_steps,
            self.post_pretrain_batch,
            self.post_pretrain_learning_rate,
            self.post_pretrain_warmup_steps,
        )


def recipe_of(method: Method) -> Recipe:
    """What a method does: what it starts from, what it trains, whether a review follows."""
    found: Recipe = without_torch("extension/recipes.py").recipe_of(method)
    return found
