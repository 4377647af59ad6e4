"""Evaluate: scores of models on held-out documents and tasks, contamination, the gate's decisions, and the report."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from eclectus.flows.curate import Curated, ReadDocuments, read_documents
from eclectus.flows.extend import extend
from eclectus.flows.flow import flow, once
from eclectus.flows.given_models import find_models, segment
from eclectus.flows.parameters import (
    CurateParameters,
    EvaluateParameters,
    EvaluationParameters,
    ExtendParameters,
    PretrainParameters,
)
from eclectus.flows.pretrain import pretrain
from eclectus.flows.run import name_repeats
from eclectus.storage.artifact import Artifact
from eclectus.storage.errors import EclectusError
from eclectus.storage.lineage.champions import Decision
from eclectus.tasks.evaluation.benchmark import BenchmarkSettings, benchmark
from eclectus.tasks.evaluation.contamination import ContaminationSettings, contamination, trained_on
from eclectus.tasks.evaluation.evaluate import EvaluateSettings
from eclectus.tasks.evaluation.evaluate import evaluate as score
from eclectus.tasks.evaluation.lm_eval_files.imported import imported_in_run
from eclectus.tasks.evaluation.training_names import further_training
from eclectus.tasks.lookup import check_before_work
from eclectus.tasks.packing.tokenizer import TRAINED_HERE, TokenizerSettings, tokenizer
from eclectus.tasks.promotion.gate import Gate, read_gates
from eclectus.tasks.promotion.promote import Candidate, decide
from eclectus.tasks.report.report import ReportSettings, report
from eclectus.tasks.run import require_run
from eclectus.tasks.training.check_base import (
    check_base_to_extend,
    check_dense_start,
    check_to_evaluate,
)


@dataclass(frozen=True)
class Measured:
    """Checkpoints and what was measured on them, by model name.

    curated: only the documents where given models are evaluated. tokenizer: of models that bring none, if any does.
    benchmarks, contaminations: of the models that have them. left_out: models that were not evaluated, with the reason.
    imported: results of `lm_eval` that was run elsewhere, by kind, of the models that have some.
    """

    curated: ReadDocuments
    tokenizer: Artifact | None
    checkpoints: dict[str, Artifact]
    evaluations: dict[str, Artifact]
    benchmarks: dict[str, Artifact]
    contaminations: dict[str, Artifact]
    left_out: list[str]
    imported: dict[str, dict[str, Artifact]]


@dataclass(frozen=True)
class Evaluated(Measured):
    """The report, and the gate's decisions by line.

    repeats, repeated: evaluations and checkpoints of further trainings of these models, by name as "lory seed 1".
    """

    report: Artifact
    decisions: dict[str, Decision]
    repeats: dict[str, Artifact]
    repeated: dict[str, Artifact]


@flow
def evaluate(parameters: EvaluateParameters = EvaluateParameters()) -> Evaluated:
    """Scores models on held-out documents and tasks, applies the gate, and writes the report."""
    gates = read_gates(parameters.gate) if parameters.gate else {}
    if not parameters.evaluate_checkpoints:
        check_before_work(check_models, parameters)
    if parameters.seeds == 1:
        return evaluate_models(*_models(parameters), parameters, gates)
    first, *others = parameters.trainings()
    alone = evaluate_alone(first)
    trained = {each.seed_of_training: _trained(each) for each in others}
    return _conclude(alone, name_repeats({first.seed_of_training: {}} | trained), parameters, gates)


def check_models(parameters: EvaluationParameters) -> None:
    """Raises EclectusError, in seconds, for a given model that the run could not open, extend or evaluate."""
    given = parameters.base_model or parameters.dense_start
    if not given:
        return
    if parameters.base_model and parameters.expanded_languages:
        check_base_to_extend(given, parameters.extension_method, parameters.instance_tokens)
    elif not parameters.base_model:
        check_dense_start(given, parameters.instance_tokens)
    check_to_evaluate(given, given, parameters.evaluation_tokens)


def evaluate_alone(training: EvaluateParameters) -> Evaluated:
    """Evaluates one training of several and reports it, without a gate's decision: that needs the other trainings."""
    evaluated: Evaluated = once(evaluate, EvaluateParameters.of(training, gate=""))
    return evaluated


