"""Promotion: the gate decides on a checkpoint against base and champion, and the decision is recorded.

    decision = decide(gate, Candidate(checkpoint, {"text": ..., "tasks": ...}), base)          # inside a run
    candidate, name, run = find_candidate(home, checkpoint)                                    # by lineage

`decide` runs the step `gate`, so rules, numbers and evaluations are in an artifact with lineage, and records the
decision (storage/lineage/champions.py). A refused model is recorded with the reason; it is not an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from eclectus.storage.artifact import Artifact
from eclectus.storage.commands import command
from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.storage.lineage.champions import PROMOTED, REFUSED, Decision, decisions, record
from eclectus.storage.lineage.connection import connect
from eclectus.tasks.evaluation.lm_eval_files.imported import imported_for, read_imports
from eclectus.tasks.evaluation.training_names import further_training, training_name
from eclectus.tasks.plan import Planned
from eclectus.tasks.promotion.gate import BASE, CANDIDATE, Gate, GateSettings, gate
from eclectus.tasks.run import Run, require_run

# In a plan, of a gate that has to run.
UNDECIDED = "undecided"
STEPS = {"text": "evaluate", "tasks": "benchmark", "contamination": "contamination"}


@dataclass(frozen=True)
class Candidate:
    """A checkpoint with its evaluations, by kind: `text`, `tasks`, `contamination`, `imported`, `imported 2` ..."""

    checkpoint: Artifact
    evaluations: dict[str, Artifact] = field(default_factory=dict)


def decide(
    gate_file: Gate,
    candidate: Candidate,
    base: Candidate | None,
    others: Sequence[Candidate] = (),
    repeats: Mapping[str, Artifact] | None = None,
) -> Decision:
    """Runs the gate on a candidate and records the decision. Needs a run. Raises EclectusError without evaluation.

    others: models evaluated in the same run. If the champion is among them, that evaluation is used; else the one it
    was promoted with. repeats: evaluations of further trainings of the run's models, by name as "stage 2 seed 1".
    """
    run = require_run("promote.decide")
    past = past_decisions(run, gate_file.line)
    holder = next((each for each in reversed(past) if each.verdict == PROMOTED), None)
    # The champion itself is compared with the one before it, as when it was promoted: the same question again.
    rivals = [each for each in past if each.verdict == PROMOTED and each.checkpoint != candidate.checkpoint.digest]
    opponent = None
    if rivals:
        rival = rivals[-1]
        opponent = next((each.evaluations for each in others if each.checkpoint.digest == rival.checkpoint), None)
        if not opponent:
            find = run.home.store.find
            opponent = {kind: find(f"evaluation-{digest}") for kind, digest in rival.evaluations.items()}
    repeated = _repeats(gate_file, repeats or {}, [candidate, base])
    # The trainings of this run say more than what its own earlier decision measured on them.
    before = [each for each in past if not repeated or each.checkpoint != candidate.checkpoint.digest]
    outcome = gate(
        label=f"gate {gate_file.line}",
        candidate=candidate.evaluations,
        base=base.evaluations if base else None,
        champion=opponent,
        repeats=repeated or None,
        settings=GateSettings(
            gate_line=gate_file.line,
            gate_model=gate_file.model,
            gate_rules=gate_file.rules,
            gate_default_spread=gate_file.default_spread,
            gate_earlier_spreads=_earlier_spreads(run.home, before),
        ),
    )
    if isinstance(outcome, Planned):
        return Decision(gate_file.line, UNDECIDED, candidate.checkpoint.digest, "", gate=outcome.digest)
    result = outcome.statistics
    decision = Decision(
        gate_file.line,
        PROMOTED if result["passed"] else REFUSED,
        candidate.checkpoint.digest,
        result["reason"],
        {kind: each.digest for kind, each in candidate.evaluations.items()},
        outcome.digest,
        result["rules"],
    )
    if holder is None or holder.checkpoint != decision.checkpoint or decision.verdict != holder.verdict:
        run.act(lambda of: record(of.home, decision, of.id))
    return decision


def past_decisions(run: Run, line: str) -> list[Decision]:
    """The decisions of a line before this run, first to last."""
    # While steps run, others may decide: then they are read every time.
    if run.lookup is None:
        return decisions(run.home, line)
    found = run.once_read("decisions", lambda: decisions(run.home, writes=run.writes))
    return [each for each in found if each.line == line]


def _repeats(
    gate_file: Gate, repeats: Mapping[str, Artifact], given: Sequence[Candidate | None]
) -> dict[str, Artifact]:
    """Those of the candidate's model and of the base, under the names that the gate knows; without `given` itself."""
    firsts = [each.evaluations.get("text") for each in given if each]
    chosen = {}
    for name, evaluation in repeats.items():
        model, seed = further_training(name) or ("", 0)
        part = {gate_file.base: BASE, gate_file.model: CANDIDATE}.get(model)
        if part and evaluation not in firsts:
            chosen[training_name(part, seed)] = evaluation
    return chosen


