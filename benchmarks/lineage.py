"""Time of upstream and downstream queries in a history of a million steps, and of its compaction.

10,000 runs of 100 steps, in projects of 100 runs: every run reads artifacts of its own steps and of the previous run of
the project, so chains are up to 10,000 steps long. Journals are written as a run writes them, without syncing, then
compacted. The peer is the same question as a user would write it, a recursive query over `step_inputs` and
`step_outputs`, up to 100,000 steps: beyond, it takes minutes per answer.

    OMP_NUM_THREADS=1 python benchmarks/lineage.py [--steps 1000000] [--home FOLDER]   # 3 GB; a kept FOLDER is reused
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from eclectus.storage.home import Home
from eclectus.storage.lineage.compact import compact
from eclectus.storage.lineage.connection import connect, walk

STEPS_PER_RUN = 100
RUNS_PER_PROJECT = 100
PEER_UP_TO = 100_000
KINDS = ["documents", "embeddings", "neighbors", "grouping", "instances", "checkpoint", "evaluation"]
SETTINGS = {
    name: index / 7 for index, name in enumerate("k rate width depth seed batch steps warmup decay gamma".split())
}
PEER = """
    with recursive
        edge as (select o.artifact as output, i.artifact as input from step_outputs o join step_inputs i using (step)),
        found(artifact) as (select ?::varchar union select {there} from found join edge on edge.{here} = found.artifact)
    from found"""


def digest(step: int) -> str:
    return hashlib.sha256(str(step).encode()).hexdigest()


def name(step: int) -> str:
    return f"{KINDS[step % len(KINDS)]}-{digest(step)}"


def write_history(home: Home, steps: int) -> None:
    """The journals of `steps` steps; step n reads what n - 1, n - 3 and n - STEPS_PER_RUN of its project made."""
    folder = home.journal / "events"
    folder.mkdir(parents=True, exist_ok=True)
    project = STEPS_PER_RUN * RUNS_PER_PROJECT
    for number in range(steps // STEPS_PER_RUN):
        run = f"20260101-{number:06d}-bench"
        lines = [
            {"event": "run_started", "flow": "main", "parameters": SETTINGS, "packages": {"torch": "2"}, "host": "h"}
        ]
        for step in range(number * STEPS_PER_RUN, (number + 1) * STEPS_PER_RUN):
            at = step % project
            earlier = [step - back for back in (1, 3, STEPS_PER_RUN) if back <= at]
            inputs = {f"in{back}": name(each) for back, each in enumerate(earlier)} or {"source": f"file-{digest(-1)}"}
            own = {
                "step": f"{step:032x}",
                "name": "work",
                "label": f"work {step % STEPS_PER_RUN}",
                "flow": "main",
                "key": digest(step),
            }
            output = {
                "kind": name(step).split("-")[0],
                "artifact": digest(step),
                "rows": 5,
                "bytes": 9,
                "path": "somewhere",
                "created": "2026-01-01T00:00:00Z",
                "statistics": {"loss": 1.0},
            }
            ended = {"version": 1, "state": "completed", "reason": "first time", "seconds": 1.0}
            lines.append({"event": "step_started", **own})
            about = {"settings": SETTINGS, "inputs": inputs, "output": output}
            lines.append({"event": "step_ended", **own, **ended, **about})
        lines.append({"event": "run_ended", "state": "completed", "seconds": 9.0})
        logged = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(1_767_225_600 + number * 60))
        text = "".join(json.dumps({**line, "logged": logged, "run": run}) + "\n" for line in lines)
        (folder / f"{run}.{socket.gethostname()}-1-bench.ndjson").write_text(text)


def once(act: Callable[[], Any]) -> tuple[float, float, int]:
    """(wall seconds, CPU seconds, rows) of a question."""
    wall, cpu = time.perf_counter(), time.process_time()
    given = act()
    count = len(given if isinstance(given, list) else given.fetchall())
    return time.perf_counter() - wall, time.process_time() - cpu, count


def measure(act: Callable[[], Any]) -> tuple[float, float, int]:
    """The median of three of `once`."""
    return statistics.median_low(once(act) for _ in range(3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--home", help="folder that is kept and used again (default: a temporary one)")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        home = Home.open(chosen.home or scratch)
        if not any(home.journal.glob("events/[1-9]-*.parquet")):
            wall = time.perf_counter()
            write_history(home, chosen.steps)
            print(f"{chosen.steps:,} steps written in {time.perf_counter() - wall:.0f} s", flush=True)
            wall, cpu = time.perf_counter(), time.process_time()
            compact(home, sys.maxsize)
            print(f"compacted in {time.perf_counter() - wall:.0f} s, {time.process_time() - cpu:.0f} CPU s", flush=True)
            time.sleep(21)
            compact(home)
        report(home, chosen.steps)


def report(home: Home, steps: int) -> None:
    project = STEPS_PER_RUN * RUNS_PER_PROJECT
    middle = steps // project // 2 * project
    asked = {
        "first of a project": middle,
        "500th": middle + 500,
        "middle": middle + project // 2,
        "last": middle + project - 1,
    }
    print(f"{'artifact':20} {'question':12} {'rows':>7} {'wall s':>8} {'CPU s':>8} {'peer CPU s':>11} {'ratio':>6}")
    for title, step in asked.items():
        peer = ""
        for macro, there, here in (("upstream", "input", "output"), ("downstream", "output", "input")):
            with connect(home) as connection:
                asked_for = partial(connection.execute, f"from {macro}(?)", [name(step)])
                wall, cpu, rows = measure(asked_for)
                if steps <= PEER_UP_TO:
                    _, peer_cpu, found = once(
                        partial(connection.execute, PEER.format(there=there, here=here), [digest(step)])
                    )
                    assert found == rows, (found, rows)
                    peer = f"{peer_cpu:11.2f} {peer_cpu / cpu:5.0f}x"
            print(f"{title:20} {macro:12} {rows:7,} {wall:8.3f} {cpu:8.3f} {peer}", flush=True)
        wall, cpu, rows = measure(partial(walk, name(step), home))
        print(f"{title:20} {'walk, both':12} {rows:7,} {wall:8.3f} {cpu:8.3f}", flush=True)
    environment = {**os.environ, "ECLECTUS_HOME": str(home.root), "PYTHONPATH": str(Path(__file__).parent.parent)}
    wall = time.perf_counter()
    words = [sys.executable, "-m", "eclectus", "lineage", name(middle + 500), "--json"]
    subprocess.run(words, env=environment, check=True, capture_output=True)
    print(f"eclectus lineage, the whole command: {time.perf_counter() - wall:.2f} s")


if __name__ == "__main__":
    main()
