"""Writes evaluations as the files of `lm_eval --output_path DIR --log_samples`, by the harness's own writer.

    DIR/MODEL/results_DATE.json            scores, configurations, versions
    DIR/MODEL/samples_TASK_DATE.jsonl      one line per item and filter: prompt, answers, metrics, hashes

DATE is when the artifact was made, so the same artifact gives the same files. What the evaluation itself does not hold
(seconds, versions of packages, the checkpoint) is taken from the lineage.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eclectus.storage.artifact import Artifact
from eclectus.storage.commands import command
from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.storage.lineage.connection import connect
from eclectus.tasks.evaluation.benchmark_tasks import Harness
from eclectus.tasks.evaluation.lm_eval_files.imported import latest_tasks
from eclectus.tasks.evaluation.lm_eval_files.kept import read_hashes, read_kept, read_samples

if TYPE_CHECKING:
    from lm_eval.loggers import EvaluationTracker

SOURCE = "eclectus"


@dataclass(frozen=True)
class Exported:
    """Files of one evaluation. without_items: tasks whose items are not in it."""

    evaluation: Artifact
    results: Path
    samples: list[Path]
    without_items: list[str]


@dataclass
class _Origin:
    """What the lineage says of an evaluation. run: code, Python and packages of the run that made it."""

    checkpoint: str = ""
    seconds: str | None = None
    run: dict[str, Any] = field(default_factory=dict)


def find_evaluations(home: Home, names: list[str]) -> list[Artifact]:
    """Evaluations of tasks by name; those of a checkpoint where it is named. Raises EclectusError."""
    found: list[Artifact] = []
    for name in names:
        artifact = home.store.find_whole(name)
        if artifact.kind == "checkpoint":
            own = latest_tasks(home, artifact)
            if not own:
                asked = command("evaluate", artifact.name, "--benchmark-tasks", "TASK", home=home.name)
                raise EclectusError(f"{artifact.name} was asked no tasks here; ask some with: {asked}")
            found += own
        else:
            found.append(artifact)
    return list(dict.fromkeys(found))


def export_results(home: Home, evaluation: Artifact, out: Path, model: str | None = None) -> Exported:
    """Writes the files of one evaluation below `out`. model: name of the model (default: its checkpoint's name).

    Raises EclectusError for an evaluation that has none of it, and for files that are there already.
    """
    Harness.check_installed()
    kept = _kept(evaluation)
    hashes, origin = read_hashes(evaluation), _origin(home, evaluation)
    created = datetime.fromisoformat(evaluation.manifest()["created"]).replace(tzinfo=None)
    date = created.isoformat().replace(":", "-")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".eclectus-", dir=out) as scratch:
        name = model or kept.get("model_name") or origin.checkpoint or evaluation.name
        tracker = _tracker(Path(scratch), name, kept)
        content = _content(kept, created, name, origin)
        tracker.save_results_aggregated(content, {task: hashes[task] for task in kept["results"] if task in hashes})
        written = list(Path(scratch).glob("*/results_*.json"))
        if len(written) != 1:
            raise EclectusError(f"lm-evaluation-harness could not write the results of {evaluation.name} into {out}")
        _set_seconds(written[0], kept.get("total_evaluation_time_seconds", origin.seconds))
        written[0].rename(written[0].with_name(f"results_{date}.json"))
        tracker.date_id = date
        for task in kept["configs"]:
            if task in hashes:
                tracker.save_results_samples(task, read_samples(evaluation, task))
        folder = _move(written[0].parent, out / written[0].parent.name)
    samples = [folder / f"samples_{task}_{date}.jsonl" for task in kept["configs"] if task in hashes]
    if missing := [path.name for path in samples if not path.is_file()]:
        raise EclectusError(f"lm-evaluation-harness could not write {missing[0]} into {folder}")
    without = [task for task in kept["configs"] if task not in hashes]
    return Exported(evaluation, folder / f"results_{date}.json", samples, without)


def _kept(evaluation: Artifact) -> dict[str, Any]:
    kept = read_kept(evaluation) if evaluation.kind == "evaluation" else None
    if kept is None:
        if evaluation.kind == "evaluation" and evaluation.file("items.parquet").is_file():
            raise EclectusError(
                f"{evaluation.name} was made before samples were kept for lm_eval's files; ask its tasks again with "
                "`eclectus evaluate`"
            )
        raise EclectusError(
            f"{evaluation.name} holds no results of tasks; name an evaluation that the step `benchmark` made, or a "
            "checkpoint that has one"
        )
    return kept


def _tracker(folder: Path, model: str, kept: dict[str, Any]) -> EvaluationTracker:
    from lm_eval.loggers import EvaluationTracker

    tracker = EvaluationTracker(output_path=str(folder))
    told = tracker.general_config_tracker
    told.log_experiment_args(
        model_source=kept.get("model_source", SOURCE),
        model_args={"pretrained": model},
        system_instruction=kept.get("system_instruction"),
        chat_template=kept.get("chat_template"),
        fewshot_as_multiturn=kept.get("fewshot_as_multiturn"),
    )
    return tracker


def _content(kept: dict[str, Any], created: datetime, model: str, origin: _Origin) -> dict[str, Any]:
    """The harness's results. What was imported is as it was; else what a run of `lm_eval` would add is added."""
    if "date" in kept:
        return dict(kept)
    packages = origin.run.get("packages", {})
    made = [f"eclectus {origin.run['code_version']}", f"python {origin.run['python']}"] if origin.run else []
    made += [f"{name} {version}" for name, version in sorted(packages.items()) if name != "eclectus"]
    config = {"model": SOURCE, "model_args": {"pretrained": model}, "model_revision": None, "model_sha": None}
    return {
        **kept,
        "config": {**config, **kept["config"]},
        "git_hash": None,
        "date": created.replace(tzinfo=UTC).timestamp(),
        "pretty_env_info": "\n".join(made),
        "transformers_version": packages.get("transformers"),
        "upper_git_hash": None,
    }


def _set_seconds(path: Path, seconds: str | None) -> None:
    """Puts the seconds of the evaluation into the place of those that the harness's writer took."""
    content = json.loads(path.read_text("utf-8")) | {"total_evaluation_time_seconds": seconds}
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False), "utf-8")


def _move(source: Path, folder: Path) -> Path:
    """Moves the files of one folder into another. Raises EclectusError if one is there."""
    folder.mkdir(parents=True, exist_ok=True)
    if there := sorted(path.name for path in source.iterdir() if (folder / path.name).exists()):
        raise EclectusError(f"{folder / there[0]} is there already; remove it, or choose another folder with --out")
    for path in sorted(source.iterdir()):
        os.replace(path, folder / path.name)
    return folder


def _origin(home: Home, evaluation: Artifact) -> _Origin:
    if not home.journal.is_dir():
        return _Origin()
    with connect(home) as connection:
        row = connection.execute(
            """
            select i.artifact, s.seconds, r.code_version, r.python, r.packages
            from steps s join step_outputs o using (step) join step_inputs i using (step) join runs r on r.run = s.run
            where o.artifact = ? and i.kind = 'checkpoint' order by s.state = 'completed' desc, s.ended limit 1
            """,
            [evaluation.digest],
        ).fetchone()
    if row is None:
        return _Origin()
    digest, seconds, code, python, packages = row
    run = {"code_version": code, "python": python, "packages": json.loads(packages or "{}")}
    return _Origin(Artifact("checkpoint", digest, "").name, None if seconds is None else str(seconds), run)