def _earlier_spreads(home: Home, past: Sequence[Decision]) -> dict[str, tuple[float, int]]:
    """Spreads by text that these decisions' gates measured, the latest of each; those whose gate is gone have none."""
    spreads: dict[str, tuple[float, int]] = {}
    for each in past:
        if each.gate:
            try:
                measured = home.store.find(f"evaluation-{each.gate}").statistics.get("spreads", {})
            except EclectusError:
                continue
            spreads |= {text: (relative, trainings) for text, (relative, trainings) in measured.items()}
    return spreads


def find_candidate(home: Home, checkpoint: Artifact, run: str | None = None) -> tuple[Candidate, str, str]:
    """(the checkpoint with its latest evaluations, the model's name in them, their run). run: only evaluations of it.

    Results that were imported for the checkpoint are among them, whenever that was.

    Raises EclectusError when lineage has no evaluation of the checkpoint.
    """
    found: dict[str, Artifact] = {}
    name, evaluated_in = "", ""
    with connect(home) as connection:
        for kind, step in STEPS.items():
            # Contamination has the evaluation of text as its input, not the checkpoint.
            read = checkpoint if kind != "contamination" else found.get("text")
            rows = connection.execute(
                """
                select o.artifact, s.label, s.run
                from steps s join step_inputs i using (step) join step_outputs o using (step)
                where s.name = ? and i.artifact = ? and s.state in ('completed', 'reused') and (? is null or s.run = ?)
                order by s.ended desc limit 1
                """,
                [step, read.digest if read else "", run, run],
            ).fetchall()
            for digest, label, of_run in rows:
                found[kind] = home.store.find(f"evaluation-{digest}")
                if kind == "text":
                    name, evaluated_in = label.removeprefix("evaluate "), of_run
    if "text" not in found:
        raise EclectusError(
            f"{checkpoint.name} was never evaluated here; evaluate it on the sources of its run with "
            f"--evaluate-checkpoints {checkpoint.name} (see: {command('evaluate', '--help', home=home.name)})"
        )
    found |= imported_for(home.store, read_imports(home), checkpoint)
    return Candidate(checkpoint, found), name, evaluated_in


def find_base(home: Home, name: str, run: str) -> Candidate | None:
    """The model of this name that was evaluated in a run, for comparison with a candidate; None if there is none."""
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


def find_repeats(home: Home, run: str) -> dict[str, Artifact]:
    """Evaluations of further trainings in a run, by name as "stage 2 seed 1"."""
    with connect(home) as connection:
        rows = connection.execute(
            """
            select s.label, o.artifact from steps s join step_outputs o using (step)
            where s.run = ? and s.name = 'evaluate' and s.state in ('completed', 'reused') order by s.label
            """,
            [run],
        ).fetchall()
    names = {label.removeprefix("evaluate "): digest for label, digest in rows}
    return {name: home.store.find(f"evaluation-{digest}") for name, digest in names.items() if further_training(name)}
