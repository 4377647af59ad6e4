"""Extend: a dense checkpoint learns new languages by MoE-LPR, without forgetting the old ones."""

from __future__ import annotations

from dataclasses import dataclass

from prefect import flow

from flows.curate import Curated, curate
from flows.parameters import CurateParameters, ExtendParameters, PretrainParameters, check
from flows.pretrain import pretrain
from flows.run import once, open_run
from storage.artifact import Artifact
from tasks.extend import ExtendStageSettings
from tasks.extend import extend as train
from tasks.fetch import FetchSettings, fetch
from tasks.upcycle import UpcycleSettings, upcycle


@dataclass(frozen=True)
class Extended:
    curated: Curated
    base: Artifact
    upcycled: Artifact
    post_pretrained: Artifact
    reviewed: Artifact


@flow(name="extend")
def extend(parameters: ExtendParameters = ExtendParameters()) -> Extended:
    """Upcycles a dense checkpoint and trains it on new languages (stage 1), then reviews the old ones (stage 2)."""
    check(parameters)
    with open_run("extend", parameters):
        base, curated = _base(parameters)
        moe = upcycle(checkpoint=base, settings=UpcycleSettings.of(parameters))
        learned = train(
            label="train stage 1",
            instances=curated.expanded,
            checkpoint=moe,
            settings=ExtendStageSettings.of(parameters, extend_stage="post_pretrain"),
        )
        reviewed = train(
            label="train stage 2",
            instances=curated.review,
            checkpoint=learned,
            settings=ExtendStageSettings.of(parameters, extend_stage="review"),
        )
        return Extended(curated, base, moe, learned, reviewed)


def _base(parameters: ExtendParameters) -> tuple[Artifact, Curated]:
    """The dense checkpoint to extend, and instances in its own tokens."""
    if not parameters.base_model:
        pretrained = once(pretrain, PretrainParameters.of(parameters))
        return pretrained.dense, pretrained.curated
    base = fetch(settings=FetchSettings.of(parameters))
    return base, once(curate, CurateParameters.of(parameters, tokenizer=base.path))
