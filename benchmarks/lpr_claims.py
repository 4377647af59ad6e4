"""MoE-LPR's claims: new languages learned, old ones retained, against baselines and ablations (docs/methods.md 2.5).

    python benchmarks/lpr_claims.py --corpus ../shared/corpus --size laptop --minutes 60
    python benchmarks/lpr_claims.py --corpus ../shared/corpus --size smollm --base-model SmolLM2.gguf \\
        --expanded el tr hu es

Sizes (lpr_sizes.py): laptop, a dense Llama trained here on the original languages; smollm, a pretrained base, shortened
and labelled so without a GPU; tiny, to see that everything works. Jobs run in worker processes in order of priority:
base and every method for the first seed, the other learning rates of the baselines, the other seeds, the sweeps. After
each job OUT.json and OUT.md are rewritten. When the minutes are over, running jobs are ended, and the tables say how
many seeds they hold; results are kept under --work, by settings, and the same command resumes from them. (By settings,
not code: after a change of code remove that folder.)

Cost at size laptop: 87 jobs, five minutes of one core for the base and 0.5 to 1.5 minutes for each other.

Retention is 100 * base / method in bits per byte of held-out text of the original languages. Every baseline trains as
many steps on the same text as stage 1; those with replay mix the review's text in and train as many steps as both
stages. Every baseline has the best of three to six learning rates, chosen on `valid`, a held-out part that is not
reported, by the expanded languages, in the baselines' favour. Full fine-tuning with and without replay, the mixture
that trains whole, and one stage have all their rates on every base (lpr_queue.py), so that retention can be compared at
equal gain; the others use the first seed's best (smollm without a GPU: one rate). Our own settings were chosen on
`valid` too, once.

The base of size laptop reads 30% of the expanded languages, in documents that stage 1 does not have. MoE-LPR freezes
embeddings and attention, so what it can reach depends on how well the base has learned those for the new languages;
real bases (the paper's Qwen, SmolLM less so) have seen billions of tokens of them. `--set foreign_share=0.03
base_steps=2000` gives a base that hardly knows them, and MoE-LPR then falls far behind full fine-tuning
(docs/benchmarks.md).
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
for name, value in {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}.items():
    os.environ.setdefault(name, value)

import torch  # noqa: E402
from lpr_data import Mixture, pack  # noqa: E402
from lpr_intervals import HeldOut  # noqa: E402
from lpr_queue import METHODS, Queue  # noqa: E402
from lpr_report import markdown, mean_of  # noqa: E402
from lpr_runs import open_pretrained, run_job  # noqa: E402
from lpr_sizes import Size, size_of  # noqa: E402

from eclectus.storage.atomic_write import write_atomically  # noqa: E402

# What a result does not depend on.
UNKEYED = (
    "name",
    "needs",
    "priority",
    "packed",
    "start",
    "out",
    "threads",
    "workers",
    "title",
    "sweep",
    "best_of",
    "base_seed",
    "checkpoint_every",
    "stage1_rate",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=Path("data/corpus"), help="folder of *.jsonl or *.jsonl.gz")
    parser.add_argument("--size", choices=("laptop", "smollm", "tiny"), default="laptop")
    parser.add_argument("--original", nargs="+", default=["en"], help="languages that the base knows")
    parser.add_argument("--expanded", nargs="+", default=["el", "hu", "tr"], help="languages that it is taught")
    parser.add_argument("--base-model", help="of size smollm: a folder, a .gguf file or a hub name")
    parser.add_argument("--eval", type=Path, help="of size smollm: folder of lm-eval questions, TASK.jsonl.gz")
    parser.add_argument("--seeds", type=int, default=3, help="of everything that is trained on top of a base")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--bases", type=int, default=1, help="bases, trained from as many seeds; the seeds take turns")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=METHODS, help="what to compare MoE-LPR with")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="other values of a size's fields")
    parser.add_argument("--minutes", type=float, default=60.0, help="when to stop, from the start of the program")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0: 10 on a GPU, one per core on a CPU")
    parser.add_argument("--work", type=Path, default=Path("home/lpr-claims"), help="for text, checkpoints and results")
    parser.add_argument("--out", type=Path, default=Path("home/lpr-claims/report"), help="tables, without ending")
    parser.add_argument("--no-sweeps", action="store_true")
    chosen = parser.parse_args()
    # A plain kill ends the workers too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    run(chosen, time.monotonic() + 60 * chosen.minutes)


def run(chosen: argparse.Namespace, deadline: float) -> None:
    """Runs all jobs until they are done or the time is over, and prints the tables."""
    size = changed(size_of(chosen.size, torch.cuda.is_available()), chosen.set)
    if size.shape is None and not chosen.base_model:
        raise SystemExit("size smollm needs --base-model: a folder, a .gguf file or a hub name")
    packed, data = prepare(size, chosen)
    board = Board(chosen, size, data, HeldOut(packed, Mixture(**data["mixture"])))
    board.write()
    work(Queue(size, chosen, packed).jobs(), board, deadline)
    print(board.text(), flush=True)


def changed(size: Size, words: list[str]) -> Size:
    """The size with other values of its number fields, from words NAME=VALUE. Raises SystemExit naming a wrong one."""
    numbers = {each.name for each in dataclasses.fields(size) if isinstance(getattr(size, each.name), int | float)}
    values = {}
    for word in words:
        name, _, value = word.partition("=")
        if name not in numbers:
            raise SystemExit(f"--set {word}: choose one of {', '.join(sorted(numbers))}")
        values[name] = type(getattr(size, name))(value)
    return dataclasses.replace(size, **values)


def prepare(size: Size, chosen: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """(folder of the packed text, its counts of tokens); packs it where that was not done before."""
    mixture = Mixture(
        corpus=str(chosen.corpus),
        original=tuple(chosen.original),
        expanded=tuple(chosen.expanded),
        length=size.length,
        held_bytes=size.held_bytes,
        base_tokens=size.base_steps * size.base_batch * size.length,
        foreign_share=size.foreign_share,
        expanded_tokens=size.stage1_steps * size.batch * size.length,
        review_original_share=size.review_share,
        review_ratio=size.review_ratio,
        vocabulary=size.vocabulary,
    )
    if both := set(mixture.original) & set(mixture.expanded):
        raise SystemExit(f"{', '.join(sorted(both))} is named as original and as expanded language: choose one")
    tokenizer = None
    about = [dataclasses.asdict(mixture), size.shape is None and chosen.base_model]
    if size.shape is None:
        from transformers import AutoTokenizer

        unpacked = chosen.work / f"base-{digest(chosen.base_model)}"
        if not (unpacked / "model.safetensors").exists():
            open_pretrained(chosen.base_model, unpacked)
        chosen.base_model = str(unpacked)
        tokenizer = AutoTokenizer.from_pretrained(unpacked).backend_tokenizer
    packed = chosen.work / f"text-{digest(about)}"
    return packed, pack(mixture, packed, tokenizer)


def text_of(data: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    """The parts of the text that a job depends on: the base not on the extension's, few jobs on the review's."""
    parts, fields = set(), set()
    if job["kind"] != "review" and not job.get("replay_share"):
        parts, fields = parts | {"review"}, fields | {"review_original_share", "review_ratio"}
    if job["kind"] == "base":
        parts, fields = parts | {"expanded"}, fields | {"expanded_tokens"}
    mixture = {name: value for name, value in data["mixture"].items() if name not in fields}
    return {**{name: value for name, value in data.items() if name not in parts}, "mixture": mixture}


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


class Board:
    """The results so far; rewritten after every job."""

    def __init__(self, chosen: argparse.Namespace, size: Size, data: dict[str, Any], held: HeldOut) -> None:
        import transformers

        device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
        self.about: dict[str, Any] = {
            "device": device,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "command": " ".join([Path(sys.argv[0]).name, *(word for word in sys.argv[1:] if not word.startswith("/"))]),
            "size": dataclasses.asdict(size),
            "original": chosen.original,
            "expanded": chosen.expanded,
            "data": data,
        }
        self.results: list[dict[str, Any]] = []
        self.errors: list[str] = []
        self.jobs = chosen.work / "jobs"
        self.held, self._out = held, chosen.out
        for folder in (self.jobs, chosen.out.parent):
            folder.mkdir(parents=True, exist_ok=True)

    def write(self) -> None:
        state = {"about": self.about, "results": self.results, "errors": self.errors}
        self._out.with_suffix(".json").write_text(json.dumps(state, indent=1))
        self._out.with_suffix(".md").write_text(self.text())

    def text(self) -> str:
        return markdown(self.about, self.results, self.errors, self.held)

    def resolve(self, job: dict[str, Any]) -> dict[str, Any]:
        """The job with its learning rate, its key and the paths that it reads and writes filled in."""
        by_name = {each["name"]: each for each in self.results}
        if job.get("best_of"):
            tried = [by_name[name] for name in job["best_of"] if name in by_name]
            best = min(tried, key=lambda each: mean_of(each["valid"], self.about["expanded"]))
            job = {**job, "rate": best["rate"]}
        start = by_name[job["needs"][0]] if job["needs"] else None
        about = {name: value for name, value in job.items() if name not in UNKEYED}
        data = self.about["data_with_new_words" if job.get("new_words") else "data"]
        key = digest([text_of(data, job), start and start["key"], about])
        place = {"key": key, "out": str(self.jobs / key)}
        return {**job, **place, **({"start": start["out"]} if start else {})}

    def known(self, job: dict[str, Any]) -> dict[str, Any] | None:
        """The stored result of a job with the same settings, if its files for later jobs exist."""
        path = self.jobs / f"{job['key']}.json"
        if not path.exists() or (
            job["kind"] in ("base", "words", "upcycle", "stage1") and not Path(job["out"]).exists()
        ):
            return None
        # Of what the result does not depend on, this run's; the job's `tasks` are which, the result's their scores.
        return {**json.loads(path.read_text()), **{name: job[name] for name in UNKEYED if name in job}}

    def add(self, result: dict[str, Any]) -> None:
        self.results.append(result)
        write_atomically(self.jobs / f"{result['key']}.json", json.dumps(result))


def work(jobs: list[dict[str, Any]], board: Board, deadline: float) -> None:
    """Gives ready jobs to the workers, best priority first, until all are done or the time is over.

    Results of earlier runs are taken first, so that a run without time writes the report of all there is. It ends when
    a worker is killed, as where memory is short: what was running resumes in the next run.
    """
    waiting = sorted(jobs, key=lambda job: job["priority"])
    done: set[str] = set()
    failed: set[str] = set()
    running: list[tuple[dict[str, Any], Future[dict[str, Any]]]] = []
    workers = jobs[0]["workers"]
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    killed = False
    try:
        while True:
            for job, promise in [each for each in running if each[1].done()]:
                running.remove((job, promise))
                try:
                    board.add(promise.result())
                    done.add(job["name"])
                except BrokenProcessPool:
                    waiting.append(job)
                    killed = True
                except Exception as error:
                    failed.add(job["name"])
                    board.errors.append(f"{job['name']}: {traceback.format_exception_only(error)[-1].strip()[:400]}")
                board.write()
                print(f"{deadline - time.monotonic():6.0f} s left  {job['name']}", flush=True)
            for job in [job for job in waiting if failed & set(job["needs"])]:
                waiting.remove(job)
                failed.add(job["name"])
            take_known(waiting, done, board)
            if killed or not (waiting or running) or time.monotonic() > deadline:
                break
            for each in [each for each in waiting if done >= set(each["needs"])][: workers - len(running)]:
                job = board.resolve(each)
                running.append((job, pool.submit(run_job, job)))
                waiting.remove(each)
            time.sleep(0.2)
        if killed:
            board.errors.append("a worker was killed, perhaps for want of memory: resume with fewer --workers")
        board.about["not_run"] = [job["name"] for job in waiting] + [job["name"] for job, _ in running]
        board.write()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in multiprocessing.active_children():
            worker.terminate()


def take_known(waiting: list[dict[str, Any]], done: set[str], board: Board) -> None:
    """Moves jobs whose result is there from `waiting` to `done`, and those that need them, too."""
    found = True
    while found:
        found = False
        for each in [each for each in waiting if done >= set(each["needs"])]:
            if result := board.known(board.resolve(each)):
                board.results.append(result)
                done.add(each["name"])
                waiting.remove(each)
                found = True


if __name__ == "__main__":
    main()
