"""Extend: new languages for a model by MoE-LPR (docs/methods.md), which keeps the old ones, or by a baseline."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from eclectus.flows.curate import Curated, curate
from eclectus.flows.flow import flow, once
from eclectus.flows.parameters import CurateParameters, ExtendParameters, PretrainParameters
from eclectus.flows.pretrain import pretrain
from eclectus.flows.run import name_repeats
from eclectus.storage.artifact import Artifact
from eclectus.storage.errors import EclectusError
from eclectus.tasks.lookup import check_before_work
from eclectus.tasks.packing.new_vocabulary import check_extendable
from eclectus.tasks.plan import NotMadeYet, Planned
from eclectus.tasks.training.add_experts import AddExpertsSettings, add_experts, kind_of
from eclectus.tasks.training.check_base import check_base_to_extend
from eclectus.tasks.training.extend import extend as train
from eclectus.tasks.training.extend_settings import ExtendStageSettings, recipe_of
from eclectus.tasks.training.extend_vocabulary import ExtendVocabularySettings, extend_vocabulary
from eclectus.tasks.training.fetch_model import FetchSettings, fetch
from eclectus.tasks.training.layer_similarity import LayerSimilaritySettings, layer_similarity
from eclectus.tasks.training.upcycle import UpcycleSettings, upcycle


@dataclass(frozen=True)
class Extended:
    """checkpoints: the trained models, by their names in the report.

    repeated: further trainings of them, as "stage 2 seed 1".
    """

    curated: Curated
    base: Artifact
    upcycled: Artifact | None
    checkpoints: dict[str, Artifact]
    repeated: dict[str, Artifact] = field(default_factory=dict)


@flow
def extend(parameters: ExtendParameters = ExtendParameters()) -> Extended:
    """Upcycles a model and trains it on new languages (stage 1), then reviews the old ones (stage 2)."""
    if parameters.seeds > 1:
        trained = {each.seed_of_training: once(extend, each) for each in parameters.trainings()}
        repeated = name_repeats({seed: each.checkpoints for seed, each in trained.items()})
        return replace(trained[parameters.seed_of_training], repeated=repeated)
    base, curated = _base(parameters)
    start = _with_new_words(parameters, base, curated)
    upcycled = None
    if recipe_of(parameters.extension_method).start == "upcycled":
        upcycled = _with_experts(parameters, start, curated)
    return Extended(curated, base, upcycled, train_on(upcycled or start, curated, parameters))


def train_on(start: Artifact, curated: Curated, parameters: ExtendParameters) -> dict[str, Artifact]:
    """Runs the stages of the method on an upcycled or extended checkpoint; returns the trained checkpoints by name."""
    recipe = recipe_of(parameters.extension_method)
    # A stage that is the same as in MoE-LPR gets the same settings, so that its result is reused.
    own = recipe.mixed or recipe.trained != "post_pretrain" or recipe.start != "upcycled"
    shared: dict[str, Any] = {} if own else {"extension_method": "moe_lpr"}
    shared |= parameters.training
    # Where there are new words, their share of the probability is measured on original text.
    words: dict[str, Any] = {"documents": curated.documents} if parameters.extension_vocabulary else {}
    learned = train(
        label=f"train {'stage 1' if recipe.reviewed else recipe.title}{parameters.seed_label}",
        instances=curated.expanded,
        review=curated.review if recipe.mixed else None,
        checkpoint=start,
        settings=ExtendStageSettings.of(parameters, extend_stage="post_pretrain", new_words=bool(words), **shared),
        **words,
    )
    if not recipe.reviewed:
        return {recipe.title: learned}
    if not recipe.prior:
        shared["lpr_weight"] = 0.0
    reviewed = train(
        label=f"train stage 2{parameters.seed_label}",
        instances=curated.review,
        checkpoint=learned,
        settings=ExtendStageSettings.of(parameters, extend_stage="review", **shared),
        **words,
    )
    return {"stage 1": learned, "stage 2": reviewed}


def _base(parameters: ExtendParameters) -> tuple[Artifact, Curated]:
    """The checkpoint to extend, and instances tokenized by its tokenizer."""
    if not parameters.base_model:
        pretrained = once(pretrain, PretrainParameters.of(parameters))
        return pretrained.lory if parameters.extension_base == "lory" else pretrained.dense, pretrained.curated
    wanted = parameters.base_model, parameters.extension_method, parameters.instance_tokens
    check_before_work(check_base_to_extend, *wanted)
    base = once(_fetch_base, FetchSettings.of(parameters))
    if not Path(parameters.base_model).is_dir():
        # From the hub, or of a .gguf file: its config is known only now.
        check_before_work(check_base_to_extend, *wanted, base.path)
    if parameters.extension_vocabulary and not isinstance(base, Planned):
        check_before_work(check_extendable, base.path, parameters.base_model)
    return base, once(curate, CurateParameters.of(parameters, tokenizer=base.path))


def _with_new_words(parameters: ExtendParameters, base: Artifact, curated: Curated) -> Artifact:
    """The base with rows for the new tokens of its tokenizer, or itself if it gets none."""
    if not parameters.extension_vocabulary:
        return base
    return extend_vocabulary(
        checkpoint=base, tokenizer=curated.tokenizer, settings=ExtendVocabularySettings.of(parameters)
    )


def _fetch_base(settings: FetchSettings) -> Artifact:
    return fetch(settings=settings)


def _kind(parameters: ExtendParameters, base: Artifact) -> str:
    """What the base is; in a plan that has to make it, what it will be."""
    if not isinstance(base, Planned):
        return kind_of(base)
    if not parameters.base_model:
        return parameters.extension_base
    given = Path(parameters.base_model)
    if not given.exists():
        raise NotMadeYet(base.label)
    return kind_of(Artifact(base.kind, base.digest, str(given))) if (given / "config.json").is_file() else "dense"


def _with_experts(parameters: ExtendParameters, base: Artifact, curated: Curated) -> Artifact:
    """The base model with new experts, whether or not it has experts already."""
    kind, seed_label = _kind(parameters, base), parameters.seed_label
    if kind in ("upcycled", "lory upcycled"):
        return base
    if kind != "dense":
        if parameters.extension_method not in ("moe_lpr", "no_review", "no_lpr"):
            raise EclectusError(
                f"extension_method {parameters.extension_method} starts from a dense model, {base.name} has experts "
                "already; choose moe_lpr, no_review or no_lpr, or give the dense base (eclectus export --extract-base)"
            )
        return add_experts(
            label=f"add_experts{seed_label}",
            instances=curated.original,
            checkpoint=base,
            settings=AddExpertsSettings.of(parameters, seed=parameters.seed_of_training),
        )
    similarity = None
    if parameters.extension_expert_budget:
        similarity = layer_similarity(
            label=f"layer_similarity{seed_label}",
            documents=curated.documents,
            checkpoint=base,
            settings=LayerSimilaritySettings.of(parameters),
        )
    changes: dict[str, Any] = {"seed": parameters.seed_of_training}
    if parameters.extension_method == "random_experts":
        changes |= {"extension_init": "drop", "extension_drop_ratio": 1.0}
    return upcycle(
        label=f"upcycle{seed_label}",
        checkpoint=base,
        similarity=similarity,
        settings=UpcycleSettings.of(parameters, **changes),
    )
