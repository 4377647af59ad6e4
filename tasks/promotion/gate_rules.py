"""The rules of a gate: reading a rule, and checking whether it holds. One rule is one line, as in configs/gate.yaml:

    retention.en >= 0.99                    the base's bits per byte on English over the model's; 1 is nothing forgotten
    retention.original.low >= 0.98          the lower end of its 95% interval (tasks/evaluation/changes.py)
    bits_per_byte.el <= champion            on the documents that both scored; `champion * 1.01` allows 1% more
    bits_per_byte.el <= champion + 2 * spread    allows what two trainings of the same model may differ by (spread.py)
    acc.arc_easy >= base - 0.02             a metric of a task, against the model that training started from; with its
                                            filter where the task has several: exact_match,strict-match.gsm8k
    contamination <= 0.01                   share of items and documents that were seen in training
    collapsed_layers <= 0                   layers whose router has collapsed

A name is a measure and, after dots, what it is measured on: a language, `original` or `expanded`, a domain, a task. A
missing measure fails its rule and is reported, and so does a task that was asked otherwise of the other model; a
comparison with the champion holds if there is none. A rule is about one checkpoint: its values are those of this
training, ends of intervals cover the run's other trainings too.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from eclectus.storage.errors import EclectusError
from eclectus.tasks.documents.language_codes import language_name, normalise
from eclectus.tasks.evaluation.changes import Change, compare
from eclectus.tasks.evaluation.scores import Scores
from eclectus.tasks.evaluation.task_scores import Answers, incomparable
from eclectus.tasks.promotion.spread import NOTHING_MEASURED, Spread, Spreads

OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt, "==": operator.eq
}  # fmt: skip
TEXT_MEASURES = ("bits_per_byte", "perplexity", "retention", "gain")
BOUNDS = ("low", "high")
_RULE = re.compile(r"^\s*([\w.,\- ]+?)\s*(>=|<=|==|>|<)\s*(.+?)\s*$")
_NUMBER = r"\d+(?:\.\d+)?"
_LIMIT = re.compile(rf"^(champion|base)(?:\s*([*+-])\s*({_NUMBER}))?$")
_WITH_SPREAD = re.compile(rf"^(champion|base|-?{_NUMBER})\s*([+-])\s*(?:({_NUMBER})\s*\*\s*)?spread$")


@dataclass(frozen=True)
class Rule:
    """A rule. text: as written. of: what it is measured on. limit: a number, `champion` or `base`.

    change: of the limit, as (sign, number). spread: whether the number counts spreads.
    """

    text: str
    measure: str
    of: tuple[str, ...]
    sign: str
    limit: float | str
    change: tuple[str, float] | None = None
    spread: bool = False

    @property
    def labels(self) -> tuple[str, ...]:
        """`of` without an end of the interval."""
        return self.of[:-1] if self.of and self.of[-1] in BOUNDS else self.of

    @classmethod
    def read(cls, text: str) -> Rule:
        """Parses a rule. Raises EclectusError with the rule and an example."""
        found = _RULE.match(text)
        if not found:
            raise EclectusError(
                f"rule '{text}' is not understood; expected 'MEASURE OPERATOR LIMIT', as in 'retention.en >= 0.99'"
            )
        name, sign, limit = found.groups()
        measure, *of = name.split(".")
        if spread := _WITH_SPREAD.match(limit):
            if measure not in TEXT_MEASURES:
                raise EclectusError(f"rule '{text}': only {', '.join(TEXT_MEASURES)} have a spread; give a number")
            start = spread[1] if spread[1] in ("champion", "base") else float(spread[1])
            return cls(text, measure, tuple(of), sign, start, (spread[2], float(spread[3] or 1)), True)
        if against := _LIMIT.match(limit):
            change = (against[2], float(against[3])) if against[2] else None
            return cls(text, measure, tuple(of), sign, against[1], change)
        try:
            value = float(limit)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise EclectusError(
                f"rule '{text}' has the limit '{limit}'; expected a number, 'champion' or 'base', optionally followed "
                "by '* 1.01', '- 0.02' or '+ 2 * spread'"
            )
        return cls(text, measure, tuple(of), sign, value)


@dataclass(frozen=True)
class Outcome:
    """The result of a rule. value, limit: None if unknown."""

    rule: str
    passed: bool
    value: float | None
    limit: float | None
    reason: str

    def row(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class ModelResults:
    """Evaluations of one model: scores on held-out text, tasks {(task, metric): score}, other numbers by measure.

    answers: what the tasks' scores are of; None for scores that need no comparison.
    """

    name: str
    scores: Scores
    tasks: dict[tuple[str, str], float]
    numbers: dict[str, float]
    answers: Answers | None = None


class Missing(Exception):
    """A measure is missing; the message says which and why."""


def check(
    rule: Rule,
    model: ModelResults,
    base: ModelResults | None,
    champion: ModelResults | None,
    spreads: Spreads = NOTHING_MEASURED,
) -> Outcome:
    """Whether a rule holds for a model."""
    try:
        if rule.limit == "champion" and champion is None:
            return Outcome(rule.text, True, _maybe(rule, model, base), None, "there is no other champion")
        other = {"champion": champion, "base": base}.get(rule.limit) if isinstance(rule.limit, str) else None
        if isinstance(rule.limit, str) and other is None:
            raise Missing(f"the {rule.limit} was not evaluated")
        value, limit, on = _both(rule, model, base, other)
        spread = _spread(rule, model, spreads)
    except Missing as error:
        return Outcome(rule.text, False, None, None, str(error))
    if rule.change:
        sign, number = rule.change
        by = number * spread.of(rule.measure, limit) if spread else number
        limit = {"*": limit * by, "+": limit + by, "-": limit - by}[sign]
    holds = math.isfinite(value) and OPERATORS[rule.sign](value, limit)
    notes = [f"{rule.limit if other else f'{rule.limit:g}'}{_changed(rule)}"] if other or rule.change else []
    notes += [on] if on else []
    notes += [f"spread {100 * spread.relative:.2g}%, {spread.source}"] if spread else []
    against = f" ({'; '.join(notes)})" if notes else ""
    return Outcome(rule.text, holds, value, limit, _describe(rule, value, limit) + against)


def text_of(rule: Rule, model: ModelResults) -> tuple[str, dict[str, str]]:
    """(name, labels) of the text that a rule of text is measured on."""
    return ".".join(rule.labels), _labels(model.scores, rule.labels)


def _spread(rule: Rule, model: ModelResults, spreads: Spreads) -> Spread | None:
    if not rule.spread:
        return None
    text, labels = text_of(rule, model)
    return spreads.on(text, model.scores, labels)


def _changed(rule: Rule) -> str:
    if not rule.change:
        return ""
    sign, number = rule.change
    times = f"{number:g} * " if number != 1 else ""
    return f" {sign} {times}spread" if rule.spread else f" {sign} {number:g}"


def _describe(rule: Rule, value: float, limit: float) -> str:
    """The outcome in a sentence that can be read without the rule."""
    if rule.measure == "collapsed_layers":
        layers = f"{value:.0f} layer{'' if value == 1 else 's'}"
        return f"the router sends nearly everything to one expert in {layers}, {_required(rule.sign, _show(limit))}"
    groups = {"original": "the original languages", "expanded": "the new languages"}
    ends = {bound: f"({bound} end of the interval)" for bound in BOUNDS}
    of = " ".join(groups.get(word) or ends.get(word) or language_name(word) for word in rule.of)
    if rule.measure in ("retention", "gain"):
        what = f"kept of {of or 'all text'}" if rule.measure == "retention" else f"gained on {of or 'all text'}"
        return f"{100 * value:.1f}% {what}, {_required(rule.sign, f'{100 * limit:.4g}%')}"
    if rule.measure == "contamination":
        seen = f"{100 * value:.1f}% of items and documents were seen in training"
        return f"{seen}, {_required(rule.sign, f'{100 * limit:.4g}%')}"
    name = rule.measure.replace("_", " ") if rule.measure in TEXT_MEASURES else rule.measure
    where = f" {'in' if rule.measure in TEXT_MEASURES else 'on'} {of}" if of else ""
    return f"{_show(value)} {name}{where}, {_required(rule.sign, _show(limit))}"


def _required(sign: str, limit: str) -> str:
    words = {">=": "at least", "<=": "at most", ">": "more than", "<": "less than", "==": "exactly"}
    return f"{words[sign]} {limit} required"


def _maybe(rule: Rule, model: ModelResults, base: ModelResults | None) -> float | None:
    try:
        return _measure(rule, model, base)[0]
    except Missing:
        return None


def _both(
    rule: Rule, model: ModelResults, base: ModelResults | None, other: ModelResults | None
) -> tuple[float, float, str]:
    """(the model's value, the limit, what the value is measured on, in words).

    Text is compared on the documents that both scored, in the trainings that the rule is about.
    """
    value, on = _measure(rule, model, base)
    if other is None:
        return value, float(rule.limit), on
    if rule.measure not in ("bits_per_byte", "perplexity"):
        limit = _measure(rule, other, base)[0]
        task = ".".join(rule.of)
        if model.answers and other.answers and (why := incomparable(model.answers, other.answers, task, rule.measure)):
            raise Missing(f"{rule.measure} on {task} cannot be compared with the {rule.limit}'s: {why}")
        return value, limit, on
    change = _change(other.scores.first, model.scores.first, rule)
    on = f"{change.documents} documents"
    if rule.measure == "bits_per_byte":
        return change.after, change.before, on
    if change.perplexity is None:
        raise Missing("perplexities of different tokenizers cannot be compared; use bits_per_byte")
    return value, value / (1 + change.perplexity), on


def _measure(rule: Rule, model: ModelResults, base: ModelResults | None) -> tuple[float, str]:
    """(value, what an end of an interval covers, in words)."""
    bound = rule.of[-1] if rule.labels != rule.of else ""
    if bound and rule.measure not in ("retention", "gain"):
        raise Missing(f"'{rule.measure}' has no '{bound}' end; retention and gain have")
    if rule.measure in ("retention", "gain"):
        if base is None:
            raise Missing("the base was not evaluated, so retention and gain are unknown")
        if base.scores.artifact == model.scores.artifact:
            return (1.0 if rule.measure == "retention" else 0.0), ""
        return _kept_or_gained(rule, bound, model.scores, base.scores)
    if rule.measure in TEXT_MEASURES:
        value = getattr(model.scores.first, rule.measure)(**_labels(model.scores, rule.of))
        if value is None:
            raise Missing(f"no held-out text of '{'.'.join(rule.of) or 'any language'}' was scored")
        return value, ""
    if not rule.of and rule.measure in model.numbers:
        return model.numbers[rule.measure], ""
    task = ".".join(rule.of)
    if (task, rule.measure) in model.tasks:
        return model.tasks[task, rule.measure], ""
    known = ", ".join([*TEXT_MEASURES, *sorted(model.numbers), *sorted(f"{each}.{name}" for name, each in model.tasks)])
    raise Missing(f"there is no measure '{'.'.join([rule.measure, *rule.of])}' of {model.name}; available: {known}")


def _kept_or_gained(rule: Rule, bound: str, model: Scores, base: Scores) -> tuple[float, str]:
    """The measure itself, or the bound ("low" or "high") of its 95% interval and what that covers."""
    if not bound:
        change = _change(base.first, model.first, rule)
        return (change.retention if rule.measure == "retention" else change.gain), ""
    change = _change(base, model, rule)
    interval = change.retention_interval if rule.measure == "retention" else change.gain_interval
    if interval is None:
        raise Missing(
            f"the text of '{'.'.join(rule.labels) or 'any language'}' that both models scored is of one work, so "
            f"{rule.measure} has no interval; hold out more works, or write the rule without '.{bound}'"
        )
    return interval[BOUNDS.index(bound)], f"95% interval {change.covers}"


def _change(before: Scores, after: Scores, rule: Rule) -> Change:
    change = compare(before, after, **_labels(before, rule.labels))
    if change is None:
        raise Missing(f"no held-out text of '{'.'.join(rule.labels) or 'any language'}' was scored for both models")
    return change


def _labels(scores: Scores, of: tuple[str, ...]) -> dict[str, str]:
    """{"language": "el", "domain": "code"} for ("el", "code"): each word is a group, language or domain."""
    labels: dict[str, str] = {}
    for word in of:
        if word == "all":
            continue
        label = next((each for each in ("group", "language", "domain") if np.any(getattr(scores, each) == word)), None)
        if label is None and np.any(scores.language == normalise(word)):
            # `nb` or `greek`, as settings and records may have it.
            label, word = "language", str(normalise(word))
        if label is None:
            raise Missing(f"no held-out text of '{word}' was scored")
        labels[label] = word
    return labels


def _show(value: float) -> str:
    return f"{value:.4g}"
