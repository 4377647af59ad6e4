"""A home that is operated: `up`, a schedule of one minute, documents that arrive, and a record of all that happens.

Everything that is started carries a mark in its environment, by which its processes are found; their descendants count
too. Two threads watch, once a second: processes, the runs of the deployment (through Prefect's API, as its UI does) and
which runs hold their journals, that is, are worked at.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import random
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.retraining import PASSES, SMALL, WORDS
from tests.support.week_clock import COMPILER, SteppedClock

ROOT = Path(__file__).parents[2]
MARK = "ECLECTUS_WEEK"
FLOW_RUN = "PREFECT__FLOW_RUN_ID"
DISK_MB = 400
SETTINGS = SMALL | {
    "extension_experts": 2, "post_pretrain_steps": 2, "review_steps": 1, "retrain_documents": 5, "retrain_tokens": 50,
}  # fmt: skip
# Of a command: the machine may be busy.
PATIENCE = 420
# The issue asks for a minute; a process that starts on a busy machine may take another.
STUCK = 150.0
ACTIVE = ("Pending", "Submitting", "InfrastructurePending", "Running", "Cancelling")


@dataclass
class Seen:
    """A flow run of the deployment, as it was seen: (real time, state, message) whenever its state had changed."""

    due: str
    states: list[tuple[float, str, str]] = field(default_factory=list)
    gone: float | None = None
    auto: bool = True

    @property
    def state(self) -> str:
        return self.states[-1][1]


@dataclass(frozen=True)
class Did:
    """What was done to the home, from and until when (real time); it may explain how a run ended.

    clock_started, clock_ended: the same by the clock of the home's processes.
    """

    name: str
    about: str
    started: float
    ended: float
    clock_started: float
    clock_ended: float


class Week:
    """home: on a file system of DISK_MB where we may mount one. environment: of every command."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.started, self.folder, self.seed = time.time(), folder, seed
        folder.mkdir(parents=True, exist_ok=True)
        self.lines: list[str] = []
        self.did: list[Did] = []
        self.flow_runs: dict[str, Seen] = {}
        self.at_work: list[tuple[float, dict[str, str]]] = []
        self.processes: dict[tuple[int, int], str] = {}
        self.ports: set[int] = set()
        self.documents = 0
        self.deleted: set[str] = set()
        # Since when a run waits for something that should not take long: (flow run, what) -> real time.
        self._waits: dict[tuple[str, str], float] = {}
        self.faults: list[str] = []
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self.disk = folder / "disk"
        self.disk.mkdir(exist_ok=True)
        self.mounted = self._mount()
        self.home = self.disk / "home"
        self.sources = folder / "sources"
        self.sources.mkdir(exist_ok=True)
        # Ray's sockets are in there, whose paths must be short.
        self.temporary = Path(tempfile.mkdtemp(prefix="ecw-", dir="/tmp"))
        self.clock = SteppedClock(folder / "clock") if COMPILER else None
        self.mark = secrets.token_hex(8)
        own = {
            name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "RAY_", "ECLECTUS_"))
        }
        self.environment = own | {
            MARK: self.mark,
            "PYTHONPATH": str(ROOT),
            "TMPDIR": str(self.temporary),
            "ECLECTUS_HOME": str(self.home),
            **(self.clock.environment if self.clock else {}),
        }
        # Here, since the fast tests of the plan and the reckoning need no torch.
        from tests.support.dense_bases import write_base

        write_base(folder / "base", "llama")
        gate = {"lines": {"extended": {"model": "stage 2", "base": "dense", "rules": PASSES}}}
        (folder / "gate.yaml").write_text(json.dumps(gate))
        self.parameters = SETTINGS | {
            "sources": [str(self.sources)], "base_model": str(folder / "base"), "gate": str(folder / "gate.yaml"),
        }  # fmt: skip
        (folder / "week.yaml").write_text(json.dumps(self.parameters))

    def _mount(self) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(self.disk)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            self.log(f"no full disk in this week: {done.stderr.strip() or 'tmpfs cannot be mounted'}")
        return not done.returncode

    def close(self) -> None:
        """Ends whatever is left, so that a failed test leaves nothing behind."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(30)
        for pid, _ in self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        kept = self.folder / "home-at-the-end"
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir()
        for name in ("journal", "prefect"):
            shutil.copytree(self.home / name, kept / name, dirs_exist_ok=True, ignore_dangling_symlinks=True)
        if self.mounted:
            subprocess.run(["umount", "--lazy", str(self.disk)], check=False)
        shutil.rmtree(self.temporary, ignore_errors=True)

    # What happens is logged with seconds since the start, and kept in a file.

    def log(self, text: str) -> None:
        line = f"{time.time() - self.started:8.1f} s  {text}"
        self.lines.append(line)
        print(line, flush=True)
        with open(self.folder / "timeline.txt", "a") as handle:
            handle.write(line + "\n")

    def fault(self, text: str) -> None:
        self.faults.append(text)
        self.log(f"FAULT {text}")

    def now(self) -> float:
        """By the clock of the home's processes."""
        return time.time() + (self.clock.offset if self.clock else 0)

    # Commands, as a user types them.

    def start(self, *words: str, **more: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "eclectus", *words], cwd=ROOT, env=self.environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more,
        )  # fmt: skip

    def ask(self, *words: str) -> tuple[int, str]:
        """Exit code and output of a command; a command that takes longer than PATIENCE is a fault."""
        return self.finish(self.start(*words), words)

    def finish(self, process: subprocess.Popen[str], words: tuple[str, ...]) -> tuple[int, str]:
        try:
            text = process.communicate(timeout=PATIENCE)[0]
        except subprocess.TimeoutExpired:
            process.kill()
            text = process.communicate()[0]
            self.fault(f"`eclectus {' '.join(words)}` did not end in {PATIENCE} s: {text[-300:]}")
        if "Traceback (most recent call last)" in text:
            self.fault(f"`eclectus {' '.join(words)}` showed a traceback: {text[-1500:]}")
        return process.returncode, text

    def noted(self, name: str, about: str, started: float, clock_started: float) -> None:
        self.did.append(Did(name, about, started, time.time(), clock_started, self.now()))

    def rows(self, sql: str) -> list[dict[str, Any]]:
        code, text = self.ask("sql", "--json", sql)
        assert code == 0, f"{sql}: {text}"
        return [json.loads(line) for line in text.splitlines() if line.startswith("{")]

    # Prefect's API, as its UI uses it.

    def notes(self) -> dict[str, Any] | None:
        with contextlib.suppress(OSError, ValueError):
            return json.loads((self.home / "prefect" / "services.json").read_text())
        return None

    def api(self, path: str, body: Any = None, method: str | None = None) -> Any:
        notes = self.notes()
        if not notes:
            raise OSError("no server is noted")
        headers = {"content-type": "application/json"}
        if password := self._password():
            headers["authorization"] = "Basic " + base64.b64encode(password.encode()).decode()
        request = urllib.request.Request(
            f"{notes['api']}/{path}", None if body is None else json.dumps(body).encode(), headers, method=method
        )
        deadline = time.monotonic() + 20
        while True:
            try:
                with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=20) as answer:
                    text = answer.read()
                return json.loads(text) if text else None
            except urllib.error.HTTPError as error:
                # The database is locked by other requests.
                if error.code != 503 or time.monotonic() > deadline:
                    raise
            time.sleep(1)

    def _password(self) -> str:
        with contextlib.suppress(OSError):
            return (self.home / "prefect" / "auth").read_text().strip()
        return ""

    def deployment(self) -> dict[str, Any]:
        return self.api("deployments/name/retrain/retrain")

    def schedule_every_minute(self) -> None:
        """A second schedule with parameters of its own; the daily one of prefect.yaml stays."""
        schedule = {"interval": 60, "anchor_date": "2026-01-01T00:00:00+00:00", "timezone": "UTC"}
        given = {"active": True, "schedule": schedule, "parameters": {"parameters": self.parameters}}
        self.api(f"deployments/{self.deployment()['id']}/schedules", [given])

    def limit(self) -> dict[str, Any]:
        return self.deployment()["global_concurrency_limit"]

    # The corpus.

    def write_documents(self, rng: random.Random) -> None:
        self.documents += 1
        lines = [
            json.dumps({"text": " ".join(rng.choices(WORDS[language].split(), k=20)), "language": language})
            for language in ("en", "tr")
            for _ in range(24)
        ]
        unfinished = self.folder / "documents"
        unfinished.write_text("\n".join(lines))
        unfinished.rename(self.sources / f"day-{self.documents}.jsonl")

    # Processes, by their mark.

    def alive(self) -> list[tuple[int, int]]:
        """(id, start tick) of those that carry the mark or descend from one that did."""
        found, parents = {}, {}
        for entry in os.listdir("/proc"):
            if not entry.isdigit():
                continue
            with contextlib.suppress(OSError, IndexError):
                fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
                if fields[0] == "Z":
                    continue
                key = (int(entry), int(fields[19]))
                parents[key] = int(fields[1])
                marked = f"{MARK}={self.mark}".encode() in Path(f"/proc/{entry}/environ").read_bytes()
                if marked or key in self.processes:
                    found[key] = True
        ids = {pid for pid, _ in found}
        for key, parent in parents.items():
            if parent in ids:
                found[key] = True
        for key in found:
            if key not in self.processes or not self.processes[key]:
                with contextlib.suppress(OSError):
                    line = Path(f"/proc/{key[0]}/cmdline").read_bytes().replace(b"\0", b" ")
                    self.processes[key] = line.decode(errors="replace").strip()
        return list(found)

    def victims(self, pattern: str, flow_run: bool = False) -> list[int]:
        """Ids of live processes whose command line matches; flow_run: that a flow run of the deployment lives in."""
        return [
            pid
            for pid, tick in self.alive()
            if re.search(pattern, self.processes.get((pid, tick), "")) and (not flow_run or flow_run_of(pid))
        ]

    # Watching.

    def watch(self) -> None:
        for target in (self._watch_processes, self._watch_runs):
            thread = threading.Thread(target=self._repeat, args=(target,), daemon=True)
            thread.start()
            self._threads.append(thread)

    def _repeat(self, act: Any) -> None:
        while not self._stopping.wait(1):
            try:
                act()
            except Exception as error:
                self.log(f"(watching: {type(error).__name__}: {error})")

    def _watch_processes(self) -> None:
        alive = self.alive()
        self.ports |= listening({pid for pid, _ in alive})
        held = {}
        for path in (self.home / "journal" / "events").glob("*.ndjson"):
            pid = re.search(r"-(\d+)-[0-9a-f]{4}\.ndjson$", path.name)
            if pid and (flow_run := flow_run_of(int(pid[1]))) and is_locked(path):
                held[path.name.split(".")[0]] = flow_run
        if len(held) > 1 and not (self.at_work and len(self.at_work[-1][1]) > 1):
            self.log(f"(at work at once: {held})")
        self.at_work.append((time.time(), held))

    def _watch_runs(self) -> None:
        try:
            deployment = self.deployment()
            found = self.api(
                "flow_runs/filter",
                {"flow_runs": {"deployment_id": {"any_": [deployment["id"]]}}, "limit": 200,
                 "sort": "EXPECTED_START_TIME_ASC"},
            )  # fmt: skip
        except (OSError, ValueError, TypeError):
            # No server, nobody to blame for a run that waits.
            self._waits.clear()
            return
        now = time.time()
        for each in found:
            state = each["state"] or {"name": "?", "message": ""}
            seen = self.flow_runs.setdefault(each["id"], Seen(each["expected_start_time"], auto=each["auto_scheduled"]))
            seen.gone = None
            if not seen.states or seen.state != state["name"]:
                seen.states.append((now, state["name"], state.get("message") or ""))
                if state["name"] != "Scheduled":
                    self.log(f"  run {short(each['id'])} due {each['expected_start_time'][11:19]}: {state['name']}"
                             f" {(state.get('message') or '')[:110]}")  # fmt: skip
        self._look_for_stuck(found)
        if len(found) < 200:
            for name in set(self.flow_runs) - {each["id"] for each in found}:
                if self.flow_runs[name].gone is None:
                    self.flow_runs[name].gone = now
                    if self.flow_runs[name].state != "Scheduled":
                        self.log(f"  run {short(name)} is gone, was {self.flow_runs[name].state}")

    def _look_for_stuck(self, found: list[dict[str, Any]]) -> None:
        """A fault for each run that is Late, or active without a process, for STUCK s while the server answers."""
        homes = {flow_run_of(pid) for pid, _ in self.alive()}
        waits = {}
        for each in found:
            state = (each["state"] or {}).get("name")
            if state == "Late":
                waits[each["id"], "Late"] = time.time()
            elif state in ACTIVE and each["id"] not in homes:
                waits[each["id"], "active without a process"] = time.time()
        self._waits = {key: self._waits.get(key, now) for key, now in waits.items()}
        for (name, what), since in self._waits.items():
            if time.time() - since > STUCK:
                self._waits[name, what] = float("inf")
                self.fault(f"run {short(name)} is {what} for {STUCK:.0f} s: {self.flow_runs[name].states[-1][1:]}")


def short(flow_run: str) -> str:
    """The end of an id: its beginning is a time."""
    return flow_run[-6:]


def flow_run_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            if entry.startswith(FLOW_RUN.encode() + b"="):
                return entry.split(b"=", 1)[1].decode()
    return ""


def is_locked(path: Path) -> bool:
    """Whether a process holds a lock on the file."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def listening(pids: set[int]) -> set[int]:
    """TCP ports on which these processes listen."""
    inodes = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                inodes[fields[9]] = int(fields[1].rpartition(":")[2], 16)
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for handle in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    target = os.readlink(f"/proc/{pid}/fd/{handle}")
                    if target.startswith("socket:["):
                        found.add(inodes.get(target[8:-1], 0))
    return found - {0}
