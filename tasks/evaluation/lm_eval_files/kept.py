"""What an evaluation keeps so that it can be written as files of lm-evaluation-harness later.

Files:
    lm_eval.json      what the harness writes about the tasks (scores, configurations, versions, few-shot examples,
                      numbers of items) and about the run (limit, seeds, tokenizer), without dates and machines
    samples.parquet   one row per item and filter: the harness's sample as JSON, its hashes as columns

Log-likelihoods and metrics of items are rounded, so that any batch and any number of workers writes the same bytes.
Items that could not be answered are not in the scores, so they are left out here too. Cost: prompts are stored once per
answer and compress to little (docs/evaluation.md).
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from types import SimpleNamespace, TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from eclectus.storage.artifact import Artifact, Draft
from eclectus.tasks.evaluation.benchmark_rows import DIGITS, by_filter

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task

RESULTS, SAMPLES = "lm_eval.json", "samples.parquet"
HASHES = ("doc_hash", "prompt_hash", "target_hash")
FIELDS = {
    "task": pa.string(), "item": pa.int32(), "filter": pa.string(), **dict.fromkeys(HASHES, pa.string()),
    "sample": pa.string(),
}  # fmt: skip
# Of the harness's results of one task: dictionaries by task.
BY_TASK = (
    "results", "groups", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples",
)  # fmt: skip
SCORE_DIGITS = 6
# How Python shows a function or object that has no other text; the address is another in every process.
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


class KeptSamples:
    """Writes samples.parquet of a draft, task by task."""

    def __init__(self, out: Draft) -> None:
        self._writer = pq.ParquetWriter(out.file(SAMPLES), pa.schema(list(FIELDS.items())), compression="zstd")

    def __enter__(self) -> KeptSamples:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._writer.close()

    def add(self, task: str, samples: Iterable[dict[str, Any]]) -> None:
        """Adds the samples of a task, as the harness returns or writes them."""
        rows = []
        for sample in samples:
            hashes = {name: sample[name] for name in HASHES}
            text = json.dumps(sample | dict.fromkeys(HASHES), default=_plain, ensure_ascii=False)
            row = {"task": task, "item": int(sample["doc_id"]), "filter": sample.get("filter", "none")}
            rows.append({**row, **hashes, "sample": text})
        if rows:
            self._writer.write_table(pa.Table.from_pylist(rows, schema=self._writer.schema))


class KeptResults:
    """Collects lm_eval.json: what the harness returns for each task, with scores over the items that were answered."""

    def __init__(self) -> None:
        self.content: dict[str, Any] = {name: {} for name in BY_TASK}

    def add(self, given: dict[str, Any], tasks: dict[str, Task], samples: dict[str, list[dict[str, Any]]]) -> None:
        """Adds the results of tasks. given: by the harness. samples: of the items that were answered, by task."""
        for name, task in tasks.items():
            parts = {part: given[part][name] for part in BY_TASK if name in given.get(part, {})}
            parts["results"] = {**_named(given["results"][name], len(samples[name])), **_scores(task, samples[name])}
            answered = len({sample["doc_id"] for sample in samples[name]})
            parts["n-samples"] = {**parts["n-samples"], "effective": answered}
            parts["results"]["sample_len"] = answered
            parts["configs"] = json.loads(
                _ADDRESS.sub("", json.dumps(_without_questions(parts["configs"]), default=_plain, ensure_ascii=False))
            )
            for part, value in parts.items():
                self.content[part][name] = value

    def add_groups(self, groups: dict[str, Group]) -> None:
        """Adds the scores of groups all of whose tasks have been added, by the groups' own aggregation."""
        from lm_eval.evaluator_utils import EvalAcc, aggregate_groups

        known = self.content["results"]
        whole = {
            name: group
            for name, group in groups.items()
            if all(task.task_name in known for task in group.get_all_tasks())
        }
        if not whole:
            return
        tasks = {task.task_name for group in whole.values() for task in group.get_all_tasks()}
        collected = EvalAcc(
            metrics={name: known[name] for name in tasks},
            num_fewshot={name: self.content["n-shot"][name] for name in tasks},
            higher_is_better={name: self.content["higher_is_better"][name] for name in tasks},
            groups=whole,
        )
        given: dict[str, Any] = dict(aggregate_groups(collected)._to_eval_results())
        for part in ("results", "groups", "group_subtasks", "versions", "n-shot", "higher_is_better"):
            self.content[part] |= {
                name: _rounded(value, SCORE_DIGITS) for name, value in given.get(part, {}).items() if name in whole
            }

    def write(self, about: dict[str, Any], out: Draft) -> None:
        """Writes the file. about: further entries of the harness's result file."""
        content = {**self.content, **about}
        if not content["groups"]:
            del content["groups"]
        for part in ("configs", "versions", "n-shot", "higher_is_better"):
            content[part] = dict(sorted(content[part].items()))
        out.file(RESULTS).write_text(json.dumps(content, indent=1, default=_plain, ensure_ascii=False), "utf-8")


