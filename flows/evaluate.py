"""Evaluate: scores of every model on held-out documents, and the report that compares them."""

from __future__ import annotations

from dataclasses import dataclass

from prefect import flow

from flows.curate import Curated, curate
from flows.extend import extend
from flows.parameters import CurateParameters, EvaluateParameters, ExtendParameters, PretrainParameters, check
from flows.pretrain import pretrain
from flows.run import current_home, once, open_run
from storage.artifact import Artifact
from tasks.evaluate import EvaluateSettings
from tasks.evaluate import evaluate as score
from tasks.report import ReportSettings, report


@dataclass(frozen=True)
class Evaluated:
    """Checkpoints and their evaluations by the name of the model, and the report."""

    curated: Curated
    checkpoints: dict[str, Artifact]
    evaluations: dict[str, Artifact]
    report: Artifact


@flow(name="evaluate")
def evaluate(parameters: EvaluateParameters = EvaluateParameters()) -> Evaluated:
    """Scores models on held-out documents, by domain and by language, and writes the report."""
    check(parameters)
    with open_run("evaluate", parameters):
        curated, checkpoints = _checkpoints(parameters)
        settings = EvaluateSettings.of(parameters, evaluation_context=parameters.lory_segment)
        evaluations = {
            name: score(
                label=f"evaluate {name}",
                documents=curated.documents,
                tokenizer=curated.tokenizer,
                checkpoint=checkpoint,
                settings=settings,
            )
            for name, checkpoint in checkpoints.items()
        }
        page = report(
            evaluations=evaluations,
            checkpoints=checkpoints,
            documents=curated.documents,
            grouping=curated.grouping,
            instances={"original": curated.original, "expanded": curated.expanded, "review": curated.review},
            settings=ReportSettings.of(parameters),
        )
        return Evaluated(curated, checkpoints, evaluations, page)


def _checkpoints(parameters: EvaluateParameters) -> tuple[Curated, dict[str, Artifact]]:
    """What to score: the named checkpoints, or the models of pre-training and, where languages are added, of extension."""
    if parameters.evaluate_checkpoints:
        store = current_home().store
        chosen = {name: store.find(name) for name in parameters.evaluate_checkpoints}
        return once(curate, CurateParameters.of(parameters)), chosen
    models: dict[str, Artifact] = {}
    if not parameters.base_model:
        pretrained = once(pretrain, PretrainParameters.of(parameters))
        curated = pretrained.curated
        models = {"dense": pretrained.dense, "lory": pretrained.lory, **pretrained.baselines}
    if parameters.expanded_languages:
        extended = once(extend, ExtendParameters.of(parameters))
        curated = extended.curated
        if parameters.extension_base == "lory" and not parameters.base_model:
            # What is kept and lost is told against the first model: the one that was extended.
            models = {"lory": extended.base}
        models = (models or {"dense": extended.base}) | extended.checkpoints
    return curated, models
