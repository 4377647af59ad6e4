"""The gate: decides by a small file of rules whether a model may replace the champion. A failed gate is not an error.

    lines:
      extended:                 champions are kept by line
        model: stage 2          the model that the flow evaluates for this line
        base: dense             the model that retention and `base` refer to
        rules:
          - retention.original >= 0.99
          - bits_per_byte.expanded <= champion + 2 * spread
    default_spread: 0.01        what `spread` is while nobody measured it (tasks/promotion/spread.py); optional

The step below is a pure function: rules and evaluations in, `decision.json` out (which rules hold, with numbers and
reasons). The champions are in the journal (storage/lineage/champions.py); tasks/promotion/promote.py combines the two.
Cost: milliseconds per rule.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from eclectus.storage.artifact import Artifact, Draft
from eclectus.storage.errors import EclectusError
from eclectus.tasks.allowed_paths import open_allowed
from eclectus.tasks.evaluation.routing_statistics import collapsed_layers
from eclectus.tasks.evaluation.scores import Scores, read_trainings
from eclectus.tasks.evaluation.task_scores import Answers
from eclectus.tasks.promotion.gate_rules import Missing, ModelResults, Rule, check, text_of
from eclectus.tasks.promotion.spread import DEFAULT, Spreads, measure_spread
from eclectus.tasks.settings import Settings
from eclectus.tasks.step import step

CANDIDATE, BASE = "candidate", "base"


@dataclass(frozen=True)
class Gate:
    """One line of champions: which model is evaluated, against which base, by which rules."""

    line: str
    model: str
    base: str
    rules: list[str]
    default_spread: float = DEFAULT


class GateSettings(Settings):
    """The rules that a model must meet."""

    gate_line: str = Field("default", description="Line of champions that the model would join.")
    gate_model: str = Field("", description="Name of the model in its run, for display.")
    gate_rules: list[str] = Field([], description="Rules, as in configs/gate.yaml; all must hold.")
    gate_default_spread: float = Field(
        DEFAULT, ge=0, description="Relative spread of bits per byte between trainings, where none was measured."
    )
    gate_earlier_spreads: dict[str, tuple[float, int]] = Field(
        {}, description="Spread and number of trainings by text, measured at an earlier decision of the line."
    )


def read_gates(path: str | Path) -> dict[str, Gate]:
    """The gates of a file by line. Raises EclectusError naming file, line and rule."""
    try:
        with open_allowed(path, f"gate file {path}") as file:
            content = yaml.safe_load(file.read().decode("utf-8"))
    except OSError as error:
        raise EclectusError(f"gate file {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise EclectusError(f"gate file {path} is not YAML: {' '.join(str(error).split())}") from error
    lines = content.get("lines") if isinstance(content, dict) else None
    if not isinstance(lines, dict) or not lines:
        raise EclectusError(f"gate file {path} has no 'lines'; see configs/gate.yaml for an example")
    spread = content.get("default_spread", DEFAULT)
    if isinstance(spread, bool) or not isinstance(spread, int | float) or not 0 <= spread < 1:
        raise EclectusError(
            f"gate file {path}: default_spread is {spread!r}; expected a share of bits per byte, such as 0.01"
        )
    return {str(line): _read_gate(path, str(line), each, float(spread)) for line, each in lines.items()}


def _read_gate(path: str | Path, line: str, content: Any, default_spread: float) -> Gate:
    known = {"model", "base", "rules"}
    if not isinstance(content, dict) or set(content) - known:
        wrong = ", ".join(map(str, sorted(set(content) - known))) if isinstance(content, dict) else str(content)
        raise EclectusError(
            f"gate file {path}, line '{line}': '{wrong}' is unknown; expected {', '.join(sorted(known))}"
        )
    rules = content.get("rules")
    if not isinstance(rules, list) or not rules or not all(isinstance(rule, str) for rule in rules):
        raise EclectusError(
            f"gate file {path}, line '{line}': 'rules' must be a list of rules, as in 'retention.en >= 0.99'"
        )
    for rule in rules:
        try:
            Rule.read(rule)
        except EclectusError as error:
            raise EclectusError(f"gate file {path}, line '{line}': {error}") from error
    return Gate(line, str(content.get("model", "stage 2")), str(content.get("base", "dense")), rules, default_spread)


@step(makes="evaluation", version=4)
def gate(
    candidate: dict[str, Artifact],
    settings: GateSettings,
    out: Draft,
    base: dict[str, Artifact] | None = None,
    champion: dict[str, Artifact] | None = None,
    repeats: dict[str, Artifact] | None = None,
) -> None:
    """Checks every rule on a model's evaluations.

    candidate, base, champion: by kind, `text` (tasks/evaluation/evaluate.py) and optionally `tasks`
    (tasks/evaluation/benchmark.py), `imported`, `imported 2` ... (tasks/evaluation/lm_eval_files/import_results.py) and
    `contamination` (tasks/evaluation/contamination.py).
    repeats: evaluations on text of further trainings, as "candidate seed 1" and "base seed 1".
    """
    given = {CANDIDATE: candidate, BASE: base or {}}
    texts = {name: each["text"] for name, each in given.items() if "text" in each}
    scores = read_trainings(texts, repeats)
    model = read_results("the candidate", candidate, scores.get(CANDIDATE))
    start = read_results("the base", base, scores.get(BASE)) if base else None
    best = read_results("the champion", champion) if champion else None
    rules = [Rule.read(rule) for rule in settings.gate_rules]
    spreads = Spreads(settings.gate_earlier_spreads, settings.gate_default_spread)
    outcomes = [check(rule, model, start, best, spreads) for rule in rules]
    failed = [each for each in outcomes if not each.passed]
    reason = (
        "; ".join(f"{each.reason} (rule '{each.rule}')" for each in failed)
        if failed
        else f"all {len(outcomes)} rules hold"
    )
    out.rows = len(outcomes)
    out.statistics = {
        "line": settings.gate_line,
        "model": settings.gate_model,
        "passed": not failed,
        "reason": reason,
        "rules": [each.row() for each in outcomes],
        "spreads": _measured_spreads(rules, model),
    }
    out.file("decision.json").write_text(json.dumps(out.statistics, indent=1, ensure_ascii=False), "utf-8")


def _measured_spreads(rules: list[Rule], model: ModelResults) -> dict[str, tuple[float, int]]:
    """(relative spread, trainings) by text of the rules with a spread, as far as this run measured it."""
    measured = {}
    for rule in rules:
        if rule.spread:
            try:
                text, labels = text_of(rule, model)
            except Missing:
                continue
            if spread := measure_spread(model.scores, labels):
                measured[text] = spread
    return measured


def read_results(name: str, evaluations: dict[str, Artifact], scores: Scores | None = None) -> ModelResults:
    """A model's evaluations as the rules read them. Raises EclectusError if the one on held-out text is missing.

    scores: those on held-out text, if they were read already.
    """
    if "text" not in evaluations:
        raise EclectusError(f"{name} has no evaluation on held-out text; evaluate it first")
    answers = Answers.of(name, evaluations)
    tasks = {key: row["score"] for key, row in answers.rows.items() if row["score"] is not None} if answers else {}
    scores = scores or Scores.read(name, evaluations["text"])
    numbers = {"collapsed_layers": float(len(collapsed_layers(scores.routing)))}
    if evaluations.get("contamination"):
        numbers["contamination"] = evaluations["contamination"].statistics["share"]
    return ModelResults(name, scores, tasks, numbers, answers)
