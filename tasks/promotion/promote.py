"""Promotion: a checkpoint is judged by its gate against base and champion, and the decision goes into the books.

    decision = decide(gate, Candidate(checkpoint, {"text": ..., "tasks": ...}), base)          inside a run
    candidate, label = find_candidate(home, checkpoint)                                        what the lineage knows of one

`decide` runs the step `gate`, so rules, numbers and evaluations lie in an artifact with lineage; and records the decision
(storage/lineage/champions.py). A refused model is a challenger with the reason, never an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from eclectus.storage.artifact import Artifact
from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.storage.lineage.champions import PROMOTED, REFUSED, Decision, champion, record
from eclectus.storage.lineage.connection import connect
from eclectus.tasks.promotion.gate import Gate, GateSettings, gate
from eclectus.tasks.run import require_run

STEPS = {"text": "evaluate", "tasks": "benchmark", "contamination": "contamination"}


@dataclass(frozen=True)
class Candidate:
    """A checkpoint and what is known of it. evaluations: artifacts by kind: `text`, `tasks`, `contamination`."""

    checkpoint: Artifact
    evaluations: dict[str, Artifact] = field(default_factory=dict)


def decide(
    gate_file: Gate,
    candidate: Candidate,
    base: Candidate | None,
    resamples: int = 1000,
    seed: int = 0,
    others: Sequence[Candidate] = (),
) -> Decision:
    """Judges a candidate for its line and records what came of it. Call it in a run. Raises EclectusError without evaluation.

    others: evaluated in the same run. If the champion is among them, it is judged by that; else by what it was promoted with.
    """
    run = require_run("promote.decide")
    holder = champion(run.home, gate_file.line)
    reigning = None
    if holder and holder.checkpoint != candidate.checkpoint.digest:
        anew = next((each.evaluations for each in others if each.checkpoint.digest == holder.checkpoint), None)
        reigning = anew or {
            kind: run.home.store.find(f"evaluation-{digest}") for kind, digest in holder.evaluations.items()
        }
    outcome = gate(
        label=f"gate {gate_file.line}",
        candidate=candidate.evaluations,
        base=base.evaluations if base else None,
        champion=reigning,
        settings=GateSettings(
            gate_line=gate_file.line,
            gate_model=gate_file.model,
            gate_rules=gate_file.rules,
            report_resamples=resamples,
            seed=seed,
        ),
    )
    told = outcome.statistics
    decision = Decision(
        gate_file.line,
        PROMOTED if told["passed"] else REFUSED,
        candidate.checkpoint.digest,
        told["reason"],
        {kind: each.digest for kind, each in candidate.evaluations.items()},
        outcome.digest,
        told["rules"],
    )
    if holder is None or holder.checkpoint != decision.checkpoint or decision.verdict != holder.verdict:
        record(run.home, decision, run.id)
    return decision


def find_candidate(home: Home, checkpoint: Artifact, run: str | None = None) -> tuple[Candidate, str, str]:
    """(the checkpoint with its latest evaluations, the model's name there, the run that made them). run: only of that run.

    Raises EclectusError when the lineage knows of no evaluation of it.
    """
    found: dict[str, Artifact] = {}
    name, last = "", ""
    with connect(home) as connection:
        for kind, step in STEPS.items():
            rows = connection.execute(
                """
                select o.artifact, s.label, s.run from steps s join step_inputs i using (step) join step_outputs o using (step)
                where s.name = ? and i.artifact = ? and s.state in ('completed', 'reused') and (? is null or s.run = ?)
                order by s.ended desc limit 1
                """,
                [
                    step,
                    checkpoint.digest if kind != "contamination" else getattr(found.get("text"), "digest", ""),
                    run,
                    run,
                ],
            ).fetchall()
            for digest, label, of in rows:
                found[kind] = home.store.find(f"evaluation-{digest}")
                if kind == "text":
                    name, last = label.removeprefix("evaluate "), of
    if "text" not in found:
        raise EclectusError(
            f"{checkpoint.name} was never evaluated here; run: eclectus evaluate --evaluate-checkpoints {checkpoint.name}"
        )
    return Candidate(checkpoint, found), name, last


def find_base(home: Home, name: str, run: str) -> Candidate | None:
    """The model of this name that was evaluated in a run, as what the candidate is compared with; None where there is none."""
    with connect(home) as connection:
        row = connection.execute(
            """
            select i.artifact from steps s join step_inputs i using (step)
            where s.run = ? and s.name = 'evaluate' and s.label = ? and i.kind = 'checkpoint' limit 1
            """,
            [run, f"evaluate {name}"],
        ).fetchone()
    if row is None:
        return None
    return find_candidate(home, home.store.find(f"checkpoint-{row[0]}"), run)[0]
