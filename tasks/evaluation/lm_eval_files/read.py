"""Reads the files that `lm_eval --output_path DIR [--log_samples]` wrote, and checks that they belong together.

    DIR/MODEL/results_DATE.json, DIR/MODEL/samples_TASK_DATE.jsonl

Only JSON is read: nothing in a file is called, rendered or imported. Scores are computed again from the samples where
the harness has the aggregation by the name in the task's configuration, and a score that differs is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from eclectus.storage.artifact import hash_unchanged
from eclectus.storage.errors import EclectusError
from eclectus.tasks.allowed_paths import check_path
from eclectus.tasks.evaluation.benchmark_rows import by_filter
from eclectus.tasks.evaluation.lm_eval_files.kept import HASHES

_RESULTS = re.compile(r"results_(?P<date>[^/]*)\.json")
# No path, so that a file of samples named after it lies in the same folder.
_TASK = re.compile(r"[^/\\\0]{1,200}")
# What Eclectus writes is rounded; what the harness writes is not.
ROUNDED, EXACT = 1e-4, 1e-6


@dataclass(frozen=True)
class ResultFile:
    """A result file. path, content: of the JSON. date: in its name. notes: what users should know of it."""

    path: Path
    date: str
    content: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> ResultFile:
        """Reads a results_DATE.json. Raises EclectusError naming file and place."""
        named = _RESULTS.fullmatch(path.name)
        if named is None:
            raise EclectusError(f"{path} is no result file of lm_eval, which is named results_DATE.json")
        try:
            content = json.loads(path.read_text("utf-8"))
        except OSError as error:
            raise EclectusError(f"{path} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise EclectusError(f"{path} is not whole JSON ({error}); copy it again from where lm_eval ran") from error
        parts = ("results", "configs", "n-samples", "n-shot", "versions")
        wrong = [each for each in parts if not isinstance(content, dict) or not isinstance(content.get(each), dict)]
        if wrong:
            raise EclectusError(f"{path} is no result file of lm_eval 0.4.3 or later: it has no '{wrong[0]}'")
        file = cls(path, named["date"], content)
        if strange := [task for task in content["configs"] if not _TASK.fullmatch(task)]:
            raise EclectusError(f"{path} names the task {strange[0]!r}, which can be no name of a file")
        if not file.tasks:
            raise EclectusError(f"{path} has no scores of tasks")
        return file

    @property
    def model(self) -> str:
        """The name of the model that was asked."""
        return str(self.content.get("model_name") or "")

    @cached_property
    def tasks(self) -> list[str]:
        return [task for task in self.content["configs"] if isinstance(self.content["results"].get(task), dict)]

    @cached_property
    def groups(self) -> dict[str, list[str]]:
        """By group with scores of its own: all tasks in it and in its groups."""
        children = self.content.get("group_subtasks") or {}

        def leaves(name: str, above: tuple[str, ...]) -> list[str]:
            parts = [] if name in above else children.get(name) or []
            return [name] if not parts else [leaf for part in parts for leaf in leaves(part, (*above, name))]

        return {
            name: leaves(name, ())
            for name in self.content["results"]
            if name not in self.content["configs"] and children.get(name) and self.scores(name)
        }

    def scores(self, name: str) -> dict[tuple[str, str], tuple[float | None, float | None]]:
        """Of a task or group, by metric and filter: (score, its standard error); None for what is no finite number."""
        result = self.content["results"][name]
        found = {}
        for key, value in result.items():
            metric, comma, filter_key = key.partition(",")
            # `bypass` is the harness's mark of answers without metrics.
            if comma and metric != "bypass" and not metric.endswith("_stderr"):
                found[metric, filter_key] = _finite(value), _finite(result.get(f"{metric}_stderr,{filter_key}"))
        return found

    def samples_file(self, task: str) -> Path | None:
        """The file with the samples of a task, if it is next to the result file."""
        path = self.path.with_name(f"samples_{task}_{self.date}.jsonl")
        return path if path.is_file() else None

    def digests(self) -> dict[str, str]:
        """SHA-256 of the result file and of the files of samples, by name."""
        files = [self.path, *(path for task in self.tasks if (path := self.samples_file(task)))]
        for path in files:
            check_path(path, f"results {path}")
        return {path.name: hash_unchanged(path) for path in files}

    def samples(self, task: str) -> list[dict[str, Any]] | None:
        """The samples of a task, checked; None if there is no file of them.

        Their arguments are lists, as in the harness. Raises EclectusError for samples of another run, for too few or
        too many, and for a score that is not theirs.
        """
        path = self.samples_file(task)
        if path is None:
            return None
        samples = self._read(path, task)
        self._check_run(path, task, samples)
        self._check_count(path, task, samples)
        self._check_scores(path, task, samples)
        return samples

    def _read(self, path: Path, task: str) -> list[dict[str, Any]]:
        filters = {key for _, key in self.scores(task)}
        metrics = sorted({metric for metric, _ in self.scores(task)})
        samples: list[dict[str, Any]] = []
        try:
            with open(path, encoding="utf-8") as lines:
                for line in lines:
                    sample = json.loads(line)
                    # Versions of the harness before filters were written there: where a task has one, it is that.
                    sample.setdefault("filter", next(iter(filters)) if len(filters) == 1 else None)
                    sample.setdefault("metrics", [metric for metric in metrics if metric in sample])
                    sample["arguments"] = _arguments(sample["arguments"])
                    _check_sample(sample)
                    samples.append(sample)
        except OSError as error:
            raise EclectusError(f"{path} cannot be read: {error.strerror}") from error
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise EclectusError(
                f"{path} cannot be read from line {len(samples) + 1} on ({reason}); copy it again"
            ) from error
        return samples

    def _check_run(self, path: Path, task: str, samples: list[dict[str, Any]]) -> None:
        wanted = (self.content.get("task_hashes") or {}).get(task)
        text = "".join(sample["doc_hash"] + sample["prompt_hash"] + sample["target_hash"] for sample in samples)
        if wanted and hashlib.sha256(text.encode()).hexdigest() != wanted:
            counted = self._counted(task)
            short = len({sample["doc_id"] for sample in samples})
            why = f": it has {short} items, of {counted}" if counted not in (None, short) else ""
            raise EclectusError(
                f"{path.name} is of another run than {self.path.name}, or not whole{why}: the hash of its questions, "
                "prompts and targets is not the one in the result file; put the files of one run together"
            )

    def _check_count(self, path: Path, task: str, samples: list[dict[str, Any]]) -> None:
        counted = self._counted(task)
        for key, some in by_filter(samples).items():
            items = {sample["doc_id"] for sample in some}
            if len(items) < len(some):
                raise EclectusError(f"{path.name} has an item of task '{task}' twice (filter '{key}')")
            if counted is not None and len(items) != counted:
                raise EclectusError(
                    f"{path.name} has {len(items)} items of task '{task}', but {self.path.name} says {counted}; put "
                    "the files of one run together"
                )

    def _check_scores(self, path: Path, task: str, samples: list[dict[str, Any]]) -> None:
        parts, scores = by_filter(samples), self.scores(task)
        near = ROUNDED if self.content.get("model_source") == "eclectus" else EXACT
        for (metric, key), (score, _) in scores.items():
            values = [sample[metric] for sample in parts.get(key, []) if metric in sample]
            found = computed(self.content["configs"][task], metric, values)
            if found is None:
                self.notes.append(
                    f"{metric} of {task} was not computed again: its aggregation is not the harness's own"
                )
            elif score is not None and not abs(found - score) <= near * max(1.0, abs(score)):
                raise EclectusError(
                    f"{self.path.name} says {score:.6g} for {metric} of task '{task}' (filter '{key}'), but the items "
                    f"in {path.name} give {found:.6g}; one of the files was changed"
                )

    def check_groups(self) -> None:
        """Raises EclectusError for a group whose score is not the mean of its tasks, by items or by tasks."""
        from lm_eval.api.metrics import aggregate_subtask_metrics

        for name, leaves in self.groups.items():
            for (metric, key), (score, _) in self.scores(name).items():
                parts = [(task, self.scores(task).get((metric, key))) for task in leaves if task in self.tasks]
                known = [(found[0], self._counted(task)) for task, found in parts if found and found[0] is not None]
                if score is None or len(known) < len(leaves) or any(count is None for _, count in known):
                    continue
                values, counts = zip(*known, strict=True)
                means = [aggregate_subtask_metrics(values, counts, by_size) for by_size in (True, False)]
                if all(abs(mean - score) > ROUNDED * max(1.0, abs(score)) for mean in means):
                    raise EclectusError(
                        f"{self.path.name} says {score:.6g} for {metric} of group '{name}', but its tasks give "
                        f"{means[0]:.6g}; the file was changed"
                    )

    def _counted(self, task: str) -> int | None:
        counted = self.content["n-samples"].get(task)
        return counted.get("effective") if isinstance(counted, dict) else None


def find_result_file(given: Path) -> tuple[Path, list[str]]:
    """(the result file that a user names by itself or by a folder above it, what users should know of the choice).

    Of several in one folder it is the latest. Raises EclectusError.
    """
    from lm_eval.utils import get_latest_filename, get_results_filenames

    check_path(given, f"results {given}")
    if not given.exists():
        raise EclectusError(f"{given} does not exist; give a results_DATE.json of lm_eval, or its folder")
    if given.is_file():
        return given, []
    names = sorted(get_results_filenames([str(path) for path in given.glob("**/results_*.json")]))
    if not names:
        raise EclectusError(f"{given} has no results_DATE.json of lm_eval; run it with --output_path and --log_samples")
    folders = sorted({str(Path(name).parent) for name in names})
    if len(folders) > 1:
        raise EclectusError(f"{given} has results of several models, in {', '.join(folders[:5])}; give one of them")
    latest = Path(get_latest_filename(names))
    others = f"of {len(names)} result files in {folders[0]} the latest is taken: {latest.name}"
    return latest, [others] if len(names) > 1 else []


def computed(config: dict[str, Any], metric: str, values: list[Any]) -> float | None:
    """A task's score from those of its items; None where the harness does not have the aggregation by a name."""
    aggregation = _aggregation(config, metric)
    if aggregation is None or not values:
        return None
    try:
        found = aggregation(values)
        return float(found) if not isinstance(found, str) else None
    # An aggregation may need a package or a form of values that is not here.
    except Exception:
        return None


