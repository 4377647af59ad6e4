"""Retrain: the scheduled flow. Trains on from the champion if enough documents are new; promotes what passes the gate.

A run without new data only lists the sources and reads ids. Otherwise the new documents are embedded, grouped and
packed with the rest in the champion's own tokens (finished steps and existing vectors are reused). The champion is
trained on by the method's stages, on documents that are new to it and a share of known ones, and the result is
evaluated together with the champion on the same held-out documents. `eclectus rollback` returns to the former champion.
Documents count as new until a model of the line was trained on them and evaluated, so a refused or rolled-back model is
not trained again by every scheduled run. The first run trains a first model by the flow `extend`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from eclectus.flows.curate import Curated, curate, pack_settings, read_documents
from eclectus.flows.evaluate import Evaluated, check_models, evaluate_models
from eclectus.flows.extend import extend, train_on
from eclectus.flows.flow import flow, once
from eclectus.flows.parameters import CurateParameters, ExtendParameters, RetrainParameters, gate_of
from eclectus.flows.run import current_home, name_repeats
from eclectus.storage.artifact import Artifact
from eclectus.storage.lineage.champions import PROMOTED
from eclectus.storage.lineage.history import Made
from eclectus.tasks.evaluation.contamination import packed_documents
from eclectus.tasks.lookup import check_before_work
from eclectus.tasks.packing.pack import pack
from eclectus.tasks.plan import Planned
from eclectus.tasks.promotion.new_documents import NewDocumentsSettings, RefreshSettings, news, refresh
from eclectus.tasks.promotion.promote import past_decisions
from eclectus.tasks.run import notify, require_run
from eclectus.tasks.training.check_base import check_base_to_extend

EXTENDING = ("extend_vocabulary", "upcycle", "add_experts", "extend")


@dataclass(frozen=True)
class Retrained:
    """news: the new documents and the decision whether to train. evaluated: None if nothing was trained."""

    news: Artifact
    evaluated: Evaluated | None


@dataclass(frozen=True)
class _Trained:
    """models: to evaluate, by their names in the gate's file. repeated: further trainings, as "stage 2 seed 1"."""

    curated: Curated
    models: dict[str, Artifact]
    repeated: dict[str, Artifact]


@flow
def retrain(parameters: RetrainParameters = RetrainParameters()) -> Retrained:
    """Lists the sources; trains on from the champion if enough documents are new; promotes what passes the gate."""
    gate, find = gate_of(parameters), current_home().store.find
    past = past_decisions(require_run("retrain"), gate.line)
    promoted = next((each for each in reversed(past) if each.verdict == PROMOTED), None)
    current = current_home().store.find_whole(f"checkpoint-{promoted.checkpoint}") if promoted else None
    _, documents = read_documents(parameters)
    found = news(
        documents=documents,
        seen=_packed(_history([each.checkpoint for each in past])),
        model=current or (find(f"checkpoint-{past[-1].checkpoint}") if past else None),
        settings=NewDocumentsSettings.of(parameters),
    )
    # Nothing was trained before, so a plan knows what will be found.
    decided = {"train": True, "reason": ""} if isinstance(found, Planned) and not past else found.statistics
    reason = decided["reason"]
    if not decided["train"]:
        last = past[-1]
        outcome = f"checkpoint-{last.checkpoint[:12]}, was {last.verdict} ({last.reason})"
        notify("retrain", f"Not trained: {reason}. The last evaluated model of line '{gate.line}', {outcome}.")
        return Retrained(found, None)
    notify("retrain", f"Training: {reason}.")
    if current:
        method, tokens = parameters.extension_method, parameters.instance_tokens
        check_before_work(check_base_to_extend, current.name, method, tokens, current.path)
    else:
        check_before_work(check_models, parameters)
    trained = _train_on(current, parameters) if current else _train_first(parameters)
    evaluated = evaluate_models(trained.curated, trained.models, parameters, {gate.line: gate}, trained.repeated)
    decision = evaluated.decisions.get(gate.line)
    outcome = f"{decision.verdict}: {decision.reason}" if decision else "; ".join(evaluated.left_out)
    notify("retrain", f"Trained: {reason}. The gate of line '{gate.line}': {outcome}.")
    return Retrained(found, evaluated)


def _train_first(parameters: RetrainParameters) -> _Trained:
    made = {each.seed_of_training: once(extend, ExtendParameters.of(each)) for each in parameters.trainings()}
    first = made[parameters.seed_of_training]
    # A given base is not trained again.
    bases = {seed: {} if parameters.base_model else {"dense": each.base} for seed, each in made.items()}
    repeated = name_repeats({seed: bases[seed] | each.checkpoints for seed, each in made.items()})
    return _Trained(first.curated, {"dense": first.base, **first.checkpoints}, repeated)


def _train_on(current: Artifact, parameters: RetrainParameters) -> _Trained:
    """Like `_train_first`, from the current champion; the models include the champion and its dense base."""
    made = _history([current.digest])
    # The champion has its new words already; their rows train on.
    curated = once(curate, CurateParameters.of(parameters, tokenizer=current.path, extension_vocabulary=0))
    fresh = refresh(documents=curated.documents, seen=_packed(made), settings=RefreshSettings.of(parameters))
    # The last, shorter instance is padded: with few new documents, dropping it could drop all of them.
    expanded = pack(
        label="pack new documents",
        documents=fresh,
        tokenizer=curated.tokenizer,
        grouping=curated.grouping,
        settings=pack_settings(parameters, fresh, "expanded", pack_remainder="pad"),
    )
    curated = replace(curated, expanded=expanded)
    base = next((each.inputs["checkpoint"] for each in made.values() if each.step in EXTENDING), None)
    models = {"dense": current_home().store.find(f"checkpoint-{base}")} if base else {}
    trained = {each.seed_of_training: train_on(current, curated, each) for each in parameters.trainings()}
    models |= {"champion": current, **trained[parameters.seed_of_training]}
    return _Trained(curated, models, name_repeats(trained))


def _history(checkpoints: list[str]) -> dict[str, Made]:
    """Everything upstream of these checkpoints, given by digest, in the order in which it was made."""
    return require_run("retrain").upstream(Artifact("checkpoint", each, "") for each in dict.fromkeys(checkpoints))


def _packed(made: dict[str, Made]) -> list[Artifact]:
    return [require_run("retrain").find("documents", each) for each in packed_documents(made)]
