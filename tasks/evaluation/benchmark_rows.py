"""Rows from lm-evaluation-harness samples: one per item and metric, one per task and metric, one per group and metric.

An item that the model could not answer (a logit that is not finite, an answer longer than its context) has no value and
is left out of its task's score; a group with a task without score has none. Aggregation is the task's own. A task that
reads its answers in several ways (filters) has a metric for each: `exact_match,strict-match`.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from eclectus.storage.artifact import Draft
from eclectus.tasks.evaluation.benchmark_tasks import language_of
from eclectus.tasks.run import metric

if TYPE_CHECKING:
    from lm_eval.api.task import Task

# Log-likelihoods differ in their last digits with the batch; rounded, every batch size gives the same bytes.
DIGITS = 4
LONGEST_ANSWERS = 8
FIELDS = {
    "task": pa.string(), "language": pa.string(), "item": pa.int32(), "metric": pa.string(), "value": pa.float64(),
    "question": pa.string(), "answers": pa.list_(pa.string()), "target": pa.string(), "responses": pa.string(),
    "cut": pa.bool_(), "missing": pa.string(),
}  # fmt: skip
SCORE_FIELDS = {
    "task": pa.string(), "language": pa.string(), "metric": pa.string(), "score": pa.float64(),
    "standard_error": pa.float64(), "items": pa.int32(), "missing": pa.int32(), "cut": pa.int32(), "shots": pa.int32(),
    "higher_is_better": pa.bool_(), "version": pa.string(), "group": pa.bool_(),
}  # fmt: skip


def write_rows(items: list[dict[str, Any]], scores: list[dict[str, Any]], out: Draft) -> dict[str, float | None]:
    """Writes items.parquet and scores.parquet and journals the scores; returns them by "task metric"."""
    for rows, fields, name in ((items, FIELDS, "items"), (scores, SCORE_FIELDS, "scores")):
        table = pa.Table.from_pylist(rows, schema=pa.schema(list(fields.items())))
        pq.write_table(table, out.file(f"{name}.parquet"), compression="zstd")
    for row in scores:
        if row["score"] is not None:
            metric(row["metric"], row["score"], task=row["task"], language=row["language"])
    out.rows = len({(row["task"], row["item"]) for row in items})
    return {f"{row['task']} {row['metric']}": row["score"] for row in scores}


def by_filter(samples: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The samples of a task by the filter that its answers were read with."""
    found: dict[str, list[dict[str, Any]]] = {}
    for sample in samples:
        found.setdefault(sample["filter"], []).append(sample)
    return found


def metric_label(metric: str, filter_key: str, filters: int) -> str:
    """The name of a metric: with its filter if the task has several."""
    return f"{metric},{filter_key}" if filters > 1 else metric


def item_rows(
    name: str, task: Task, sample: dict[str, Any], cut: set[tuple[str, str]], filters: int = 1
) -> list[dict[str, Any]]:
    """One row per metric of one item. cut: (context, continuation) of the requests that were truncated."""
    responses = [response for each in sample["resps"] for response in each]
    numbers = [each[0] if isinstance(each, tuple | list) else each for each in responses]
    wrong = any(isinstance(each, float) and not math.isfinite(each) for each in numbers)
    choices = task.doc_to_choice(sample["doc"]) if task.OUTPUT_TYPE == "multiple_choice" else []
    question, target = task.doc_to_text(sample["doc"]), sample["target"]
    if isinstance(target, int) and target < len(choices):
        target = choices[target]
    shown = [round(each, DIGITS) if isinstance(each, float) else each for each in numbers]
    common = {
        "task": name,
        "language": language_of(name),
        "item": int(sample["doc_id"]),
        "question": question if isinstance(question, str) else json.dumps(question, default=str),
        "answers": [str(each) for each in choices],
        "target": str(target),
        "responses": json.dumps(
            [None if wrong and isinstance(each, float) else each for each in shown[:LONGEST_ANSWERS]]
        ),
        "cut": any(tuple(map(str, arguments[:2])) in cut for arguments in sample["arguments"]),
        "missing": "the model's logits are not finite, or the answer alone is longer than its context"
        if wrong
        else None,
    }
    return [
        common
        | {
            "metric": metric_label(metric_name, sample["filter"], filters),
            "value": None if wrong else number_of(sample[metric_name]),
        }
        for metric_name in sample["metrics"]
    ]


def number_of(value: Any) -> float | None:
    """The value of one item for paired comparisons; None if it is not a finite number."""
    if isinstance(value, bool | int | float | np.number) and math.isfinite(value):
        return round(float(value), DIGITS)
    return None


def score_rows(
    name: str, task: Task, samples: list[dict[str, Any]], rows: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """One row per metric, over the items that the model could answer, by the task's own aggregation."""
    missing = {row["item"] for row in rows if row["missing"]}
    parts = by_filter(samples)
    labels = {
        metric_label(metric_name, key, len(parts)): (metric_name, key)
        for key, some in parts.items()
        for metric_name in some[0]["metrics"]
    }
    scored = []
    for label, (metric_name, key) in labels.items():
        valid = [sample for sample in parts[key] if sample["doc_id"] not in missing]
        values = [sample[metric_name] for sample in valid]
        numbers = [row["value"] for row in rows if row["metric"] == label and row["value"] is not None]
        score = float(task.aggregation()[metric_name](values)) if values else None
        spread = float(np.std(numbers, ddof=1) / math.sqrt(len(numbers))) if len(numbers) == len(values) > 1 else None
        scored.append(
            {
                "task": name,
                "language": language_of(name),
                "metric": label,
                "score": None if score is None or not math.isfinite(score) else round(score, 6),
                "standard_error": None if spread is None else round(spread, 6),
                "items": len(valid),
                "missing": len(missing),
                "cut": len({row["item"] for row in rows if row["cut"]}),
                "shots": int(task.get_config("num_fewshot") or 0),
                "higher_is_better": bool(task.higher_is_better().get(metric_name, True)),
                "version": str(task.VERSION),
                "group": False,
            }
        )
    return scored


def group_rows(name: str, members: list[str], scores: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The group's mean over its items, for every metric that all its tasks have; no rows if a task has no score."""
    by_metric: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in scores:
        if row["task"] in members and not row["group"]:
            by_metric[row["metric"]].append(row)
    rows = []
    for metric_name, parts in by_metric.items():
        if len(parts) < len(members) or any(part["score"] is None for part in parts):
            continue
        weights = np.array([part["items"] for part in parts], float)
        score = float(np.average([part["score"] for part in parts], weights=weights))
        of_group = {
            "task": name,
            "language": language_of(name),
            "metric": metric_name,
            "score": round(score, 6),
            "standard_error": None,
            "items": int(weights.sum()),
            "missing": sum(part["missing"] for part in parts),
            "cut": sum(part["cut"] for part in parts),
            "group": True,
        }
        rows.append(parts[0] | of_group)
    return rows
