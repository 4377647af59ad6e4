"""What `curate` costs by step on a large corpus: wall and CPU seconds, and peak memory of all processes together.

    python benchmarks/curation_corpus.py CORPUS SOURCES 1000000      (makes the corpus)
    python benchmarks/curation_scale.py SOURCES HOME [SETTING=VALUE ...]

HOME: a new home, or one that an earlier, killed run left. CPU seconds are those of this process and of all processes
that it started, Ray's among them. Memory: the sum of their proportional set sizes (a page that several share counts
once), seen every half second. The table is written to HOME/curation_scale.json as it grows.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from eclectus.flows.curate import curate
from eclectus.flows.flow import call_in_run
from eclectus.flows.parameters import CurateParameters
from eclectus.storage.home import Home
from eclectus.storage.journal import Journal
from eclectus.storage.step_keys import KnownKeys
from eclectus.tasks.run import Run, activate
from eclectus.tasks.settings import parse_settings

EVERY = 0.5
LANGUAGES = {"expanded_languages": ["el", "es", "hu", "tr", "zh"]}


class Watch(threading.Thread):
    """Adds up CPU seconds of a tree of processes, also of those that end, and keeps the peak of their memory."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._seconds: dict[tuple[int, float], float] = {}
        self.peak = 0
        self.stopped = threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(EVERY):
            self.look()

    def look(self) -> float:
        """CPU seconds so far."""
        memory, me = 0, psutil.Process()
        for process in [me, *me.children(recursive=True)]:
            with contextlib.suppress(psutil.Error, OSError):
                times = process.cpu_times()
                self._seconds[process.pid, process.create_time()] = times.user + times.system
                memory += proportional_bytes(process.pid)
        self.peak = max(self.peak, memory)
        return sum(self._seconds.values())


def proportional_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


class Table:
    """A display that records what each step cost."""

    def __init__(self, watch: Watch, path: Path) -> None:
        self._watch, self._path = watch, path
        self.rows: list[dict[str, Any]] = []
        self._began = (0.0, 0.0)

    def step_began(self, label: str) -> None:
        self._watch.peak = 0
        self._began = time.monotonic(), self._watch.look()

    def step_progressed(self, *_: object) -> None:
        pass

    def notified(self, name: str, text: str) -> None:
        print(f"  {name}: {text}", flush=True)

    def step_ended(self, label: str, state: str, reason: str, seconds: float, output: Any) -> None:
        wall, cpu = time.monotonic() - self._began[0], self._watch.look() - self._began[1]
        row = {"step": label, "state": state, "wall": round(wall, 1), "cpu": round(cpu, 1)}
        row |= {"peak_gb": round(self._watch.peak / 1e9, 2), "rows": output.manifest()["rows"] if output else None}
        self.rows.append(row)
        print(f"{label:18}{state:11}{wall:8.1f} s wall{cpu:8.1f} s CPU{row['peak_gb']:7.2f} GB", flush=True)
        self._path.write_text(json.dumps(self.rows, indent=1))


def main() -> None:
    sources, home = sys.argv[1], Home.open(sys.argv[2])
    given = dict(each.split("=", 1) for each in sys.argv[3:])
    values = LANGUAGES | {name: parse_settings(f"{name}: {text}", "arguments")[name] for name, text in given.items()}
    watch = Watch()
    table = Table(watch, home.root / "curation_scale.json")
    watch.start()
    began = time.monotonic()
    with Journal(home.journal, f"scale-{int(time.time())}") as journal:
        journal.event("run_started", flow="benchmark", parameters={}, packages={})
        known = KnownKeys(home.keys, home.store)
        run = Run(journal.run, home, journal, known, [table], "benchmark")
        with activate(run):
            call_in_run(curate, CurateParameters(sources=[sources], **values))
        journal.event("run_ended", state="completed", seconds=time.monotonic() - began)
    cpu = sum(row["cpu"] for row in table.rows)
    peak = max(row["peak_gb"] for row in table.rows)
    print(f"{'all':29}{time.monotonic() - began:8.1f} s wall{cpu:8.1f} s CPU{peak:7.2f} GB")


if __name__ == "__main__":
    main()
