"""Evaluate: scores of models on held-out documents and tasks, contamination, the gate's decisions, and the report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from prefect import flow

from eclectus.flows.curate import Curated, curate
from eclectus.flows.extend import extend
from eclectus.flows.parameters import (
    CurateParameters,
    EvaluateParameters,
    EvaluationParameters,
    ExtendParameters,
    PretrainParameters,
)
from eclectus.flows.pretrain import pretrain
from eclectus.flows.run import current_home, once, open_run
from eclectus.storage.artifact import Artifact
from eclectus.storage.errors import EclectusError
from eclectus.storage.lineage.champions import Decision
from eclectus.tasks.evaluation.benchmark import BenchmarkSettings, benchmark
from eclectus.tasks.evaluation.contamination import ContaminationSettings, contamination, trained_on
from eclectus.tasks.evaluation.evaluate import EvaluateSettings
from eclectus.tasks.evaluation.evaluate import evaluate as score
from eclectus.tasks.promotion.gate import Gate, read_gates
from eclectus.tasks.promotion.promote import Candidate, decide
from eclectus.tasks.report.report import ReportSettings, report


@dataclass(frozen=True)
class Evaluated:
    """Checkpoints and their evaluations by model name, the gate's decisions by line, and the report.

    benchmarks, contaminations: of the models that have them. left_out: models that were not evaluated, with the reason.
    """

    curated: Curated
    checkpoints: dict[str, Artifact]
    evaluations: dict[str, Artifact]
    report: Artifact
    benchmarks: dict[str, Artifact] = field(default_factory=dict)
    contaminations: dict[str, Artifact] = field(default_factory=dict)
    decisions: dict[str, Decision] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


@flow(name="evaluate")
def evaluate(parameters: EvaluateParameters = EvaluateParameters()) -> Evaluated:
    """Scores models on held-out documents and tasks, applies the gate, and writes the report."""
    parameters.check_together()
    with open_run("evaluate", parameters):
        return evaluate_models(
            *_checkpoints(parameters), parameters, read_gates(parameters.gate) if parameters.gate else {}
        )


def evaluate_models(
    curated: Curated, checkpoints: dict[str, Artifact], parameters: EvaluationParameters, gates: dict[str, Gate]
) -> Evaluated:
    """Scores these models on the held-out documents of the curated data, applies the gates, and writes the report."""
    evaluations, left_out = _score(curated, checkpoints, parameters)
    benchmarks = _benchmark(curated, checkpoints, parameters, left_out)
    seen = _contaminations(curated, checkpoints, evaluations, benchmarks, parameters)
    kinds = {"text": evaluations, "tasks": benchmarks, "contamination": seen}
    candidates: dict[str, Candidate] = {}
    for name in evaluations:
        results = {kind: by_model[name] for kind, by_model in kinds.items() if name in by_model}
        candidates[name] = Candidate(checkpoints[name], results)
    decisions = _decide(gates, candidates, parameters, left_out)
    page = report(
        evaluations=evaluations,
        checkpoints={name: checkpoints[name] for name in evaluations},
        documents=curated.documents,
        grouping=curated.grouping,
        instances={"original": curated.original, "expanded": curated.expanded, "review": curated.review},
        benchmarks=benchmarks,
        contaminations=seen,
        gates={line: current_home().store.find(f"evaluation-{each.gate}") for line, each in decisions.items()},
        settings=ReportSettings.of(parameters, report_left_out=left_out),
    )
    return Evaluated(curated, checkpoints, evaluations, page, benchmarks, seen, decisions, left_out)


def _score(
    curated: Curated, checkpoints: dict[str, Artifact], parameters: EvaluationParameters
) -> tuple[dict[str, Artifact], list[str]]:
    """(evaluations by model, models that failed with the reason). Raises EclectusError if all failed."""
    settings = EvaluateSettings.of(parameters, evaluation_context=parameters.lory_segment)
    evaluations: dict[str, Artifact] = {}
    left_out: list[str] = []
    for name, checkpoint in checkpoints.items():
        try:
            evaluations[name] = score(
                label=f"evaluate {name}",
                documents=curated.documents,
                tokenizer=curated.tokenizer,
                checkpoint=checkpoint,
                settings=settings,
            )
        except EclectusError as error:
            left_out.append(f"{name}: {error}")
    if not evaluations:
        raise EclectusError("no model could be evaluated; " + "; ".join(left_out))
    return evaluations, left_out


def _benchmark(
    curated: Curated, checkpoints: dict[str, Artifact], parameters: EvaluationParameters, left_out: list[str]
) -> dict[str, Artifact]:
    """Results of the chosen tasks by model; models that failed are added to left_out."""
    settings = BenchmarkSettings.of(parameters)
    if not settings.asks:
        return {}
    if settings.benchmark_preset == "moe-lpr" and not settings.benchmark_languages:
        languages = [*parameters.original_languages, *parameters.expanded_languages]
        settings = settings.model_copy(update={"benchmark_languages": languages})
    answers: dict[str, Artifact] = {}
    for name, checkpoint in checkpoints.items():
        try:
            answers[name] = benchmark(
                label=f"benchmark {name}", checkpoint=checkpoint, tokenizer=curated.tokenizer, settings=settings
            )
        except EclectusError as error:
            left_out.append(f"{name}, tasks: {error}")
    return answers


def _contaminations(
    curated: Curated,
    checkpoints: dict[str, Artifact],
    evaluations: dict[str, Artifact],
    benchmarks: dict[str, Artifact],
    parameters: EvaluationParameters,
) -> dict[str, Artifact]:
    """Contamination by model; models whose training data is not in the lineage are skipped."""
    settings = ContaminationSettings.of(parameters)
    seen: dict[str, Artifact] = {}
    for name, evaluation in evaluations.items():
        trained, instances = trained_on(checkpoints[name])
        if instances:
            given: dict[str, Any] = {"benchmark": benchmarks[name]} if name in benchmarks else {}
            seen[name] = contamination(
                label=f"contamination {name}",
                documents=curated.documents,
                trained=trained,
                instances=instances,
                evaluation=evaluation,
                settings=settings,
                **given,
            )
    return seen


def _decide(
    gates: dict[str, Gate], candidates: dict[str, Candidate], parameters: EvaluationParameters, left_out: list[str]
) -> dict[str, Decision]:
    """The gate's decision by line of champions; lines whose model was not evaluated are added to left_out."""
    decisions = {}
    for line, gate in gates.items():
        if gate.model in candidates:
            decisions[line] = decide(
                gate,
                candidates[gate.model],
                candidates.get(gate.base),
                list(candidates.values()),
            )
        else:
            left_out.append(f"gate '{line}': its model '{gate.model}' was not evaluated")
    return decisions


def _checkpoints(parameters: EvaluateParameters) -> tuple[Curated, dict[str, Artifact]]:
    """The models to evaluate: the named checkpoints, or those of pre-training and extension."""
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
            # The report compares with the first model, which must be the one that was extended.
            models = {"lory": extended.base}
        models = (models or {"dense": extended.base}) | extended.checkpoints
    return curated, models
