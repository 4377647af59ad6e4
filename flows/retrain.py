"""Retrain: the nightly flow. Looks at its sources, trains on from the champion when enough is new, promotes what passes the gate.

A night with nothing new costs a look at the sources and a read of ids. Otherwise what is new is embedded, grouped and packed with
the rest in the champion's own tokens (finished steps and old vectors are reused), the champion is trained on by the method's stages,
on what is new to it and a share of what is not, and judged beside the champion on the same held-out documents. The old champion
stays: `eclectus rollback`. New is what no model of the line was judged with: one that was refused or rolled back is not made again
every night. The first night makes a first model by the flow `extend`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from prefect import flow

from eclectus.flows.curate import Curated, curate, gather
from eclectus.flows.evaluate import Evaluated, judged
from eclectus.flows.extend import extend, train_on
from eclectus.flows.parameters import CurateParameters, ExtendParameters, RetrainParameters, gate_of
from eclectus.flows.run import current_home, once, open_run
from eclectus.storage.artifact import Artifact
from eclectus.storage.lineage.champions import champion, decisions
from eclectus.storage.lineage.history import Made, read_history
from eclectus.tasks.evaluation.contamination import packed_documents
from eclectus.tasks.packing.pack import PackSettings, pack
from eclectus.tasks.promotion.new_documents import NewsSettings, RefreshSettings, news, refresh
from eclectus.tasks.run import require_run, say

EXTENDING = ("upcycle", "add_experts", "extend")


@dataclass(frozen=True)
class Retrained:
    """news: what was new, and the decision to train. evaluated: None where it was not worth it."""

    news: Artifact
    evaluated: Evaluated | None


@flow(name="retrain")
def retrain(parameters: RetrainParameters = RetrainParameters()) -> Retrained:
    """Looks at the sources; trains on from the champion when enough is new; promotes what passes the gate."""
    parameters.check_together()
    with open_run("retrain", parameters):
        gate, find = gate_of(parameters), current_home().store.find
        before = decisions(current_home(), gate.line)
        holder = champion(current_home(), gate.line)
        reigning = find(f"checkpoint-{holder.checkpoint}") if holder else None
        _, documents = gather(parameters)
        told = news(
            documents=documents,
            seen=_packed(_history([each.checkpoint for each in before])),
            model=reigning or (find(f"checkpoint-{before[-1].checkpoint}") if before else None),
            settings=NewsSettings.of(parameters),
        )
        reason = told.statistics["reason"]
        if not told.statistics["train"]:
            last = before[-1]
            judged_last = f"checkpoint-{last.checkpoint[:12]} was {last.verdict} ({last.reason})"
            say("retrain", f"Not trained: {reason}. The model of line '{gate.line}' judged last, {judged_last}.")
            return Retrained(told, None)
        say("retrain", f"Training: {reason}.")
        curated, models = _train_on(reigning, parameters) if reigning else _train_first(parameters)
        evaluated = judged(curated, models, parameters, {gate.line: gate})
        outcome = evaluated.decisions.get(gate.line)
        told_by_gate = f"{outcome.verdict}: {outcome.reason}" if outcome else "; ".join(evaluated.left_out)
        say("retrain", f"Trained, since {reason}. The gate of line '{gate.line}': {told_by_gate}.")
        return Retrained(told, evaluated)


def _train_first(parameters: RetrainParameters) -> tuple[Curated, dict[str, Artifact]]:
    """(what was curated, the models to judge by the names that the gate's file uses)."""
    made = once(extend, ExtendParameters.of(parameters))
    return made.curated, {"dense": made.base, **made.checkpoints}


def _train_on(reigning: Artifact, parameters: RetrainParameters) -> tuple[Curated, dict[str, Artifact]]:
    """The same, from the champion; it and its dense base stand beside what becomes of it."""
    made = _history([reigning.digest])
    curated = once(curate, CurateParameters.of(parameters, tokenizer=reigning.path))
    fresh = refresh(documents=curated.documents, seen=_packed(made), settings=RefreshSettings.of(parameters))
    # A small night's last stretch is padded: dropping it could drop all that is new.
    expanded = pack(
        label="pack tonight",
        documents=fresh,
        tokenizer=curated.tokenizer,
        grouping=curated.grouping,
        settings=PackSettings.of(parameters, pack_group="expanded", pack_remainder="pad"),
    )
    curated = replace(curated, expanded=expanded)
    base = next((each.inputs["checkpoint"] for each in made.values() if each.step in EXTENDING), None)
    models = {"dense": current_home().store.find(f"checkpoint-{base}")} if base else {}
    return curated, {**models, "champion": reigning, **train_on(reigning, curated, parameters)}


def _history(checkpoints: list[str]) -> dict[str, Made]:
    """Everything upstream of these, first things first. checkpoints: digests."""
    run = require_run("retrain")
    return read_history(
        run.home, run.id, [Artifact("checkpoint", each, "") for each in dict.fromkeys(checkpoints)]
    ).made


def _packed(made: dict[str, Made]) -> list[Artifact]:
    return [current_home().store.find(f"documents-{each}") for each in packed_documents(made)]
