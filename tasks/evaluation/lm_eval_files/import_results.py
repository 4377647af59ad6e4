"""Imports results of `lm_eval` that was run elsewhere: an evaluation of a checkpoint, as `benchmark` makes it.

It has the same tables, is marked as imported, and has the checkpoint as its input in the lineage. Files are checked
against each other (read.py). Without samples it has scores only: they count in gates and tables, but models cannot be
compared item by item.

Files: items.parquet, scores.parquet, about.json, lm_eval.json, samples.parquet, as of tasks/evaluation/benchmark.py.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from pydantic import Field

from eclectus.storage.artifact import Artifact, ArtifactStore, Draft
from eclectus.storage.errors import EclectusError
from eclectus.tasks.evaluation.benchmark_rows import (
    DIGITS,
    LONGEST_ANSWERS,
    metric_label,
    number_of,
    write_rows,
)
from eclectus.tasks.evaluation.benchmark_tasks import language_of
from eclectus.tasks.evaluation.lm_eval_files.imported import IMPORTED
from eclectus.tasks.evaluation.lm_eval_files.kept import RESULTS, KeptSamples
from eclectus.tasks.evaluation.lm_eval_files.read import ResultFile
from eclectus.tasks.run import notify
from eclectus.tasks.settings import RuntimeSetting, Settings
from eclectus.tasks.step import step


class ImportResultsSettings(Settings):
    """Which results are imported, and who says that they are the checkpoint's."""

    imported_results: str = RuntimeSetting("", description="The results_DATE.json of lm_eval.")
    imported_model: str = Field("", description="Name of the model in the file.")
    imported_by: str = Field("", description="Who imported them.")


def _fingerprint(settings: ImportResultsSettings) -> dict[str, str]:
    return ResultFile.read(Path(settings.imported_results)).digests()


@step(makes="evaluation", version=1, fingerprint=_fingerprint)
def import_results(checkpoint: Artifact, settings: ImportResultsSettings, out: Draft) -> None:
    """Makes an evaluation of a checkpoint from the files of `lm_eval`."""
    file = ResultFile.read(Path(settings.imported_results))
    items: list[dict[str, Any]] = []
    scores: list[dict[str, Any]] = []
    without: list[str] = []
    with KeptSamples(out) as kept:
        for task in file.tasks:
            samples = file.samples(task)
            if samples is None:
                without.append(task)
            else:
                kept.add(task, samples)
                items += [row for sample in samples for row in _item_rows(file, task, sample)]
            scores += _score_rows(file, task)
    file.check_groups()
    scores += [row for group, leaves in file.groups.items() for row in _group_rows(file, group, leaves)]
    if not scores:
        raise EclectusError(f"{file.path} has no scores of tasks")
    unknown = [f"{row['metric']} of {row['task']}" for row in scores if row["score"] is None]
    if unknown:
        file.notes.append(f"no score where the file has no finite number: {', '.join(unknown[:5])}")
    if without:
        file.notes.append(
            f"no samples of {', '.join(without[:5])}{' ...' if len(without) > 5 else ''} next to the file: scores "
            "count, but models cannot be compared item by item; run lm_eval with --log_samples"
        )
    for note in file.notes:
        notify("imported results", note)
    _write(file, items, scores, without, out)
    # Files that were changed meanwhile have another key.
    out.read = _fingerprint(settings)


def check_model(store: ArtifactStore, checkpoint: Artifact, file: ResultFile, claimed: str | None) -> None:
    """Raises EclectusError if a result file is of another model than the checkpoint.

    claimed: the name in the file that a user says is the checkpoint's. Else it must be an artifact name, digest, tag or
    folder of the checkpoint, the folder of an export of it, or the hub model that it was pulled or fetched from.
    """
    name = file.model
    if claimed is not None:
        if claimed != name:
            raise EclectusError(f"{file.path} is of model '{name}', not '{claimed}'")
        return
    if not _is_of(store, checkpoint, name):
        raise EclectusError(
            f"{file.path} is of model '{name}', which is not known to be {checkpoint.name}; if it is that model under "
            f"another name, say so with --model '{name}'"
        )


def _is_of(store: ArtifactStore, checkpoint: Artifact, name: str) -> bool:
    found = re.search(r"(?:^|[/-])([0-9a-f]{8,64})/?$", name)
    if found and checkpoint.digest.startswith(found[1]):
        return True
    statistics = checkpoint.statistics
    if name and name in (statistics.get("base_model"), str(statistics.get("pulled_from", "")).partition("@")[0]):
        return True
    path = Path(name)
    if name and path.is_dir():
        return path.resolve() == Path(checkpoint.path).resolve() or _is_export(path, checkpoint)
    tagged = store.tags.find(name) if name else None
    return tagged == f"{checkpoint.kind}-{checkpoint.digest}"