def evaluate_models(
    curated: ReadDocuments,
    checkpoints: dict[str, Artifact],
    parameters: EvaluationParameters,
    gates: dict[str, Gate],
    repeated: dict[str, Artifact] | None = None,
) -> Evaluated:
    """Scores these models on the held-out documents of the curated data, applies the gates, and writes the report.

    repeated: further trainings of the models, by name as "stage 2 seed 1".
    """
    left_out: list[str] = []
    tokens = curated.tokenizer if isinstance(curated, Curated) else _given_tokenizer(parameters)
    evaluations = _score(curated, tokens, checkpoints, parameters, left_out, parameters.seed_label)
    if not evaluations:
        raise EclectusError("no model could be evaluated; " + "; ".join(left_out))
    benchmarks = _benchmark(tokens, checkpoints, parameters, left_out)
    seen = _contaminations(curated, checkpoints, evaluations, benchmarks, parameters)
    found = {name: imported_in_run(require_run("evaluate"), checkpoints[name]) for name in evaluations}
    imported = {name: each for name, each in found.items() if each}
    measured = Measured(curated, tokens, checkpoints, evaluations, benchmarks, seen, left_out, imported)
    return _conclude(measured, repeated or {}, parameters, gates)


def _conclude(
    measured: Measured, repeated: dict[str, Artifact], parameters: EvaluationParameters, gates: dict[str, Gate]
) -> Evaluated:
    """Scores the further trainings, applies the gates to the first one, and writes the report of all."""
    run = require_run("evaluate")
    curated, evaluations, left_out = measured.curated, measured.evaluations, [*measured.left_out]
    repeats = _score(curated, measured.tokenizer, _distinct(measured, repeated, left_out), parameters, left_out)
    kinds = {"text": evaluations, "tasks": measured.benchmarks, "contamination": measured.contaminations}
    candidates: dict[str, Candidate] = {}
    for name in evaluations:
        results = {kind: by_model[name] for kind, by_model in kinds.items() if name in by_model}
        results |= measured.imported.get(name, {})
        candidates[name] = Candidate(measured.checkpoints[name], results)
    decisions = _decide(gates, candidates, repeats, left_out)
    alone = parameters.seeds == 1 and parameters.training_seed >= 0
    page = report(
        label=f"report seed {parameters.training_seed}" if alone else "report",
        evaluations=evaluations,
        repeats=repeats or None,
        checkpoints={name: measured.checkpoints[name] for name in evaluations},
        documents=curated.documents,
        grouping=curated.grouping if isinstance(curated, Curated) else None,
        instances=_instances(curated),
        benchmarks=measured.benchmarks,
        imported=measured.imported or None,
        contaminations=measured.contaminations,
        gates={line: run.find("evaluation", str(each.gate)) for line, each in decisions.items()},
        settings=ReportSettings.of(parameters, report_left_out=left_out),
    )
    shown = {each.name: getattr(measured, each.name) for each in fields(Measured)} | {"left_out": left_out}
    return Evaluated(**shown, report=page, decisions=decisions, repeats=repeats, repeated=repeated)


def _distinct(measured: Measured, repeated: dict[str, Artifact], left_out: list[str]) -> dict[str, Artifact]:
    """Further trainings that say something of the spread: of models that were evaluated, with weights of their own.

    Those with the same weights as another training are added to left_out: so little data that its order is no choice.
    """
    known = {name: {measured.checkpoints[name].digest} for name in measured.evaluations}
    distinct = {}
    for name, checkpoint in repeated.items():
        model, _ = further_training(name) or (name, 0)
        trained = known.get(model)
        if trained is None:
            continue
        if checkpoint.digest in trained:
            left_out.append(f"{name}: its weights are those of another seed, so it does not count as a training")
        else:
            distinct[name] = checkpoint
            trained.add(checkpoint.digest)
    return distinct


def _instances(curated: ReadDocuments) -> dict[str, Artifact | None]:
    if not isinstance(curated, Curated):
        return {}
    return {"original": curated.original, "expanded": curated.expanded, "review": curated.review}


