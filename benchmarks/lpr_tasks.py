"""lm-eval tasks of a model in memory for `lpr_claims.py`: tasks of evaluation/benchmark_tasks.py."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from transformers import AutoTokenizer

from eclectus.models.evaluation.lm_eval import make_harness_model
from eclectus.models.training.precision import Precision
from eclectus.models.training.process import Process
from eclectus.tasks.evaluation.benchmark_tasks import Harness, Wanted, language_of, local_questions


def task_scores(
    model: Any,
    tokenizer: str,
    folder: str,
    languages: list[str],
    limit: int,
    batch: int = 8,
    kept: Path | None = None,
    precision: Precision = "auto",
) -> dict[str, dict[str, Any]]:
    """Accuracy by task over the questions of a folder in these languages: {task: {acc, error, questions, correct}}.

    0 shots. correct: 1 or 0 of every question, in the tasks' order, by which models are compared in pairs.

    acc is the one that is normalised by the answers' length, where the task has it (docs/methods.md 2.5's ARC and
    HellaSwag do).
    limit: at most that many questions of each task, the first ones; -1 for all. kept: for answers so far, to resume.
    precision: of matrix products.
    """
    harness = Harness([folder])
    words = AutoTokenizer.from_pretrained(tokenizer)
    length = model.config.max_position_embeddings
    given = (model.eval(), words, length, batch, Process.current(), kept, lambda *_: None)
    model_under_test = make_harness_model(*given, precision=precision)
    scores = {}
    for name in sorted(local_questions([folder])):
        if language_of(name) not in languages:
            continue
        tasks, _ = harness.load(Wanted(name, 0))
        asked = dict(limit=None if limit < 0 else limit, bootstrap_iters=0, random_seed=0)
        for label, task in tasks.items():
            samples = simple_evaluate(model_under_test, tasks=[task], **asked)["samples"][label]
            values = [float(sample.get("acc_norm", sample["acc"])) for sample in samples]
            error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
            scores[label] = {
                "acc": statistics.fmean(values),
                "error": error,
                "questions": len(values),
                "correct": values,
            }
    return scores
