"""Pretrain: a Lory model and its dense twin, from the same warm-up, on the same instances in the same order."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from eclectus.flows.curate import Curated, curate
from eclectus.flows.flow import flow, once
from eclectus.flows.parameters import CurateParameters, PretrainParameters
from eclectus.flows.run import name_repeats
from eclectus.storage.artifact import Artifact
from eclectus.tasks.lookup import check_before_work
from eclectus.tasks.training.check_base import check_dense_start
from eclectus.tasks.training.fetch_model import FetchSettings, fetch
from eclectus.tasks.training.pretrain import pretrain as train
from eclectus.tasks.training.pretrain_settings import FROM_SCRATCH, PretrainStageSettings


@dataclass(frozen=True)
class Pretrained:
    """baselines: the models of `pretrain_baselines`, by name. repeated: further trainings, as "lory seed 1"."""

    curated: Curated
    dense: Artifact
    lory: Artifact
    baselines: dict[str, Artifact] = field(default_factory=dict)
    repeated: dict[str, Artifact] = field(default_factory=dict)

    @property
    def models(self) -> dict[str, Artifact]:
        """The models of one training by name."""
        return {"dense": self.dense, "lory": self.lory, **self.baselines}


@flow
def pretrain(parameters: PretrainParameters = PretrainParameters()) -> Pretrained:
    """Pre-trains a Lory model, its dense twin and the chosen baselines on the original languages."""
    if parameters.seeds > 1:
        # Models of one seed share warm-up and order of instances, so that they can be compared in pairs.
        trained = {each.seed_of_training: once(pretrain, each) for each in parameters.trainings()}
        repeated = name_repeats({seed: each.models for seed, each in trained.items()})
        return replace(trained[parameters.seed_of_training], repeated=repeated)
    given = None
    tokens = CurateParameters.of(parameters)
    if parameters.dense_start:
        check_before_work(check_dense_start, parameters.dense_start, parameters.instance_tokens)
        given = once(_fetch_start, FetchSettings(base_model=parameters.dense_start))
        if not Path(parameters.dense_start).is_dir():
            check_before_work(check_dense_start, parameters.dense_start, parameters.instance_tokens, given.path)
        tokens = CurateParameters.of(parameters, tokenizer=given.path)
    curated = once(curate, tokens)

    def stage(of: Curated, start: Artifact | None, name: str, label: str, **changes: str) -> Artifact:
        return train(
            label=f"train {label}{parameters.seed_label}",
            instances=of.original,
            tokenizer=of.tokenizer,
            start=start,
            settings=PretrainStageSettings.of(parameters, pretrain_stage=name, **parameters.training, **changes),
        )

    warm = given or stage(curated, None, "warmup", "dense warm-up")
    dense = stage(curated, warm, "dense", "dense")
    lory = stage(curated, warm, "lory", "lory")
    baselines: dict[str, Artifact] = {}
    for name in parameters.pretrain_baselines:
        if name == "prefix":
            baselines[name] = stage(curated, warm, "lory", name, lory_routing="prefix")
        elif name == "random":
            at_random = once(curate, tokens.model_copy(update={"grouping": "random"}))
            start = given or stage(at_random, None, "warmup", "dense warm-up random")
            for model in ("dense", "lory"):
                baselines[f"{model} random"] = stage(at_random, start, model, f"{model} random")
        else:
            baselines[name] = stage(curated, None if name in FROM_SCRATCH else warm, name, name)
    return Pretrained(curated, dense, lory, baselines)


def _fetch_start(settings: FetchSettings) -> Artifact:
    return fetch(label="fetch dense start", settings=settings)