def _is_export(folder: Path, checkpoint: Artifact) -> bool:
    """Whether a folder is the checkpoint in stock files; an export of Lory is another model, merged from it."""
    from eclectus.models.checkpoints.seal import SEAL

    try:
        exported = json.loads((folder / SEAL).read_text("utf-8"))["exported_from"]
        types = [json.loads(each.read_text("utf-8"))["model_type"]
                 for each in (folder / "config.json", checkpoint.file("config.json"))]  # fmt: skip
    except (OSError, ValueError, LookupError, TypeError):
        return False
    return exported == checkpoint.name and types[0] == types[1]


def _item_rows(file: ResultFile, task: str, sample: dict[str, Any]) -> list[dict[str, Any]]:
    config = file.content["configs"][task]
    filters = len({key for _, key in file.scores(task)})
    texts = config.get("output_type") == "generate_until"
    numbers = [_answer(response, texts) for each in sample["resps"] for response in each]
    wrong = any(isinstance(each, float) and not math.isfinite(each) for each in numbers)
    chosen = config.get("output_type") == "multiple_choice"
    delimiter = str(config.get("target_delimiter", " "))
    answers = [str(request[1]).removeprefix(delimiter) for request in sample["arguments"] if len(request) > 1]
    target = str(sample["target"])
    if chosen and target.isdigit() and int(target) < len(answers):
        target = answers[int(target)]
    shown = [round(each, DIGITS) if isinstance(each, float) else each for each in numbers[:LONGEST_ANSWERS]]
    common = {
        "task": task,
        "language": language_of(task),
        "item": int(sample["doc_id"]),
        "question": _question(file, task, sample, config),
        "answers": answers if chosen else [],
        "target": target,
        "responses": json.dumps([None if wrong and isinstance(each, float) else each for each in shown]),
        "cut": False,
        "missing": "the model's logits are not finite" if wrong else None,
    }
    return [
        common
        | {
            "metric": metric_label(name, sample["filter"], filters),
            "value": None if wrong else number_of(sample[name]),
        }
        for name in sample["metrics"]
    ]


def _question(file: ResultFile, task: str, sample: dict[str, Any], config: dict[str, Any]) -> str:
    """The prompt without its few-shot examples, as far as their delimiter tells."""
    prompt = sample["arguments"][0][0] if sample["arguments"] and sample["arguments"][0] else ""
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, default=str)
    delimiter = config.get("fewshot_delimiter")
    shots = _whole(file.content["n-shot"].get(task))
    return text.rsplit(delimiter, 1)[-1] if shots and isinstance(delimiter, str) and delimiter else text


def _answer(response: Any, is_text: bool) -> float | str:
    """A log-likelihood as a number, a text as it is. response: as written, with all numbers as texts."""
    if isinstance(response, list):
        response = response[0] if response else ""
    try:
        return str(response) if is_text else float(response)
    except (TypeError, ValueError):
        return str(response)


def _score_rows(file: ResultFile, task: str) -> list[dict[str, Any]]:
    counted = file.content["n-samples"].get(task) or {}
    return _rows(file, task, task, _whole(counted.get("effective")), False)


def _group_rows(file: ResultFile, group: str, leaves: list[str]) -> list[dict[str, Any]]:
    counts = [_whole((file.content["n-samples"].get(leaf) or {}).get("effective")) for leaf in leaves]
    # As in groups of `benchmark`, examples and version are those of the first task.
    return _rows(file, group, leaves[0], sum(counts), True)


def _rows(file: ResultFile, name: str, described: str, items: int, group: bool) -> list[dict[str, Any]]:
    scores = file.scores(name)
    filters = len({key for _, key in scores})
    better = (file.content.get("higher_is_better") or {}).get(name) or {}
    return [
        {
            "task": name,
            "language": language_of(name),
            "metric": metric_label(metric_name, key, filters),
            "score": None if score is None else round(score, 6),
            "standard_error": None if error is None else round(error, 6),
            "items": items,
            "missing": 0,
            "cut": 0,
            "shots": _whole(file.content["n-shot"].get(described)),
            "higher_is_better": better.get(metric_name) is not False,
            "version": str(file.content["versions"].get(described)),
            "group": group,
        }
        for (metric_name, key), (score, error) in scores.items()
    ]


def _whole(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _write(
    file: ResultFile, items: list[dict[str, Any]], scores: list[dict[str, Any]], without: list[str], out: Draft
) -> None:
    config, content = file.content.get("config") or {}, file.content
    date = content.get("date")
    out.statistics = {
        "scores": write_rows(items, scores, out),
        "left_out": {},
        "items_missing": 0,
        "items_cut": 0,
        "limit": config.get("limit"),
        "seed": config.get("fewshot_seed"),
        "lm_eval": content.get("lm_eval_version"),
        IMPORTED: {
            "model": file.model,
            "date": float(date) if isinstance(date, int | float) else 0.0,
            "files": file.digests(),
            "without_samples": without,
            "asked": {name: content[name] for name in ("chat_template_sha", "system_instruction_sha")
                      if content.get(name)},
        },
    }  # fmt: skip
    out.file("about.json").write_text(json.dumps(out.statistics, indent=1, ensure_ascii=False), "utf-8")
    out.file(RESULTS).write_text(json.dumps(content, indent=1, ensure_ascii=False), "utf-8")
