"""Pretrain: a Lory model beside its dense twin, from the same warm-up, on the same instances in the same order."""

from __future__ import annotations

from dataclasses import dataclass

from prefect import flow

from flows.curate import Curated, curate
from flows.parameters import CurateParameters, PretrainParameters, check
from flows.run import once, open_run
from storage.artifact import Artifact
from tasks.pretrain import PretrainStageSettings
from tasks.pretrain import pretrain as train


@dataclass(frozen=True)
class Pretrained:
    curated: Curated
    dense: Artifact
    lory: Artifact


@flow(name="pretrain")
def pretrain(parameters: PretrainParameters = PretrainParameters()) -> Pretrained:
    """Pre-trains a Lory model and its dense twin on the original languages."""
    check(parameters)
    with open_run("pretrain", parameters):
        curated = once(curate, CurateParameters.of(parameters))

        def stage(name: str, label: str, start: Artifact | None) -> Artifact:
            return train(
                label=label,
                instances=curated.original,
                tokenizer=curated.tokenizer,
                start=start,
                settings=PretrainStageSettings.of(parameters, pretrain_stage=name),
            )

        warm = stage("warmup", "train dense warm-up", None)
        dense = stage("dense", "train dense", warm)
        lory = stage("lory", "train lory", warm)
        return Pretrained(curated, dense, lory)
