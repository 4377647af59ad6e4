"""`promote`, `rollback` and `champions`: the gate's decision on a checkpoint, and the champion of each line."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pydantic import Field

from eclectus.flows.run import open_run
from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.storage.lineage.champions import PROMOTED, Decision, decisions, record, user_name
from eclectus.tasks.evaluation.training_names import further_training, training_name
from eclectus.tasks.promotion.gate import Gate, read_gates
from eclectus.tasks.promotion.promote import decide, find_base, find_candidate, find_repeats
from eclectus.tasks.settings import Settings


class PromoteParameters(Settings):
    """The checkpoint and the rules of a promotion."""

    checkpoint: str = Field(description="Artifact name or folder of the checkpoint.")
    gate: str = Field(description="YAML file with the rules, as configs/gate.yaml.")
    line: str | None = Field(None, description="Line of champions (default: that of the model's name).")
    force: str | None = Field(None, description="Reason to promote it against the gate.")


def promote(checkpoint: str, gate: str, line: str | None, force: str | None) -> Decision:
    """Applies the gate to a checkpoint's latest evaluations and records the decision; needs no Prefect.

    A user's promotion against the gate (`force`) is recorded after the gate's refusal. Raises EclectusError for a
    checkpoint that was never evaluated, and for a line that is not in the gate's file.
    """
    home = Home.existing(reading=False)
    gates, artifact = read_gates(gate), home.store.find(checkpoint)
    if artifact.kind != "checkpoint":
        raise EclectusError(f"{artifact.name} is no checkpoint, so it cannot be promoted")
    candidate, name, run = find_candidate(home, artifact)
    model, seed = further_training(name) or (name, None)
    chosen = _gate(gates, gate, line, model)
    own_base = chosen.base if seed is None else training_name(chosen.base, seed)
    base = find_base(home, own_base, run) or find_base(home, chosen.base, run)
    parameters = PromoteParameters(checkpoint=checkpoint, gate=str(gate), line=line, force=force)
    with open_run("promote", parameters, home) as opened:
        decision = decide(replace(chosen, model=model), candidate, base, repeats=find_repeats(home, run))
        if force and decision.verdict != PROMOTED:
            decision = replace(
                decision, verdict=PROMOTED, reason=f"{force} (the gate refused: {decision.reason})", by=user_name()
            )
            record(home, decision, opened.id)
    return decision


def rollback(line: str | None = None) -> Decision:
    """Makes the previous champion champion again, with its evaluations; each further rollback goes one further back.

    line: default is the only one with a champion. Raises EclectusError when there is no previous one, or it is damaged.
    """
    home = Home.existing(reading=False)
    promoted = [each for each in decisions(home) if each.verdict == PROMOTED]
    lines = list(dict.fromkeys(each.line for each in promoted))
    if line is None and len(lines) == 1:
        line = lines[0]
    if line not in lines:
        known = (
            f"lines with a champion are {', '.join(lines)}: choose one with --line" if lines else "no line has one yet"
        )
        raise EclectusError(f"line '{line}' has no champion; {known}" if line else f"which line? {known}")
    history = _champion_history([each for each in promoted if each.line == line])
    if len(history) < 2:
        raise EclectusError(f"line '{line}' never had another champion before checkpoint-{history[-1].checkpoint[:12]}")
    before = history[-2]
    if fault := home.store.faults(home.store.find(f"checkpoint-{before.checkpoint}")):
        raise EclectusError(f"the previous champion cannot be restored: {fault}")
    reason = f"rolled back from checkpoint-{history[-1].checkpoint[:12]}"
    back = replace(before, reason=reason, by=user_name())
    record(home, back)
    return back


def _champion_history(promoted: list[Decision]) -> list[Decision]:
    """Champion history as a stack, the current one last; a rollback pops it."""
    history: list[Decision] = []
    for each in promoted:
        if len(history) > 1 and history[-2].checkpoint == each.checkpoint:
            history.pop()
        elif not history or history[-1].checkpoint != each.checkpoint:
            history.append(each)
    return history


def champion_rows(everything: bool) -> tuple[list[str], list[tuple[Any, ...]]]:
    """(column names, rows): the last decision per line, verdict and checkpoint, or all of them."""
    found = decisions(Home.existing())
    champions = {each.line: each for each in found if each.verdict == PROMOTED}
    if not everything:
        found = list({(each.line, each.checkpoint, each.verdict): each for each in found}.values())
    rows = []
    for each in reversed(found):
        state = "champion" if champions.get(each.line) is each else "former champion"
        rows.append(
            (
                each.line,
                state if each.verdict == PROMOTED else "refused",
                f"checkpoint-{each.checkpoint[:12]}",
                (each.logged or "")[:19],
                each.by,
                each.reason,
            )
        )
    return ["line", "is", "checkpoint", "decided", "by", "reason"], rows


def _gate(gates: dict[str, Gate], path: str, line: str | None, model: str) -> Gate:
    if line is None:
        line = next((each.line for each in gates.values() if each.model == model), None)
        if line is None and len(gates) == 1:
            line = next(iter(gates))
    if line not in gates:
        known = ", ".join(gates)
        asked = f"'{line}'" if line else f"for a model evaluated as '{model}'"
        raise EclectusError(f"gate file {path} has no line {asked}; its lines are {known}: choose one with --line")
    return gates[line]
