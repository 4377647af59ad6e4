"""Pretrain: a Lory model and its dense twin, from the same warm-up, on the same instances in the same order."""

from __future__ import annotations

from dataclasses import dataclass, field

from prefect import flow

from eclectus.flows.curate import Curated, curate
from eclectus.flows.parameters import CurateParameters, PretrainParameters
from eclectus.flows.run import once, open_run
from eclectus.storage.artifact import Artifact
from eclectus.tasks.training.fetch_model import FetchSettings, fetch
from eclectus.tasks.training.pretrain import FROM_SCRATCH, PretrainStageSettings
from eclectus.tasks.training.pretrain import pretrain as train


@dataclass(frozen=True)
class Pretrained:
    """baselines: the models of `pretrain_baselines`, by name."""

    curated: Curated
    dense: Artifact
    lory: Artifact
    baselines: dict[str, Artifact] = field(default_factory=dict)


@flow(name="pretrain")
def pretrain(parameters: PretrainParameters = PretrainParameters()) -> Pretrained:
    """Pre-trains a Lory model, its dense twin and the chosen baselines on the original languages."""
    parameters.check_together()
    with open_run("pretrain", parameters):
        given = None
        tokens = CurateParameters.of(parameters)
        if parameters.dense_start:
            given = fetch(label="fetch dense start", settings=FetchSettings(base_model=parameters.dense_start))
            tokens = CurateParameters.of(parameters, tokenizer=given.path)
        curated = once(curate, tokens)

        def stage(of: Curated, start: Artifact | None, name: str, label: str, **changes: str) -> Artifact:
            return train(
                label=f"train {label}",
                instances=of.original,
                tokenizer=of.tokenizer,
                start=start,
                settings=PretrainStageSettings.of(parameters, pretrain_stage=name, **changes),
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
