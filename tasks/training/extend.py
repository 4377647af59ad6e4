"""Extension to new languages: MoE-LPR's two training stages, baselines and ablations (docs/methods.md 2.2, 2.3, 2.5).

    post_pretrain   new experts and routers learn the expanded languages     next-token + alpha * balance
    review          the routers alone train on a replay of all languages     next-token + gamma * LPR

The original weights are parameters without gradients, so they cannot change; a hash of all weights that do not train is
still checked at every checkpoint, and a change ends the training. A Lory model is trained in the same two stages with
its own losses (models/extension/lory.py). Other values of `extension_method` are the baselines and ablations of
models/extension/methods.py, which share data, steps and everything else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from eclectus.storage.artifact import Artifact, Draft
from eclectus.storage.errors import EclectusError
from eclectus.tasks.packing.tokenizer import load_tokenizer
from eclectus.tasks.packing.tokenizer_training import labelled_sample
from eclectus.tasks.run import notify
from eclectus.tasks.settings import BASIC, Settings
from eclectus.tasks.step import step
from eclectus.tasks.training.layer_similarity import LayerSimilaritySettings
from eclectus.tasks.training.precision import parameters_in
from eclectus.tasks.training.run_training import TrainingSettings, check_tokens, resume_directory, run_training
from eclectus.tasks.training.unchanged_weights import UnchangedWeights
from eclectus.tasks.training.upcycle import UpcycleSettings
from eclectus.tasks.training.without_torch import without_torch

if TYPE_CHECKING:
    from eclectus.models.extension.recipes import Recipe
    from eclectus.models.training.loop import Report
    from eclectus.models.training.process import Process

Stage = Literal["post_pretrain", "review"]
Method = Literal[
    "moe_lpr", "full", "lora", "llama_pro", "moe_all", "no_review", "no_lpr", "random_experts", "one_stage"
]


MASS_ROWS, ROW_TOKENS = 64, 128
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
    new_words: bool = Field(False, description="Whether the rows that extension_vocabulary added train in stage 1.")
    reordered: bool = Field(
        False, description="Read the instances in an order of the seed's own in the first epoch, too; not as packed."
    )

    def key_values(self) -> dict[str, Any]:
        """Without the settings of the other stage and of other methods, on which the result does not depend."""
        unused = set(
            ReviewSettings.model_fields if self.extend_stage == "post_pretrain" else PostPretrainSettings.model_fields
        )
        if self.extension_method == "one_stage":
            unused = {"review_learning_rate", "review_warmup_steps"}
        unused |= {name for name in ("reordered", "new_words") if not getattr(self, name)}
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


@step(makes="checkpoint", version=4)
def extend(
    instances: Artifact,
    checkpoint: Artifact,
    settings: ExtendStageSettings,
    out: Draft,
    review: Artifact | None = None,
    documents: Artifact | None = None,
) -> None:
    """Trains one stage from the given checkpoint and writes a stock checkpoint.

    review: the instances of the review, for the method that trains on them in its only stage. documents: if the
    vocabulary was extended, those on whose original text it is measured what new words take of the probability.
    """
    if recipe_of(settings.extension_method).mixed and review is None:
        raise EclectusError(
            f"extension_method {settings.extension_method} needs the review's instances as well as the others"
        )
    if settings.extend_stage == "review":
        notify("review", _repeats(settings, instances))
    settings.note_precision()
    with resume_directory("extend", instances, checkpoint, review, settings.key_values()) as work:
        out.statistics = run_training(
            settings,
            train_stage,
            {
                "instances": instances.path,
                "review": review.path if review else None,
                "original": _original_text(documents, checkpoint, work) if documents else None,
                "checkpoint": checkpoint.path,
                "settings": settings.model_dump(),
                "work": str(work),
                "out": str(out.path),
            },
            what=f"training {settings.extend_stage.replace('_', '-')}",
        )
    if settings.extend_stage == "review":
        out.statistics["training_flops"] += checkpoint.statistics.get("training_flops", 0)


def _repeats(settings: ExtendStageSettings, instances: Artifact) -> str:
    """How often the review reads what it has, and how much of it is text of the original languages."""
    packed, read = instances.statistics, settings.review_steps * settings.review_batch
    by_language = packed.get("tokens_by_language", {})
    known = sum(size for language, size in by_language.items() if language in settings.original_languages)
    return (
        f"the review reads its {packed['instances']:,} instances {read / max(1, packed['instances']):.3g} times "
        f"({settings.review_steps} steps of {settings.review_batch}); {known:,} of their "
        f"{sum(by_language.values()):,} tokens are of the original languages"
    )


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

    from eclectus.models.checkpoints.proof import StepZeroError
    from eclectus.models.extension.methods import prove_method, save_method
    from eclectus.models.training.clock import TrainingClock
    from eclectus.models.training.flops import training_costs
    from eclectus.models.training.loop import train
    from eclectus.models.training.parallel import gather_model
    from eclectus.models.training.precision import compute_dtype

    chosen = ExtendStageSettings(**settings)
    data, steps = _data(chosen, instances, review)
    clock = TrainingClock(report, process, Path(work))
    model = _open(chosen, checkpoint)
    check_tokens(data, model, checkpoint)
    unchanged = UnchangedWeights(model, chosen.extension_method)
    try:
        proof = prove_method(model, chosen.extension_method, checkpoint) if process.is_main else None
    except StepZeroError as error:
        raise EclectusError(str(error)) from error
    mass = _new_token_mass(model, original, process)
    plan = chosen.plan(
        start=0,
        stop=steps,
        total=steps,
        batch=chosen.budget.batch,
        learning_rate=chosen.budget.learning_rate,
        warmup=chosen.budget.warmup_steps,
    )
    costs = training_costs(model, plan, process.world, data.length)
    objective = _objective(chosen, data, checkpoint)
    dtype = compute_dtype(chosen.training_precision, process.device)
    if dtype == torch.bfloat16:
        unchanged.hold_in_bfloat16(Path(work) / "frozen.safetensors", restores=process.is_main)
    train(model, data, objective, plan, process, Path(work), clock.report, check=unchanged.check)
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
    gather_model(model, process)
    if process.is_main:
        if (digest := unchanged.restore(steps)) is not None:
            statistics["frozen_sha256"] = digest
        if mass is not None:
            statistics["new_token_mass"] = {"before": mass, "after": _new_token_mass(model, original, process)}
        save_method(model, Path(out), side_files=Path(checkpoint))
        _note_training(Path(out), chosen, data)
    return statistics


def _original_text(documents: Artifact, checkpoint: Artifact, work: Path) -> str:
    """A file with token ids [rows, ROW_TOKENS] of text of the original languages, held out if some is."""
    from eclectus.tasks.packing.text_tokens import TextTokens

    encode, rows = TextTokens(load_tokenizer(checkpoint.path)), list[list[int]]()
    for split in ("heldout", "train"):
        for _, text in labelled_sample(documents, 4 * MASS_ROWS * ROW_TOKENS, split, "original"):
            ids = encode([text])[0]
            rows += [ids[at : at + ROW_TOKENS] for at in range(0, len(ids) - ROW_TOKENS + 1, ROW_TOKENS)]
        if rows:
            break
    path = work / "original_text.npy"
    np.save(path, np.array(rows[:MASS_ROWS], np.int64).reshape(-1, ROW_TOKENS))
    return str(path)


def _new_token_mass(model: Any, original: str | None, process: Process) -> dict[str, float] | None:
    """What new words take of the probability on original text; None without new words or without such text.

    original: of `_original_text`.
    """
    import torch

    from eclectus.models.extension.new_rows import new_token_mass
    from eclectus.models.extension.split_vocabulary import new_rows_of

    if original is None or not process.is_main or not (count := new_rows_of(model.config)):
        return None
    rows = np.load(original)
    return new_token_mass(model, torch.from_numpy(rows), model.config.vocab_size - count) if len(rows) else None


def _data(settings: ExtendStageSettings, instances: str, review: str | None) -> tuple[Any, int]:
    """(instances, training steps); where one stage replaces two, both stages' instances and tokens."""
    from eclectus.models.extension.methods import MixedInstances
    from eclectus.models.training.instances import Instances

    data, steps = Instances(instances, settings.reordered), settings.budget.steps
    if review is None:
        return data, steps
    replayed = settings.review_steps * settings.review_batch
    steps += replayed // settings.post_pretrain_batch
    share = replayed / (replayed + settings.post_pretrain_steps * settings.post_pretrain_batch)
    return MixedInstances(data, Instances(review), share), steps


