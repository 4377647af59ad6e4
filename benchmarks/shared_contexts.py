"""Time of the questions of lm-eval tasks: one pass per question (ours) beside one per answer (lm-eval's HFLM).

    python benchmarks/shared_contexts.py MODEL QUESTIONS --items 32 --tasks arc_easy hellaswag

MODEL: a folder or hub name. QUESTIONS: a folder of TASK.jsonl.gz. One thread, batches of 8, CPU seconds; the two take
turns by 16 questions. Also the largest difference of a log-likelihood, and on how many questions the best answer
differs. --bfloat16: a third turn, ours with matrix products in bfloat16, compared with ours in float32.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
for variable, value in {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}.items():
    os.environ.setdefault(variable, value)

import torch  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from eclectus.models.evaluation.lm_eval import HarnessModel  # noqa: E402
from eclectus.models.training.process import Process  # noqa: E402
from eclectus.tasks.evaluation.benchmark_tasks import Harness, Wanted, local_questions  # noqa: E402

TURN, BATCH = 16, 8


class AnswerByAnswer(HarnessModel):
    """Ours, with lm-eval's own passes."""

    def _score(self, requests: list[Any], override_bs: int | None) -> list[tuple[float, bool]]:
        return HFLM._loglikelihood_tokens(self, requests, disable_tqdm=True, override_bs=override_bs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("questions", type=Path)
    parser.add_argument("--items", type=int, default=32, help="questions of each task, the first ones")
    parser.add_argument("--tasks", nargs="*", help="by default all of the folder")
    parser.add_argument("--bfloat16", action="store_true")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(chosen.model, dtype=torch.float32).eval()
    words = AutoTokenizer.from_pretrained(chosen.model)
    given = (model, words, model.config.max_position_embeddings, BATCH, Process.current(), None, lambda *_: None)
    with contextlib.redirect_stderr(io.StringIO()):
        ways: dict[str, HarnessModel] = {"answer by answer": AnswerByAnswer(*given), "shared": HarnessModel(*given)}
        if chosen.bfloat16:
            ways["shared, bfloat16"] = HarnessModel(*given, precision="bfloat16")
    head = ["task", "questions", *(f"{way}, CPU s" for way in ways), "largest difference"]
    print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|")
    for name in chosen.tasks or sorted(local_questions([str(chosen.questions)])):
        print(f"| {' | '.join(row(name, chosen, ways))} |", flush=True)


def row(name: str, chosen: argparse.Namespace, ways: dict[str, HarnessModel]) -> Iterator[str]:
    """The cells of one task."""
    with contextlib.redirect_stderr(io.StringIO()):
        tasks, _ = Harness([str(chosen.questions)]).load(Wanted(name, 0))
        task = next(iter(tasks.values()))
        task.build_all_requests(limit=chosen.items)
    by_question: dict[int, list[Any]] = {}
    for each in task.instances:
        by_question.setdefault(each.doc_id, []).append(each)
    questions = list(by_question.values())
    seconds, answers = dict.fromkeys(ways, 0.0), {way: [] for way in ways}
    for first in range(0, len(questions), TURN):
        turn = [each for question in questions[first : first + TURN] for each in question]
        for way, asked in ways.items():
            begun = time.process_time()
            answers[way] += [value for value, _ in asked.loglikelihood(turn, disable_tqdm=True)]
            seconds[way] += time.process_time() - begun
    yield from (name, str(len(questions)), *(f"{each:.1f}" for each in seconds.values()))
    plain, shared, *half = answers.values()
    yield "; ".join(
        f"{what}{max(abs(a - b) for a, b in zip(one, other, strict=True)):.1g}, "
        f"{changed(questions, one, other)} best answers"
        for what, one, other in [("", plain, shared), *(("bfloat16 ", shared, each) for each in half)]
    )


def changed(questions: list[list[Any]], one: list[float], other: list[float]) -> int:
    """Questions whose likeliest answer is another one."""
    count, begin = 0, 0
    for question in questions:
        here = slice(begin, begin + len(question))
        best = [max(range(len(question)), key=values[here].__getitem__) for values in (one, other)]
        count += best[0] != best[1]
        begin += len(question)
    return count


if __name__ == "__main__":
    main()
