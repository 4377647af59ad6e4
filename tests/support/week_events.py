"""What happens to a home in its week: a seeded plan of kills, full disks, clock steps, `up`, `down`, users' acts.

Each event waits for what it needs (a run to be killed, say), so the plan gives the earliest moment of each; what was
done, to which process and when, is in the timeline.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from tests.support.week import Week, flow_run_of, short
from tests.support.week_questions import read_journals

GAP = 20.0  # seconds between two events, on average
WAIT_FOR_A_RUN = 75.0
# Parts of command lines: whom to kill, not whom to look for when all should be gone.
WORKER, SERVER, KEEPER = (
    r"prefect worker start|flow_runs[./]worker",
    r"prefect server start|guarded_server",
    r"services[./]keeper",
)
RAY = r"raylet/raylet|gcs_server"
ENGINE = r"python"
ORDINARY = ("documents", "documents", "kill flow run", "kill worker")


@dataclass(frozen=True)
class Event:
    """at: seconds after the beginning. luck: decides whatever the event leaves open."""

    at: float
    name: str
    luck: float


def draw_plan(seed: int, minutes: float, kinds: Collection[str] = ()) -> list[Event]:
    """No kind of event comes twice before all have come once; documents arrive in between. kinds: only these."""
    rng, at, names = random.Random(seed), 0.0, []
    plan = []
    while True:
        at += rng.uniform(0.4, 1.6) * GAP
        if at > minutes * 60:
            return plan
        if not names:
            names = list(kinds) or [*EVENTS, *ORDINARY]
            rng.shuffle(names)
        plan.append(Event(round(at, 1), names.pop(), round(rng.random(), 4)))


class Chaos:
    """is_up: whether the services should be running. down_since: when they were stopped, by both clocks."""

    def __init__(self, week: Week) -> None:
        self.week, self.is_up = week, True
        self.down_since: tuple[float, float] | None = None
        self.pending: list[tuple[subprocess.Popen[str], tuple[str, ...], float]] = []
        self.rng = random.Random(week.seed)

    def happen(self, plan: list[Event]) -> None:
        began = time.monotonic()
        for event in plan:
            while (left := began + event.at - time.monotonic()) > 0:
                time.sleep(min(left, 1))
            if not self.is_up and event.name not in ("down and up", "up", "two ups", "documents", "command line"):
                self.up(event.luck)
            started, clock_started = time.time(), self.week.now()
            self.week.log(f"* {event.name}")
            about = EVENTS[event.name](self, event.luck) or ""
            self.week.noted(event.name, about, started, clock_started)
            self.week.log(f"  {event.name}: {about}" if about else f"  {event.name}: done")
        if not self.is_up:
            self.up(0)
        for process, words, started in self.pending:
            self.finish_command(process, words, started)

    # Services.

    def up(self, luck: float) -> str:
        started, was = time.monotonic(), self.is_up
        code, text = self.week.ask("up")
        self.is_up_again()
        if code:
            self.week.fault(f"`up` ended with {code}: {text[-600:]}")
        return f"{'again' if was else 'after a down'}, {time.monotonic() - started:.0f} s"

    def is_up_again(self) -> None:
        if self.down_since:
            self.week.noted("services down", "", *self.down_since)
        self.is_up, self.down_since = True, None

    def two_ups(self, luck: float) -> str:
        processes = [self.week.start("up") for _ in range(2)]
        answers = [self.week.finish(each, ("up",)) for each in processes]
        self.is_up_again()
        for code, text in answers:
            if code:
                self.week.fault(f"one of two `up` ended with {code}: {text[-600:]}")
        addresses = {tuple(re.findall(r"http://127\.0\.0\.1:\d+", text)[:1]) for _, text in answers}
        if len(addresses) > 1:
            self.week.fault(f"two `up` at once printed two addresses: {addresses}")
        return f"at once: {addresses}"

    def down(self, luck: float) -> str:
        self.down_since = self.down_since or (time.time(), self.week.now())
        code, text = self.week.ask("down")
        self.is_up = False
        if code:
            self.week.fault(f"`down` ended with {code}: {text[-600:]}")
        # Ray's daemons may take a moment.
        left = self._left(20)
        if left:
            self.week.fault(f"20 s after `down` there were still: {left}")
        return text.strip().replace("\n", "; ")[:200]

    def _left(self, patience: float) -> list[str]:
        end = time.monotonic() + patience
        while True:
            ours = {process.pid for process, _, _ in self.pending}
            left = [
                f"{pid} {self.week.processes[pid, tick][:90]}"
                for pid, tick in self.week.alive()
                if pid not in ours and not descends(pid, ours)
            ]
            if not left or time.monotonic() > end:
                return left
            time.sleep(0.5)

    def down_and_up(self, luck: float) -> str:
        return f"{self.down(luck)}; {self.up(luck)}"

    # Kills.

    def kill(self, pattern: str, luck: float, number: int = signal.SIGKILL) -> str:
        victims = self.week.victims(pattern)
        if not victims:
            return "nobody to kill"
        victim = victims[int(luck * len(victims))]
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, number)
        return f"{victim}, {len(victims)} match: {self._line(victim)}"

    def _line(self, pid: int) -> str:
        return next((line for (each, _), line in self.week.processes.items() if each == pid), "")[-80:]

    def kill_supervisor(self, luck: float) -> str:
        supervisor = (self.week.notes() or {}).get("supervisor")
        if not supervisor:
            return "no supervisor is noted"
        with contextlib.suppress(ProcessLookupError):
            os.kill(supervisor["pid"], signal.SIGKILL)
        return str(supervisor["pid"])

    def kill_flow_run(self, luck: float) -> str:
        """At a random moment of its life."""
        found = self.wait_for(lambda: self.week.victims(ENGINE, flow_run=True))
        if not found:
            return "no flow run came"
        time.sleep(luck * 15)
        alive = self.week.victims(ENGINE, flow_run=True)
        if not alive:
            return "the flow run had ended"
        # The leader: whose parent is no process of the same run.
        victim = min(alive)
        flow_run = flow_run_of(victim)
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
        return f"{short(flow_run)}, process {victim}"

    def wait_for(self, find: Callable[[], object]) -> object:
        end = time.monotonic() + WAIT_FOR_A_RUN
        while not (found := find()) and time.monotonic() < end:
            time.sleep(0.3)
        return found

    def freeze_worker(self, luck: float) -> str:
        victims = self.week.victims(WORKER)
        for victim in victims:
            os.kill(victim, signal.SIGSTOP)
        time.sleep(20)
        for victim in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGCONT)
        return f"{victims} for 20 s"

    # The machine.

    def fill_disk(self, luck: float) -> str:
        if not self.week.mounted:
            return "skipped: no file system of our own could be mounted"
        filling = self.week.disk / "filling"
        taken = 0
        with open(filling, "wb", buffering=0) as handle:
            end = time.monotonic() + 8 + 12 * luck
            while time.monotonic() < end:
                with contextlib.suppress(OSError):
                    taken += handle.write(b"\0" * (1 << 16))
                    continue
                with contextlib.suppress(OSError):
                    taken += handle.write(b"\0" * 512)
                time.sleep(0.05)
        filling.unlink()
        return f"with {taken >> 20} MB, for {8 + 12 * luck:.0f} s"

    def step_clock(self, luck: float) -> str:
        if not self.week.clock:
            return "skipped: no C compiler"
        steps = (-90, -30, 45, 120, 240)
        step = steps[int(luck * len(steps))]
        self.week.clock.step(step)
        return f"{step:+d} s, now {self.week.clock.offset:+d} s"

    # Users.

    def documents(self, luck: float) -> str:
        self.week.write_documents(self.rng)
        return f"day {self.week.documents}"

    def cancel(self, luck: float) -> str:
        return self._on_a_run("cancel")

    def delete(self, luck: float) -> str:
        return self._on_a_run("delete")

    def _on_a_run(self, act: str) -> str:
        started = time.time()

        def active() -> list[str]:
            return [
                name
                for name, seen in list(self.week.flow_runs.items())
                if not seen.gone and seen.state in ("Running", "Pending")
            ]

        chosen = self.wait_for(active)
        if not chosen:
            return "no run was active"
        name = str(chosen[-1])
        try:
            if act == "cancel":
                state = {"type": "CANCELLING", "name": "Cancelling"}
                self.week.api(f"flow_runs/{name}/set_state", {"state": state, "force": False})
            else:
                self.week.deleted.add(name)
                self.week.api(f"flow_runs/{name}", method="DELETE")
        except OSError as error:
            return f"{short(name)}: the API answered {error}"
        threading.Thread(target=self._ends_in_a_minute, args=(act, name, started), daemon=True).start()
        return f"{short(name)}"

    def _ends_in_a_minute(self, act: str, name: str, started: float) -> None:
        """Issue: a run that is cancelled or deleted in the UI ends within a minute."""
        end = time.monotonic() + 60
        while time.monotonic() < end:
            if not any(flow_run_of(pid) == name for pid, _ in self.week.alive()):
                return
            time.sleep(1)
        left = [pid for pid, _ in self.week.alive() if flow_run_of(pid) == name]
        if left:
            self.week.fault(f"60 s after the {act} of run {short(name)} its processes {left} were alive")

    def command_line(self, luck: float) -> str:
        """A second run in the same home, from a terminal, while all else goes on."""
        words = ("retrain", "--config", str(self.week.folder / "week.yaml"))
        self.pending.append((self.week.start(*words), words, time.time()))
        return "began"

    def finish_command(self, process: subprocess.Popen[str], words: tuple[str, ...], started: float) -> None:
        code, text = self.week.finish(process, words)
        excused = [each for each in self.week.did if each.name == "fill disk" and each.ended > started]
        self.week.log(f"`eclectus {words[0]}` ended with {code}: {text.strip()[-160:]!r}")
        if code and not (excused and "no space" in text.lower()):
            self.week.fault(f"`eclectus {words[0]}` in the same home ended with {code}: {text[-900:]}")


EVENTS: dict[str, Callable[[Chaos, float], str | None]] = {
    "documents": Chaos.documents,
    "kill flow run": Chaos.kill_flow_run,
    "kill worker": lambda chaos, luck: chaos.kill(WORKER, luck),
    "kill server": lambda chaos, luck: chaos.kill(SERVER, luck),
    "kill keeper": lambda chaos, luck: chaos.kill(KEEPER, luck),
    "kill Ray": lambda chaos, luck: chaos.kill(RAY, luck),
    "kill supervisor": Chaos.kill_supervisor,
    "freeze worker": Chaos.freeze_worker,
    "fill disk": Chaos.fill_disk,
    "step clock": Chaos.step_clock,
    "up": Chaos.up,
    "two ups": Chaos.two_ups,
    "down": Chaos.down,
    "down and up": Chaos.down_and_up,
    "cancel": Chaos.cancel,
    "delete": Chaos.delete,
    "command line": Chaos.command_line,
}


def descends(pid: int, ancestors: set[int]) -> bool:
    while pid > 1:
        if pid in ancestors:
            return True
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError, ValueError):
            return False
    return False


class Questions:
    """A user who asks all the while; every answer must be right, or say in a line why there is none."""

    COMMANDS = (("runs",), ("gc",), ("champions",), ("plan", "retrain"), ("verify",))

    def __init__(self, week: Week) -> None:
        self.week, self.stopping, self.asked = week, threading.Event(), 0
        self.rng = random.Random(week.seed + 1)
        self.thread = threading.Thread(target=self._ask, daemon=True)

    def __enter__(self) -> Questions:
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stopping.set()
        self.thread.join(120)

    def _ask(self) -> None:
        while not self.stopping.wait(12):
            try:
                self.count_runs() if self.rng.random() < 0.5 else self.other()
            except Exception as error:
                self.week.fault(f"a question: {type(error).__name__}: {error}")
            self.asked += 1

    def _started(self) -> int:
        # Compaction folds the beginning into the end.
        begun = ("run_started", "run_ended")
        return len({row["run"] for row in read_journals(self.week.home) if row["event"] in begun})

    def count_runs(self) -> None:
        before = self._started()
        code, text = self.week.ask("sql", "--json", "select count(*) as n from runs")
        found = re.search(r'"n": *(\d+)', text)
        if code or not found:
            self.no_answer("sql", code, text)
        elif not before <= int(found[1]) <= self._started():
            self.week.fault(f"sql counted {found[1]} runs, there were {before} to {self._started()}")

    def other(self) -> None:
        words = self.rng.choice(self.COMMANDS)
        more = ("--config", str(self.week.folder / "week.yaml")) if words[0] == "plan" else ()
        code, text = self.week.ask(*words, *more)
        if code and not (words[0] == "plan" and code == 3):
            self.no_answer(" ".join(words), code, text)

    def no_answer(self, what: str, code: int, text: str) -> None:
        """Only while the disk is full, and in a line or two."""
        full = any(each.name == "fill disk" and each.ended > time.time() - 60 for each in self.week.did)
        full = full or (self.week.disk / "filling").exists()
        lines = [line for line in text.splitlines() if line.strip()]
        if "invalid choice" in text:
            return
        if not full or len(lines) > 3:
            self.week.fault(f"`eclectus {what}` ended with {code}: {text[-600:]}")
        else:
            self.week.log(f"(`{what}` during a full disk: {lines[-1:]})")