def about_tokenizer(tokenizer: Any, length: int) -> dict[str, Any]:
    """What the harness writes about a model's tokenizer and the tokens of its context."""
    from copy import deepcopy

    from lm_eval.loggers.utils import add_tokenizer_info
    from lm_eval.models.utils import configure_pad_token

    told: dict[str, Any] = {}
    own = configure_pad_token(deepcopy(tokenizer))
    add_tokenizer_info(told, SimpleNamespace(tokenizer=own, eot_token_id=own.eos_token_id, max_length=length))
    return told


def read_kept(artifact: Artifact) -> dict[str, Any] | None:
    """lm_eval.json of an evaluation; None if it was made before it was kept."""
    path = artifact.file(RESULTS)
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def read_hashes(artifact: Artifact) -> dict[str, list[dict[str, Any]]]:
    """By task: item, filter and hashes of each sample, in the order in which they were made."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    if artifact.file(SAMPLES).is_file():
        table = pq.read_table(artifact.file(SAMPLES), columns=["task", "item", "filter", *HASHES])
        for row in table.to_pylist():
            found[row["task"]].append(row)
    return dict(found)


def read_samples(artifact: Artifact, task: str) -> Iterator[dict[str, Any]]:
    """The samples of a task as the harness had them."""
    table = pq.read_table(artifact.file(SAMPLES), filters=[("task", "=", task)])
    for batch in table.to_batches(max_chunksize=64):
        for row in batch.to_pylist():
            yield json.loads(row["sample"]) | {name: row[name] for name in HASHES}


def round_sample(sample: dict[str, Any]) -> dict[str, Any]:
    """A sample whose log-likelihoods and metrics are rounded."""
    measured = ("resps", "filtered_resps", *sample["metrics"])
    return sample | {name: _rounded(sample[name], DIGITS) for name in measured}


def _scores(task: Task, samples: list[dict[str, Any]]) -> dict[str, Any]:
    """The harness's entries `acc,none` and `acc_stderr,none` over these samples.

    Standard errors that the harness bootstraps are "N/A", as it writes them without bootstrapping.
    """
    from lm_eval.api.metrics import acc_all, mean, stderr_for_metric

    scores: dict[str, Any] = {}
    for key, some in by_filter(samples).items():
        for name in some[0]["metrics"]:
            values = [sample[name] for sample in some]
            aggregation = task.aggregation().get(name, mean)
            error = stderr_for_metric(aggregation, 1) if aggregation in (mean, acc_all) and len(values) > 1 else None
            scores[f"{name},{key}"] = _rounded(aggregation(values), SCORE_DIGITS)
            scores[f"{name}_stderr,{key}"] = _rounded(error(values), SCORE_DIGITS) if error else "N/A"
    return scores


def _named(result: dict[str, Any], items: int) -> dict[str, Any]:
    return {"name": result["name"], "alias": result["alias"], "sample_len": items}


def _without_questions(config: dict[str, Any]) -> dict[str, Any]:
    """A task's configuration without the function that reads local questions: its text says nothing of the task."""
    return {name: value for name, value in config.items() if name != "custom_dataset"}


def _rounded(value: Any, digits: int) -> Any:
    """The value with all floats in it rounded; tuples become lists, as in JSON."""
    if isinstance(value, float | np.floating):
        return round(float(value), digits)
    if isinstance(value, list | tuple):
        return [_rounded(each, digits) for each in value]
    if isinstance(value, dict):
        return {name: _rounded(each, digits) for name, each in value.items()}
    return value


def _plain(value: Any) -> Any:
    """As the harness writes what JSON does not have; sets in one order."""
    from lm_eval.utils import handle_non_serializable

    if isinstance(value, set):
        return sorted(value, key=str)
    return handle_non_serializable(value)
