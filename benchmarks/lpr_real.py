"""MoE-LPR on a real base: SmolLM2-135M, which knows English, learns Greek, Hungarian, Spanish and Turkish.

    python benchmarks/lpr_real.py --base-model SmolLM2-135M-Instruct.Q4_1.gguf --corpus ../shared/corpus \\
        --eval ../shared/eval --minutes 600

MoE-LPR (with its stage 1 alone, "no review", and a review without LPR) beside full fine-tuning, with and without
replay, LoRA, LLaMA-Pro and a mixture that trains whole; each at three learning rates, on the same tokens. The report
(--out, rewritten after every job) has bits per byte by language on held-out works with 95% intervals over works, gain
against retention of every method and rate, and, of English tasks and translation choice, accuracies with intervals and
paired differences from the base. Rates of the first table are chosen on `valid`, which is not reported.

--new-words N: all methods run as well on the base with N new tokens for the expanded languages, learned on the training
text, with all text in its own tokens, and are compared with the base without new words. --words-base: on a checkpoint
that `extension_vocabulary` made of the same base elsewhere.

A job is one training of one method at one rate and seed, and its evaluation; jobs run in order of priority: every
method at its middle rate, the other rates, the other seeds. Results are kept under --work by their settings, unfinished
trainings resume from their last checkpoint, and the same command goes on where the last one ended; what was not run is
said. With `--minutes 0` it writes the report of what was run. The process and its workers run at the lowest priority
(--nice 19).

Training and scoring are in bfloat16 where a CPU or GPU is faster in it (--precision): about one question in 70 then
gets another best answer than in float32 (benchmarks/shared_contexts.py).

Cost of SmolLM2-135M at 2 million tokens, on one core with AMX: 6.2 CPU seconds per 1,024 tokens of stage 1 and 5.0 of
full fine-tuning (benchmarks/lpr_speed.py), so 3 to 4 CPU hours a training; by the size of questions and held-out text
half an hour for the evaluation of a dense model, and an hour for a mixture's. Two --workers took up to twice the CPU
seconds of one.

`--tokens 20000 --items 20 --methods moe_lpr full --rates 1` shows in minutes that everything works.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

# First: it makes the packages importable and quiet.
from lpr_claims import Board, changed, prepare, work  # isort: skip

import torch
from lpr_data import Mixture
from lpr_intervals import HeldOut
from lpr_queue import FIRST, OTHER_RATES, SEEDS, Queue
from lpr_report import NEW_WORDS
from lpr_sizes import REAL, Review, Size
from lpr_words import with_new_words

from eclectus.models.training.precision import bfloat16_gain
from eclectus.tasks.training.precision import GAIN

# Factors on the size's stage-1 rate, the middle one first: of the rates that were run, most methods learned most at it.
RATES = {
    "moe_lpr": (1.0, 0.4, 2.5),
    "full": (0.3, 0.1, 1.0),
    "full_replay": (1.0, 0.3, 3.0),
    "moe_all": (1.0, 0.3, 3.0),
    "lora": (6.0, 2.0, 20.0),
    "llama_pro": (3.0, 1.0, 9.0),
}
METHODS = ("moe_lpr", "full", "full_replay", "lora", "llama_pro", "moe_all")
# By their titles; moe_lpr gives three.
MODELS = ("base", "MoE-LPR", "no review", "review without LPR", *METHODS[1:])


class RealQueue(Queue):
    """All methods at all rates; MoE-LPR at each with and without review, and with one without LPR."""

    def __init__(self, size: Size, chosen: argparse.Namespace, packed: Path, words: bool = False) -> None:
        """words: whether these are the jobs of a base with new words; `chosen` and `packed` are its own then."""
        super().__init__(size, chosen, packed)
        self._seeds = range(chosen.first_seed, chosen.first_seed + chosen.seeds)
        self._common |= {"precision": chosen.precision, "checkpoint_every": chosen.checkpoint_every}
        self._common["led"] = True
        self._words = words
        if words:
            self._common["new_words"] = True

    def _add(self, part: int, seed: int, kind: str, name: str, needs: list[str], **more: Any) -> str:
        if self._words:
            name += NEW_WORDS
            if more.get("title"):
                more["title"] += NEW_WORDS
        if "tasks" in self._common:
            limit = self._chosen.rate_items if part == OTHER_RATES else self._chosen.items
            if (more.get("title") or "base").removesuffix(NEW_WORDS) not in self._chosen.asked:
                limit = 0
            more["tasks"] = {**self._common["tasks"], "limit": limit} if limit else None
        return super()._add(part, seed, kind, name, needs, **more)

    def _base(self, seed: int) -> str:
        if not self._words:
            return super()._base(seed)
        name = f"{seed}/base{NEW_WORDS}"
        if not any(job["name"] == name for job in self._jobs):
            self._add(FIRST, seed, "words", "base", [], base_model=self._chosen.base_model, title="base", steps=0)
        return name

    def jobs(self) -> list[dict[str, Any]]:
        for seed in self._seeds:
            for number in range(self._chosen.rates):
                part = SEEDS if seed != self._seeds[0] else OTHER_RATES if number else FIRST
                for method in self._chosen.methods:
                    factor = RATES[method][number]
                    if method == "moe_lpr":
                        self._ours(part, seed, factor)
                    else:
                        self._one_rate(part, seed, method, factor)
        return self._jobs

    def _ours(self, part: int, seed: int, factor: float) -> None:
        size = self._size
        rate = size.stage1_rate * factor
        moe = self._moe(part, seed, "copy")
        settings = dict(alpha=size.alpha, rate=rate, steps=size.stage1_steps, batch=size.batch)
        stage = self._add(part, seed, "stage1", f"stage 1 x{factor:g}", [moe], title="no review", **settings)
        review = Review(size.gamma, size.review_rate, size.review_steps)
        for title, gamma in (("MoE-LPR", size.gamma), ("review without LPR", 0.0)):
            more = dict(review=dataclasses.asdict(dataclasses.replace(review, gamma=gamma)), stage1_rate=rate)
            more |= dict(steps=review.steps, rate=review.rate, batch=size.review_batch)
            self._add(part, seed, "review", f"{title} x{factor:g}", [stage], title=title, **more)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-model", required=True, help="a folder, a .gguf file or a hub name")
    words = parser.add_mutually_exclusive_group()
    words.add_argument("--new-words", type=int, help="tokens to add to a copy of the base: every method on it, too")
    words.add_argument("--words-base", type=Path, help="the same base with new words, made elsewhere")
    parser.add_argument("--corpus", type=Path, required=True, help="folder of *.jsonl or *.jsonl.gz")
    parser.add_argument("--eval", type=Path, help="folder of lm-eval questions, TASK.jsonl.gz; without: no tasks")
    parser.add_argument("--original", nargs="+", default=["en"], help="languages that the base knows")
    parser.add_argument("--expanded", nargs="+", default=["el", "tr", "hu", "es"], help="languages that it is taught")
    parser.add_argument("--tokens", type=int, default=2_000_000, help="of stage 1; every baseline reads as many")
    parser.add_argument("--items", type=int, default=500, help="questions of each task, the first ones")
    parser.add_argument("--rate-items", type=int, help="questions at the other rates; 0: none (default: --items)")
    parser.add_argument("--asked", nargs="+", choices=MODELS, default=MODELS, help="which models answer the questions")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--rates", type=int, choices=(1, 2, 3), default=3, help="learning rates of every method")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="other values of the size's fields")
    parser.add_argument("--minutes", type=float, default=600.0, help="when to stop, from the start of the program")
    parser.add_argument("--workers", type=int, default=1, help="jobs at once; each holds 8 to 14 GB in bfloat16")
    parser.add_argument("--checkpoint-every", type=int, default=50, help="steps between checkpoints of a training")
    parser.add_argument("--nice", type=int, default=19, help="priority of this process and its workers")
    parser.add_argument("--work", type=Path, default=Path("home/lpr-real"), help="for text, checkpoints and results")
    parser.add_argument("--out", type=Path, default=Path("home/lpr-real/report"), help="tables, without ending")
    chosen = parser.parse_args()
    if chosen.rate_items is None:
        chosen.rate_items = chosen.items
    os.nice(chosen.nice)
    # A plain kill ends the workers too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    run(chosen, time.monotonic() + 60 * chosen.minutes)


def run(chosen: argparse.Namespace, deadline: float) -> None:
    """Runs jobs until they are done or the time is over; the report is written after each."""
    chosen.bases = 1
    if chosen.precision == "auto":
        gain = bfloat16_gain()
        chosen.precision = "bfloat16" if gain >= GAIN or torch.cuda.is_available() else "float32"
        print(f"training in {chosen.precision}: a product in bfloat16 is {gain:.2f} times as fast", flush=True)
    packed, data = prepare(size := size_of(chosen), chosen)
    board = Board(chosen, size, data, HeldOut(packed, Mixture(**data["mixture"])))
    board.about["precision"] = chosen.precision
    board.write()
    jobs = RealQueue(size, chosen, packed).jobs()
    if chosen.new_words:
        home = chosen.work / "new-words"
        chosen.words_base = with_new_words(chosen.base_model, Mixture(**data["mixture"]), chosen.new_words, home)
    if chosen.words_base:
        own = argparse.Namespace(**{**vars(chosen), "base_model": str(chosen.words_base)})
        packed, board.about["data_with_new_words"] = prepare(size, own)
        jobs += RealQueue(size, own, packed, words=True).jobs()
    work(jobs, board, deadline)
    print(board.text(), flush=True)


def size_of(chosen: argparse.Namespace) -> Size:
    """The size with as many steps as the tokens need, and a review of as many instances as it was packed."""
    steps = max(2, round(chosen.tokens / (REAL.batch * REAL.length)))
    reviewed = round(REAL.review_steps * steps / REAL.stage1_steps)
    size = dataclasses.replace(REAL, stage1_steps=steps, review_steps=max(2, reviewed), task_limit=chosen.items)
    read = len(chosen.original) + size.review_ratio * len(chosen.expanded)
    least = size.review_batch * size.length / read / (steps * size.batch * size.length)
    if least > size.review_share:
        note = f"shortened run: a replay of {least:.1%} is the least that fills a batch; no measure of the methods"
        size = dataclasses.replace(size, review_share=least, note=note)
    return changed(size, chosen.set)


if __name__ == "__main__":
    main()
