"""Scores of one model on benchmark tasks, and paired comparisons of two models, with intervals over the questions.

Two models are compared on the items that both could answer, as one training of each: tasks/evaluation/intervals.py.
Results of `lm_eval` that were imported for a model count as its own do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from eclectus.storage.artifact import Artifact
from eclectus.tasks.evaluation.intervals import ALPHA, estimate
from eclectus.tasks.evaluation.lm_eval_files.imported import IMPORTED
from eclectus.tasks.evaluation.lm_eval_files.kept import read_hashes

# The main metric of a task: the first of these that it has, else its own first.
PREFERRED = ("acc", "exact_match", "em", "f1")


@dataclass(frozen=True)
class Answers:
    """The benchmarks of one model.

    artifact: those made here; None if there are none. imported: results of `lm_eval` that was run elsewhere, latest
    first. A task counts as it was measured here, else as it was imported last.
    """

    name: str
    artifact: Artifact | None
    imported: tuple[Artifact, ...] = ()

    @classmethod
    def of(cls, name: str, evaluations: Mapping[str, Artifact]) -> Answers | None:
        """Those among a model's evaluations by kind ("tasks", "imported", "imported 2" ...); None if it has none."""
        kinds = sorted((kind for kind in evaluations if kind.startswith(IMPORTED)), key=lambda kind: (len(kind), kind))
        if "tasks" not in evaluations and not kinds:
            return None
        return cls(name, evaluations.get("tasks"), tuple(evaluations[kind] for kind in kinds))

    @cached_property
    def sources(self) -> dict[str, Artifact]:
        """By task (and group): the artifact whose scores of it count."""
        sources: dict[str, Artifact] = {}
        for artifact in self._artifacts:
            names = pq.read_table(artifact.file("scores.parquet"), columns=["task"])["task"].to_pylist()
            sources |= {task: artifact for task in dict.fromkeys(names) if task not in sources}
        return sources

    @cached_property
    def rows(self) -> dict[tuple[str, str], dict[str, Any]]:
        """By (task, metric): its row, with `imported` and what it was asked with (`asked`)."""
        rows: dict[tuple[str, str], dict[str, Any]] = {}
        for artifact in self._artifacts:
            about = _about(artifact).get(IMPORTED, {})
            for row in pq.read_table(artifact.file("scores.parquet")).to_pylist():
                if self.sources[row["task"]] == artifact:
                    asked = {"prompting": about.get("asked", {}), "items": row["items"] + row["missing"]}
                    asked |= {name: row[name] for name in ("shots", "version")}
                    rows[row["task"], row["metric"]] = row | {"imported": artifact != self.artifact, "asked": asked}
        return rows

    @cached_property
    def scores(self) -> dict[str, dict[str, Any]]:
        """By task (and group): the row of its main metric."""
        rows: dict[str, list[dict[str, Any]]] = {}
        for row in self.rows.values():
            rows.setdefault(row["task"], []).append(row)
        return {task: min(each, key=_preference) for task, each in rows.items()}

    @cached_property
    def values(self) -> dict[tuple[str, str], dict[int, float]]:
        """By (task, metric): the value of each answered item."""
        values: dict[tuple[str, str], dict[int, float]] = {}
        for artifact in self._artifacts:
            table = pq.read_table(artifact.file("items.parquet"), columns=["task", "metric", "item", "value"])
            for row in table.to_pylist():
                if row["value"] is not None and self.sources.get(row["task"]) == artifact:
                    values.setdefault((row["task"], row["metric"]), {})[row["item"]] = row["value"]
        return values

    @cached_property
    def left_out(self) -> dict[str, str]:
        """Tasks that could not be run here, with the reason."""
        return _about(self.artifact)["left_out"] if self.artifact else {}

    @cached_property
    def notes(self) -> list[str]:
        """What users should know of imported results."""
        notes = []
        for artifact in self.imported:
            names = dict.fromkeys(name.rpartition(" ")[0] for name in artifact.statistics["scores"])
            unused = [task for task in names if self.sources[task] != artifact]
            if unused:
                tasks = ", ".join(unused[:5])
                notes.append(
                    f"{tasks} of {self.name} in {artifact.name} (imported) does not count: it was measured here, or "
                    "imported later"
                )
            if without := artifact.statistics[IMPORTED]["without_samples"]:
                tasks = ", ".join(without[:5])
                notes.append(f"{tasks} of {self.name} was imported without samples: scores only, no intervals")
        return notes

    def questions(self, task: str) -> dict[int, tuple[str, str]]:
        """(hash of the document, hash of the prompt) of each item of a task, where they were kept."""
        artifact = self.sources.get(task)
        found = self._hashes[artifact.digest].get(task, []) if artifact else []
        return {row["item"]: (row["doc_hash"], row["prompt_hash"]) for row in found}

    @property
    def _artifacts(self) -> list[Artifact]:
        return [*([self.artifact] if self.artifact else []), *self.imported]

    @cached_property
    def _hashes(self) -> dict[str, dict[str, list[dict[str, Any]]]]:
        """By digest of an artifact and task: the hashes of its samples, read once for all tasks."""
        return {artifact.digest: read_hashes(artifact) for artifact in self._artifacts}