def _aggregation(config: dict[str, Any], metric: str) -> Callable[[list[Any]], Any] | None:
    import lm_eval.api.metrics  # noqa: F401  (fills the registries)
    from lm_eval.api.registry import aggregation_registry, metric_agg_registry

    listed = config.get("metric_list") or []
    entry = next((each for each in listed if isinstance(each, dict) and each.get("metric") == metric), {})
    name = entry.get("aggregation")
    registry, key = (aggregation_registry, name) if name is not None else (metric_agg_registry, metric)
    if not isinstance(key, str) or key not in registry or key == "bypass":
        return None
    return registry.get(key)


def _check_sample(sample: dict[str, Any]) -> None:
    """Raises an error for a sample that lacks what is read of it, or has it in another form."""
    int(sample["doc_id"])
    for name in HASHES:
        sample[name] + ""
    if not isinstance(sample["metrics"], list) or not isinstance(sample["filter"], str):
        raise ValueError("'metrics' or 'filter' is missing")
    for name in ("resps", "filtered_resps"):
        len(sample[name])
    for name in sample["metrics"]:
        sample[name]


def _arguments(given: Any) -> list[list[Any]]:
    """The arguments of a sample's requests as lists; the harness writes them as gen_args_0: {arg_0, arg_1}."""
    if isinstance(given, dict):
        return [list(request.values()) for request in given.values()]
    return [list(request) for request in given]


def _finite(value: Any) -> float | None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if number else None
