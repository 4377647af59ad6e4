"""Scores of one model on benchmark tasks, and paired comparisons of two models, with intervals over the questions.

Two models are compared on the items that both could answer, as one training of each: tasks/evaluation/intervals.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from eclectus.storage.artifact import Artifact
from eclectus.tasks.evaluation.intervals import ALPHA, estimate

# The main metric of a task: the first of these that it has, else its own first.
PREFERRED = ("acc", "exact_match", "em", "f1")


@dataclass(frozen=True)
class Answers:
    """The benchmarks of one model."""

    name: str
    artifact: Artifact

    @cached_property
    def scores(self) -> dict[str, dict[str, Any]]:
        """By task (and group): the row of its main metric."""
        rows: dict[str, list[dict[str, Any]]] = {}
        for row in pq.read_table(self.artifact.file("scores.parquet")).to_pylist():
            rows.setdefault(row["task"], []).append(row)
        return {task: min(each, key=_preference) for task, each in rows.items()}

    @cached_property
    def values(self) -> dict[tuple[str, str], dict[int, float]]:
        """By (task, metric): the value of each answered item."""
        values: dict[tuple[str, str], dict[int, float]] = {}
        table = pq.read_table(self.artifact.file("items.parquet"), columns=["task", "metric", "item", "value"])
        for row in table.to_pylist():
            if row["value"] is not None:
                values.setdefault((row["task"], row["metric"]), {})[row["item"]] = row["value"]
        return values

    @cached_property
    def about(self) -> dict[str, Any]:
        return json.loads(self.artifact.file("about.json").read_text("utf-8"))


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


def compare_answers(before: Answers, after: Answers, task: str) -> Difference | None:
    """The difference on a task's main metric over the items that both answered; None if there are none."""
    row = before.scores.get(task)
    if row is None or task not in after.scores:
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


def _preference(row: dict[str, Any]) -> int:
    return PREFERRED.index(row["metric"]) if row["metric"] in PREFERRED else len(PREFERRED)