def _open(settings: ExtendStageSettings, checkpoint: str) -> Any:
    from eclectus.models.extension.methods import open_method, open_review

    try:
        if settings.extend_stage == "review":
            return open_review(checkpoint)
        return open_method(
            settings.extension_method,
            checkpoint,
            lora_rank=settings.lora_rank,
            new_words=settings.new_words,
            new_blocks=settings.llama_pro_blocks or None,
            seed=settings.seed,
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


def _objective(settings: ExtendStageSettings, data: Any, checkpoint: str) -> Any:
    from eclectus.models.checkpoints.tensor_files import read_config
    from eclectus.models.extension import lory as lory_extension
    from eclectus.models.extension.methods import frozen_experts
    from eclectus.models.training import objectives

    config = read_config(Path(checkpoint))
    lory, top_k = config.get("model_type") == "lory", config.get("num_experts_per_tok")
    known = [number for number, language in enumerate(data.languages) if language in settings.original_languages]
    recipe, alpha, scaling = recipe_of(settings.extension_method), settings.balance_weight, settings.balance_scaling
    gamma = settings.lpr_weight if recipe.prior else 0.0
    prior = gamma, settings.lpr_loss, known, frozen_experts(checkpoint)
    if settings.extend_stage == "review":
        return lory_extension.review_lory(gamma, known) if lory else objectives.review(*prior)
    if lory:
        return lory_extension.post_pretrain_lory()
    if recipe.mixed:
        return objectives.one_stage(alpha, config["num_experts_per_tok"], scaling, *prior)
    return objectives.post_pretrain(alpha, top_k, scaling) if top_k else objectives.next_token()
