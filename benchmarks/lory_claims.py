"""Lory's claims: Lory, its dense twin and its baselines on the same text, active parameters, tokens and order.

    python benchmarks/lory_claims.py --prepare .claims --corpus ../shared/corpus      once: the pipeline, 7 minutes
    python benchmarks/lory_claims.py --run .claims --seeds 3 --minutes 30 --out out     the same command resumes

All models start from the same dense warm-up and go through `eclectus.models.training.loop`. Scores are without
look-ahead: windows overlap, and their first tokens, at least a segment, are not scored (Expert Choice looks ahead by
nature: it is marked, and scored again with fixed thresholds). Every second held-out document of a domain is for
choosing settings; the others are reported. Trainings run in processes of their own, most important first (--parts).
After each the tables and all numbers so far are written to $OUT (or --out); the same command skips what is there, so an
interrupted run loses only unfinished trainings. No training starts that could not end within --minutes. Cost at size
laptop: 5 to 10 minutes per training on half of a busy core (top-k 25), 6 trainings for Lory and its twin, 15 for the
peers, 36 for the study, 21 more for `more`. Other text: --corpus, --domains, --split-seed; a GPU: --size 30m or 100m.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import multiprocessing
import os
import queue
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from lory_claims_data import GROUPINGS, held_out, prepare, unpack  # noqa: E402
from lory_claims_intervals import Documents  # noqa: E402
from lory_claims_tables import EVERYTHING, perplexities, report  # noqa: E402

from eclectus.storage.atomic_write import write_atomically  # noqa: E402

STUDY: dict[str, dict[str, Any]] = {
    "router init 2.4": dict(router_init=2.4),
    "router init 0.2": dict(router_init=0.2),
    "routers at 4 times the rate": dict(router_rate=4.0),
    "experts at twice the rate": dict(expert_rate=2.0),
    "experts at half the rate": dict(expert_rate=0.5),
    "no second warm-up": dict(rewarm=0),
    "second warm-up 4 times as long": dict(rewarm=120),
    "moments reset": dict(moments="reset"),
    "moments reset, no second warm-up": dict(moments="reset", rewarm=0),
    "dense warm-up 20%": dict(dense_share=0.2),
    "dense warm-up 1%": dict(dense_share=0.01),
    "first segment uniform": dict(first_segment="uniform"),
}
MORE: dict[str, dict[str, Any]] = {
    **{f"{each} experts": dict(experts=each) for each in (8, 16)},
    **{f"segments of {each}": dict(segment=each) for each in (16, 64)},
}


def jobs(parts: list[str], seeds: list[int]) -> list[Any]:
    """What to train, most important first: `main`, `peers`, `study`, `more`."""
    from lory_claims_jobs import Job

    chosen = []
    if "main" in parts:
        chosen += [Job(model, seed=seed) for seed in seeds for model in ("dense", "lory", "dense_wide")]
    if "peers" in parts:
        peers = [("dense", "random"), ("lory", "random"), ("prefix", "similarity"), ("segment_choice", "similarity")]
        peers += [("top_k", "similarity"), ("emo", "similarity"), ("expert_choice", "similarity")]
        chosen += [Job(model, grouping, seed) for seed in seeds for model, grouping in peers]
    for part, variants in (("study", STUDY), ("more", MORE)):
        if part in parts:
            chosen += [Job("lory", seed=seed, variant=n, **how) for seed in seeds for n, how in variants.items()]
    if "more" in parts:
        models = [("dense", "domain"), ("lory", "domain")]
        chosen += [Job(model, grouping, seed) for seed in seeds for model, grouping in models]
    return chosen


def end_with_parent() -> None:
    """Ends this worker when its parent is killed."""
    multiprocessing.parent_process().join()
    os._exit(1)


def work_on(tasks: Any, results: Any, size: Any, data: Path, work: Path) -> None:
    """A worker process: runs the jobs that it receives until it is ended, or its parent is gone."""
    threading.Thread(target=end_with_parent, daemon=True).start()
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
    """Runs jobs in worker processes until a deadline: a job waits for its warm-up, or is skipped if too late."""

    def __init__(self, wanted: list[Any], size: Any, data: Path, work: Path, workers: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._tasks, self._results = context.Queue(), context.Queue()
        arguments = (self._tasks, self._results, size, data, work)
        self._workers = [context.Process(target=work_on, args=arguments, daemon=True) for _ in range(workers)]
        self._wanted = wanted
        self._warm = {path.parent.name for path in work.glob("warm/*/moments.safetensors")}
        self._longest: dict[bool, float] = {}
        self._begun = set(self._warm)

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
                    if not all(worker.is_alive() for worker in self._workers):
                        raise SystemExit(
                            "a training process was killed; the same command resumes, --jobs 1 needs less memory"
                        ) from None
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
            if not job.warm or job.warm in self._warm:
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

    changed = ("tokens", "batch", "learning_rate", "windows", "length", "segment")
    size = dataclasses.replace(
        SIZES[arguments.size], **{name: value for name in changed if (value := getattr(arguments, name))}
    )
    on_gpu = torch.cuda.is_available()
    workers = arguments.jobs or (size.jobs if on_gpu else max(1, (os.cpu_count() or 1) // 2))
    out, data = Path(arguments.out or os.environ.get("OUT", ".")), Path(arguments.run)
    name = f"claims-{arguments.size}" + (f"-{arguments.label}" if arguments.label else "")
    work = out / f"{name}.work"
    work.mkdir(parents=True, exist_ok=True)
    settings = {**dataclasses.asdict(size), "jobs": None, "cut": None, "data": digest(data, size.vocabulary)}
    kept = finished(out / f"{name}.json", settings)
    parts = arguments.only.split(",")
    asked = jobs(arguments.parts.split(","), seeds_of(arguments.seeds))
    asked = [job for job in asked if any(part in job.name for part in parts)]
    wanted = missing(asked, kept["results"])
    for grouping in {job.grouping for job in wanted} | {GROUPINGS[0]}:
        unpack(data, size.vocabulary, grouping, work / grouping, size.length)
    times = kept["times"]
    if arguments.timed and not times:
        times = step_times(size, work, arguments.timed.split(","), arguments.compiled)
    device = torch.cuda.get_device_name() if on_gpu else f"CPU, {workers} processes of 1 thread"
    surroundings = (
        f"{time.strftime('%Y-%m-%d')}, {device}, torch {torch.__version__}: width {size.shape['hidden_size']}, "
        f"{size.shape['num_hidden_layers']} layers, vocabulary {size.vocabulary}, E {size.experts}, "
        f"T {size.segment}, L {size.length}, "
        f"{size.steps} steps of {size.batch} instances ({size.tokens / 1e6:.2f}M tokens), "
        f"peak rate {size.learning_rate:g}."
    )
    results: list[dict[str, Any]] = kept["results"]
    documents = Documents(data, size.vocabulary, held_out(data, size.vocabulary, size.length, size.read_only)[3])

    def done(result: dict[str, Any]) -> None:
        results.append(result)
        print(_line(result, time.monotonic() - begun), flush=True)
        write(
            out / f"{name}.json",
            {"surroundings": surroundings, "settings": settings, "times": times, "results": results},
        )
        (out / f"{name}.md").write_text(report(arguments.size, results, times, surroundings, documents))

    print(f"{len(results)} trainings are kept from before, {len(wanted)} to do", flush=True)
    Trainings(wanted, size, data, work, workers).run(begun + 60 * arguments.minutes, done)
    print(report(arguments.size, results, times, surroundings, documents))
    print(f"{len(results)} trainings in {time.monotonic() - begun:.0f} s; results in {out / name}.json and .md")
    if left := missing(asked, results):
        print(f"{len(left)} trainings failed or did not fit into the time; the same command resumes with them")


def seeds_of(given: str) -> list[int]:
    """A count, as in 3, or the seeds themselves, as in 100,101."""
    return [int(each) for each in given.split(",") if each] if "," in given else list(range(int(given)))


def digest(data: Path, vocabulary: int) -> str:
    path = data / f"v{vocabulary}.npz"
    if not path.is_file():
        raise SystemExit(f"{path} is not there; write it first with --prepare {data} --size of the same vocabulary")
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def finished(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Results of an earlier run with the same settings; raises for results with other settings."""
    if not path.is_file():
        return {"times": [], "results": []}
    found = json.loads(path.read_text())
    other = [key for key, value in settings.items() if found["settings"].get(key) != value]
    if other:
        raise SystemExit(
            f"{path} holds results with another {', '.join(other)}; give --label or --out, or move the file away"
        )
    return {"times": found["times"], "results": [each for each in found["results"] if "error" not in each]}