def _score(
    curated: ReadDocuments,
    tokens: Artifact | None,
    checkpoints: dict[str, Artifact],
    parameters: EvaluationParameters,
    left_out: list[str],
    seed_label: str = "",
) -> dict[str, Artifact]:
    """Evaluations by model; models that failed are added to left_out with the reason."""
    # Those of Lory have no look-ahead, and all read equally much before what is scored.
    context = max([parameters.context, *map(segment, checkpoints.values())])
    settings = EvaluateSettings.of(parameters, evaluation_context=context)
    evaluations: dict[str, Artifact] = {}
    for name, checkpoint in checkpoints.items():
        try:
            evaluations[name] = score(
                label=f"evaluate {name}{seed_label}",
                documents=curated.documents,
                tokenizer=tokens,
                checkpoint=checkpoint,
                settings=settings,
            )
        except EclectusError as error:
            left_out.append(f"{name}: {error}")
    return evaluations


def _benchmark(
    tokens: Artifact | None, checkpoints: dict[str, Artifact], parameters: EvaluationParameters, left_out: list[str]
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
                label=f"benchmark {name}{parameters.seed_label}",
                checkpoint=checkpoint,
                tokenizer=tokens,
                settings=settings,
            )
        except EclectusError as error:
            left_out.append(f"{name}, tasks: {error}")
    return answers


def _contaminations(
    curated: ReadDocuments,
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
                label=f"contamination {name}{parameters.seed_label}",
                documents=curated.documents,
                trained=trained,
                instances=instances,
                evaluation=evaluation,
                settings=settings,
                **given,
            )
    return seen


def _decide(
    gates: dict[str, Gate], candidates: dict[str, Candidate], repeats: dict[str, Artifact], left_out: list[str]
) -> dict[str, Decision]:
    """The gate's decision by line of champions; lines whose model was not evaluated are added to left_out.

    The candidate is the first training, chosen before any score is known; the rules know the spread of all.
    """
    decisions = {}
    for line, gate in gates.items():
        if gate.model in candidates:
            decisions[line] = decide(
                gate,
                candidates[gate.model],
                candidates.get(gate.base),
                list(candidates.values()),
                repeats,
            )
        else:
            left_out.append(f"gate '{line}': its model '{gate.model}' was not evaluated")
    return decisions


def _models(parameters: EvaluateParameters) -> tuple[ReadDocuments, dict[str, Artifact]]:
    """The models to evaluate: the named checkpoints, or those of pre-training and extension."""
    if parameters.evaluate_checkpoints:
        given = parameters.tokenizer != TRAINED_HERE
        chosen = find_models(parameters.evaluate_checkpoints, parameters.evaluation_tokens, given)
        return ReadDocuments(*read_documents(CurateParameters.of(parameters))), chosen
    return _trained_models(parameters)


def _given_tokenizer(parameters: EvaluationParameters) -> Artifact | None:
    """The tokenizer that the user names; models that bring their own do not need one."""
    settings = TokenizerSettings.of(parameters)
    return None if settings.tokenizer == TRAINED_HERE else tokenizer(documents=None, settings=settings)


def _trained_models(parameters: EvaluateParameters) -> tuple[Curated, dict[str, Artifact]]:
    models: dict[str, Artifact] = {}
    if not parameters.base_model:
        pretrained = once(pretrain, PretrainParameters.of(parameters))
        curated = pretrained.curated
        models = pretrained.models
    if parameters.expanded_languages:
        extended = once(extend, ExtendParameters.of(parameters))
        curated = extended.curated
        if parameters.extension_base == "lory" and not parameters.base_model:
            # The report compares with the first model, which must be the one that was extended.
            models = {"lory": extended.base}
        models = (models or {"dense": extended.base}) | extended.checkpoints
    return curated, models


def _trained(training: EvaluateParameters) -> dict[str, Artifact]:
    """The models of a further training; a given base model is not trained again."""
    _, models = _trained_models(training)
    return {name: model for name, model in models.items() if not (training.base_model and name == "dense")}