@dataclass(frozen=True)
class Difference:
    """Scores of two models on the same items, the 95% interval of their difference, and p of no difference.

    Interval and p are None for a single item.
    """

    before: float
    after: float
    interval: tuple[float, float] | None
    p: float | None
    items: int

    @property
    def change(self) -> float:
        return self.after - self.before

    @property
    def kept(self) -> float | None:
        """Percent of the first score that the second keeps; None if the first is 0."""
        return 100 * self.after / self.before if self.before > 0 else None

    @property
    def clear(self) -> bool:
        return self.p is not None and self.p < ALPHA


def incomparable(one: Answers, two: Answers, task: str, metric: str) -> str:
    """Why the scores of two models on a task cannot be compared, in words; empty if they can, or one has none.

    They can if both were asked the same number of the same questions, with as many examples, of one version of the
    task, and with the same chat template and system prompt.
    """
    rows = [each.rows.get((task, metric)) for each in (one, two)]
    if None in rows:
        return ""
    first, second = (row["asked"] for row in rows if row)
    words = {"shots": "{} few-shot examples", "version": "version {}", "items": "{} items"}
    differing = [name for name in words if first[name] != second[name]]
    found = [f"{words[name].format(first[name])} and {second[name]}" for name in differing]
    if first["prompting"] != second["prompting"]:
        found.append("another chat template or system prompt")
    if not found and (others := _other_questions(one, two, task)):
        found.append(f"{others} questions differ")
    return ", ".join(found)


def _other_questions(one: Answers, two: Answers, task: str) -> int:
    """How many items have neither the document nor the prompt in common, of those with one number."""
    if one.sources[task] == two.sources[task] or not (one.imported or two.imported):
        return 0
    first, second = one.questions(task), two.questions(task)
    return sum(
        not any(ours == theirs for ours, theirs in zip(first[item], second[item], strict=True))
        for item in first.keys() & second.keys()
    )


def compare_answers(before: Answers, after: Answers, task: str) -> Difference | None:
    """The difference on a task's main metric over the items that both answered; None if there are none.

    None too for models that were not asked the same (`incomparable`).
    """
    row = before.scores.get(task)
    if row is None or task not in after.scores or incomparable(before, after, task, row["metric"]):
        return None
    one, two = (each.values.get((task, row["metric"]), {}) for each in (before, after))
    items = sorted(one.keys() & two.keys())
    if not items:
        return None
    pairs = np.array([(one[item], two[item]) for item in items])
    before_score, after_score = pairs.mean(0).tolist()
    around = p = None
    if len(items) > 1:
        change = pairs[:, 1] - pairs[:, 0]
        shares = np.full(len(items), 1 / len(items))
        found = estimate(change.mean(keepdims=True), ((change - change.mean()) * shares)[None], shares)
        low, high = found.interval()
        around, p = (float(low), float(high)), float(found.p())
    return Difference(before_score, after_score, around, p, len(items))


def scores_by_task(
    benchmarks: Mapping[str, Artifact], imported: Mapping[str, Mapping[str, Artifact]]
) -> dict[str, dict[str, float | None]]:
    """By model: its scores by "task metric", imported ones where a task was not measured here."""
    found: dict[str, dict[str, float | None]] = {}
    for name in dict.fromkeys([*benchmarks, *imported]):
        parts = [*([benchmarks[name]] if name in benchmarks else []), *imported.get(name, {}).values()]
        owners: dict[str, int] = {}
        scores = found[name] = {}
        for number, artifact in enumerate(parts):
            for label, score in artifact.statistics["scores"].items():
                if owners.setdefault(label.rpartition(" ")[0], number) == number:
                    scores[label] = score
    return found


def _about(artifact: Artifact) -> dict[str, Any]:
    about: dict[str, Any] = json.loads(artifact.file("about.json").read_text("utf-8"))
    return about


def _preference(row: dict[str, Any]) -> int:
    name = row["metric"].partition(",")[0]
    return PREFERRED.index(name) if name in PREFERRED else len(PREFERRED)