def missing(asked: list[Any], results: list[dict[str, Any]]) -> list[Any]:
    done = [each["job"] for each in results if "error" not in each]
    return [job for job in asked if dataclasses.asdict(job) not in done]


def write(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(content))


def _line(result: dict[str, Any], seconds: float) -> str:
    if "error" in result:
        return f"{seconds:.0f} s  {result['name']}: {result['error']}"
    scores = result.get("scores")
    perplexity = f"perplexity {perplexities(result)[EVERYTHING]:.2f}, " if scores else ""
    return (
        f"{seconds:.0f} s  {result['name']}: {perplexity}{result['seconds']} s, scored in {result['scoring_seconds']} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", metavar="DIR", help="write the texts there")
    parser.add_argument("--corpus", default="../shared/corpus", help="folder of en.DOMAIN.jsonl or .jsonl.gz files")
    parser.add_argument("--domains", help="only these files of it: code,legal")
    parser.add_argument("--limit", type=int, default=0, help="at most this many documents of each file (0: all)")
    parser.add_argument(
        "--cut",
        type=int,
        help="train on passages of at most so many characters, instead of the size's; 0: on whole documents",
    )
    parser.add_argument("--split-seed", type=int, default=0, help="another one holds out other documents")
    parser.add_argument("--run", metavar="DIR", help="train on the texts there")
    parser.add_argument(
        "--size",
        default="laptop",
        choices=("laptop", "width64", "wide", "30m", "100m"),
        help="of the models, and of the vocabulary",
    )
    parser.add_argument("--seeds", default="3", help="how many, or which: 3 is 0,1,2; a single other one: 7,")
    parser.add_argument("--minutes", type=float, default=8.5, help="time limit; the same command resumes")
    parser.add_argument("--parts", default="main,peers,study,more", help="what to train, of main, peers, study, more")
    parser.add_argument("--only", default="", help="of those, only jobs whose names hold one of these, by commas")
    parser.add_argument("--timed", default="dense,lory,prefix,expert_choice,top_k", help="models to time; '' for none")
    parser.add_argument("--compiled", action="store_true", help="time the models under torch.compile too")
    parser.add_argument("--tokens", type=float, help="training tokens, instead of the size's")
    parser.add_argument("--batch", type=int, help="instances per step, instead of the size's")
    parser.add_argument("--length", type=int, help="tokens in an instance, instead of the size's")
    parser.add_argument("--segment", type=int, help="tokens in a segment, instead of the size's")
    parser.add_argument("--learning-rate", type=float, help="peak rate, instead of the size's")
    parser.add_argument(
        "--jobs", type=int, help="trainings side by side; by default half the cores, on a GPU the size's"
    )
    parser.add_argument("--windows", type=int, help="score at most this many windows of held-out text, at random")
    parser.add_argument("--label", default="", help="added to the names of the results")
    parser.add_argument("--out", help="folder of the results and of unfinished work; $OUT or here by default")
    arguments = parser.parse_args()
    if arguments.prepare:
        from lory_claims_jobs import SIZES

        size = SIZES[arguments.size]
        form = (size.vocabulary, size.length)
        cut = size.cut if arguments.cut is None else arguments.cut
        prepare(sources(arguments), Path(arguments.prepare), {form}, arguments.limit, cut, arguments.split_seed)
    if arguments.run:
        run(arguments)
    if not (arguments.prepare or arguments.run):
        parser.error("give --prepare DIR or --run DIR")


def sources(arguments: argparse.Namespace) -> list[str]:
    """The requested files of the corpus."""
    found = {path.name.split(".")[1]: str(path) for path in sorted(Path(arguments.corpus).glob("en.*.jsonl*"))}
    if not found:
        raise SystemExit(
            f"no en.DOMAIN.jsonl or en.DOMAIN.jsonl.gz in {arguments.corpus}; give their folder as --corpus"
        )
    chosen = arguments.domains.split(",") if arguments.domains else list(found)
    if unknown := sorted(set(chosen) - set(found)):
        raise SystemExit(f"--domains {', '.join(unknown)}: not in {arguments.corpus}, which has {', '.join(found)}")
    return [found[name] for name in chosen]


if __name__ == "__main__":
    main()
