"""Lory's claims, measured: Lory, its dense twin and its peers on the same text, at equal active parameters, tokens and order.

    python benchmarks/lory_claims.py --prepare .claims --corpus ../shared/corpus            once: minutes, the whole pipeline
    python benchmarks/lory_claims.py --run .claims --size laptop --seeds 3 --minutes 8.5    a GPU, or the CPU with patience

All models start from the same dense warm-up and go through `models.train`. Scores are without look-ahead: windows overlap by one
segment, and tokens of a window's first segment are not scored (Expert Choice looks ahead by nature: it is marked, and scored
again with fixed thresholds). Trainings run side by side in processes of their own, most important first; after each the
tables and all numbers so far are written to $OUT (or --out), so a run that is cut short loses only what was under way.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import queue
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from lory_claims_data import GROUPINGS, prepare, unpack  # noqa: E402
from lory_claims_tables import report  # noqa: E402

STUDY: dict[str, dict[str, Any]] = {
    "no second warm-up": dict(rewarm=0),
    "router init 0.02": dict(router_init=0.02),
    "router init 0.1": dict(router_init=0.1),
    "router init 1.0": dict(router_init=1.0),
    "moments reset": dict(moments="reset"),
    "dense warm-up 20%": dict(dense_share=0.2),
    "moments reset, no second warm-up": dict(moments="reset", rewarm=0),
    "router init 0.02, no second warm-up": dict(router_init=0.02, rewarm=0),
    "second warm-up 5 times as long": dict(rewarm=150),
    "first segment uniform": dict(first_segment="uniform"),
}
MORE: dict[str, dict[str, Any]] = {"16 experts": dict(experts=16), "32 experts": dict(experts=32)}


def jobs(parts: list[str], seeds: int) -> list[Any]:
    """What to train, most important first: `main`, `peers`, `study`, `more`."""
    from lory_claims_jobs import Job

    chosen = []
    if "main" in parts:
        chosen += [Job(model, seed=seed) for seed in range(seeds) for model in ("dense", "lory")]
    if "peers" in parts:
        peers = [("expert_choice", "similarity"), ("prefix", "similarity"), ("dense", "random"), ("lory", "random")]
        peers.append(("top_k", "similarity"))
        chosen += [Job(model, grouping, seed) for seed in range(seeds) for model, grouping in peers]
    for part, variants in (("study", STUDY), ("more", MORE)):
        if part in parts:
            chosen += [Job("lory", seed=seed, variant=n, **how) for seed in range(seeds) for n, how in variants.items()]
    if "more" in parts:
        models = [("segment_choice", "similarity"), ("dense", "domain"), ("lory", "domain")]
        chosen += [Job(model, grouping, seed) for seed in range(seeds) for model, grouping in models]
    return chosen


def work_on(tasks: Any, results: Any, size: Any, data: Path, work: Path) -> None:
    """A worker process: trains what it is handed until it is ended."""
    import torch
    from lory_claims_jobs import run_job

    torch.set_num_threads(1)
    while True:
        job = tasks.get()
        begun = time.monotonic()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        try:
            result = run_job(job, size, data, work)
        except Exception:
            result = {"error": traceback.format_exc()}
        result |= {"name": job.name, "job": dataclasses.asdict(job), "wall": round(time.monotonic() - begun, 1)}
        if torch.cuda.is_available():
            result["peak_megabytes"] = torch.cuda.max_memory_allocated() >> 20
            torch.cuda.empty_cache()
        results.put((job, result))


class Trainings:
    """Jobs on worker processes until a deadline: a job waits for its warm-up, and is left out if it could not end in time."""

    def __init__(self, wanted: list[Any], size: Any, data: Path, work: Path, workers: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._tasks, self._results = context.Queue(), context.Queue()
        arguments = (self._tasks, self._results, size, data, work)
        self._workers = [context.Process(target=work_on, args=arguments, daemon=True) for _ in range(workers)]
        self._wanted = wanted
        self._warm: set[str] = set()
        self._longest: dict[bool, float] = {}
        self._begun: set[str] = set()

    def run(self, deadline: float, done: Any) -> None:
        """Calls done(result) after every job."""
        for worker in self._workers:
            worker.start()
        under_way = 0
        try:
            while time.monotonic() < deadline:
                while under_way < len(self._workers) and (job := self._next(deadline)):
                    self._tasks.put(job)
                    under_way += 1
                if not under_way:
                    break
                try:
                    job, result = self._results.get(timeout=1.0)
                except queue.Empty:
                    continue
                under_way -= 1
                warm_up = job.model == "warmup"
                if warm_up and "error" not in result:
                    self._warm.add(job.warm)
                self._longest[warm_up] = max(self._longest.get(warm_up, 0.0), result["wall"])
                done(result)
        finally:
            for worker in self._workers:
                worker.terminate()
            for worker in self._workers:
                worker.join()

    def _next(self, deadline: float) -> Any:
        """The most important job that can begin, or the warm-up that it waits for."""
        if self._longest.get(False, 0.0) > deadline - time.monotonic():
            return None
        for job in self._wanted:
            if job.warm in self._warm:
                self._wanted.remove(job)
                return job
            if job.warm not in self._begun:
                self._begun.add(job.warm)
                return dataclasses.replace(job, model="warmup", variant="")
        return None


def run(arguments: argparse.Namespace) -> None:
    begun = time.monotonic()
    import torch
    from lory_claims_jobs import SIZES, step_times

    size = SIZES[arguments.size]
    changed = {
        name: getattr(arguments, name) for name in ("tokens", "batch", "jobs", "learning_rate", "windows", "length")
    }
    size = dataclasses.replace(size, **{name: value for name, value in changed.items() if value})
    out = Path(arguments.out or os.environ.get("OUT", "."))
    out.mkdir(parents=True, exist_ok=True)
    wanted = jobs(arguments.parts.split(","), arguments.seeds)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {size.jobs} processes of 1 thread"
    surroundings = (
        f"{time.strftime('%Y-%m-%d')}, {device}, torch {torch.__version__}: width {size.shape['hidden_size']}, "
        f"{size.shape['num_hidden_layers']} layers, vocabulary {size.vocabulary}, E 8, T {size.segment}, L {size.length}, "
        f"{size.steps} steps of {size.batch} instances ({size.tokens / 1e6:.1f}M tokens), peak rate {size.learning_rate:g}."
    )
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        for grouping in {job.grouping for job in wanted} | {GROUPINGS[0]}:
            unpack(Path(arguments.run), size.vocabulary, grouping, work / grouping, size.length)
        timed = arguments.timed.split(",") if arguments.timed else []
        times = step_times(size, work, timed, arguments.compiled)

        name = f"claims-{arguments.size}" + (f"-{arguments.label}" if arguments.label else "")

        def done(result: dict[str, Any]) -> None:
            results.append(result)
            print(_line(result, time.monotonic() - begun), flush=True)
            content = {"size": arguments.size, "settings": dataclasses.asdict(size), "times": times, "results": results}
            (out / f"{name}.json").write_text(json.dumps({"surroundings": surroundings, **content}))
            (out / f"{name}.md").write_text(report(arguments.size, results, times, surroundings))

        deadline = begun + 60 * arguments.minutes
        Trainings(wanted, size, Path(arguments.run), work, size.jobs).run(deadline, done)
    print(report(arguments.size, results, times, surroundings))
    print(f"{len(results)} trainings in {time.monotonic() - begun:.0f} s")


def _line(result: dict[str, Any], seconds: float) -> str:
    if "error" in result:
        return f"{seconds:.0f} s  {result['name']}: {result['error']}"
    scores = result.get("scores")
    told = f"{sum(scores['bits']) / sum(scores['bytes']):.4f} bits per byte, " if scores else ""
    return f"{seconds:.0f} s  {result['name']}: {told}{result['seconds']} s, scored in {result['scoring_seconds']} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", metavar="DIR", help="write the texts there")
    parser.add_argument("--corpus", default="../shared/corpus", help="folder of en.*.jsonl.gz with domains")
    parser.add_argument("--limit", type=int, default=0, help="at most this many documents of each file (0: all)")
    parser.add_argument("--run", metavar="DIR", help="train on the texts there")
    parser.add_argument("--size", default="laptop", choices=("laptop", "wide", "30m", "100m"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=8.5, help="when to stop, from the start")
    parser.add_argument("--parts", default="main,peers,study,more", help="what to train, of main, peers, study, more")
    parser.add_argument("--timed", default="dense,lory,prefix,expert_choice,top_k", help="models to time; '' for none")
    parser.add_argument("--compiled", action="store_true", help="time the models under torch.compile too")
    parser.add_argument("--tokens", type=float, help="training tokens, instead of the size's")
    parser.add_argument("--batch", type=int, help="instances a step, instead of the size's")
    parser.add_argument("--length", type=int, help="tokens in an instance, instead of the size's")
    parser.add_argument("--learning-rate", type=float, help="peak rate, instead of the size's")
    parser.add_argument("--jobs", type=int, help="trainings side by side, instead of the size's")
    parser.add_argument("--windows", type=int, help="score at most this many windows of held-out text, at random")
    parser.add_argument("--label", default="", help="added to the names of the results")
    parser.add_argument("--out", help="folder of the results; $OUT or here by default")
    arguments = parser.parse_args()
    if arguments.prepare:
        sources = [str(path) for path in sorted(Path(arguments.corpus).glob("en.*.jsonl*"))]
        if not sources:
            raise SystemExit(f"no en.*.jsonl or en.*.jsonl.gz in {arguments.corpus}; give their folder as --corpus")
        prepare(sources, Path(arguments.prepare), arguments.limit)
    if arguments.run:
        run(arguments)
    if not (arguments.prepare or arguments.run):
        parser.error("give --prepare DIR or --run DIR")


if __name__ == "__main__":
    main()
