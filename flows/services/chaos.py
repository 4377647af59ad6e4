"""`eclectus chaos`: a job whose processes are killed must end with the same bits as an undisturbed one.

The job runs once undisturbed (the baseline) and once under a seeded plan of kills (SIGKILL) in the midst of trainings:

    worker   one of Ray Train's worker processes: Ray restarts the group, training resumes from its last checkpoint
    node     the raylet and everything on it: the driver ends, or hangs and is killed
    server   the Prefect server of the home
    driver   the process of the run itself

A driver that ends before the job is complete is restarted with the same command, as a schedule or an automation would.
At the end the digests of the last checkpoints are compared, and no process of any start may be left running. Cost: two
jobs and one start per kill.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from eclectus.flows.services.server_note import read_note
from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.storage.lineage.connection import query

# Part of the command line by which a victim is found among the driver's descendants; the server's note names it.
VICTIMS = {"worker": "ray::RayTrainWorker", "node": "raylet/raylet", "server": "", "driver": ""}
MOST_STARTS = 12
LONGEST_SILENCE = 240.0  # seconds without a journal entry after which the driver counts as hung
LONGEST_DELAY = 1.0
# Ray runs its agents at low priority: on a busy machine they ended up to 75 s after their raylet.
ORPHAN_SECONDS = 120.0


@dataclass(frozen=True)
class Kill:
    """What to kill, `delay` seconds after the training step with this label has logged its second loss in this start:
    what came before it is in a checkpoint."""

    victim: str
    label: str
    delay: float


@dataclass
class Outcome:
    """digest: of the last checkpoint. kills: descriptions. starts: of the driver. orphans: processes left running."""

    digest: str
    kills: list[str] = field(default_factory=list)
    starts: int = 1
    orphans: list[str] = field(default_factory=list)


def draw_plan(seed: int, kills: int, labels: list[str]) -> list[Kill]:
    """A seeded plan; no victim comes twice before all have come once. labels: training steps of the job, in order."""
    rng = random.Random(seed)
    victims: list[str] = []
    while len(victims) < kills:
        victims += rng.sample(sorted(VICTIMS), len(VICTIMS))
    plan = [Kill(victim, rng.choice(labels), round(rng.uniform(0, LONGEST_DELAY), 2)) for victim in victims[:kills]]
    return sorted(plan, key=lambda kill: labels.index(kill.label))


def chaos(words: list[str], seed: int, kills: int, report: Callable[[str], None]) -> Outcome:
    """Runs `eclectus WORDS` undisturbed and disturbed, in two homes. Raises EclectusError if they differ."""
    root = Home.open().root / "chaos" / time.strftime("%Y%m%d-%H%M%S")
    report(f"undisturbed: eclectus {' '.join(words)}")
    baseline = run_disturbed(words, root / "undisturbed", [], report)
    labels = _training_labels(root / "undisturbed")
    plan = draw_plan(seed, kills, labels)
    report(f"seed {seed}: " + ", ".join(f"{kill.victim} {kill.delay:g} s into '{kill.label}'" for kill in plan))
    disturbed = run_disturbed(words, root / "disturbed", plan, report)
    if disturbed.digest != baseline.digest:
        raise EclectusError(
            f"the disturbed run ended with checkpoint {disturbed.digest[:12]}, the undisturbed one with "
            f"{baseline.digest[:12]}; compare {root}"
        )
    if baseline.orphans or disturbed.orphans:
        raise EclectusError(f"processes were left running: {'; '.join(baseline.orphans + disturbed.orphans)}")
    return disturbed


def run_disturbed(words: list[str], home: Path, plan: list[Kill], report: Callable[[str], None]) -> Outcome:
    """Runs the job, kills by the plan and restarts it until it completes. Raises EclectusError after MOST_STARTS."""
    outcome, left = Outcome(""), list(plan)
    processes: dict[int, psutil.Process] = {}
    while outcome.starts <= MOST_STARTS:
        log = home.parent / f"{home.name}-{outcome.starts}.log"
        ended = _one_start(words, home, log, left, outcome, processes, report)
        # A driver may still be killed, or lose its node, on its way out of a job that is complete.
        if ended == 0 or _is_complete(home):
            outcome.kills += [f"{kill.victim}: the job ended before '{kill.label}' could be disturbed" for kill in left]
            break
        report(f"  the driver exited with {ended}; restarting it")
        outcome.starts += 1
    else:
        raise EclectusError(
            f"the job did not complete in {MOST_STARTS} starts; its logs are {home.parent}/{home.name}-*.log"
        )
    outcome.orphans = _orphans(processes)
    outcome.digest = _last_checkpoint(home)
    return outcome


def _one_start(
    words: list[str], home: Path, log: Path, left: list[Kill], outcome: Outcome,
    processes: dict[int, psutil.Process], report: Callable[[str], None],
) -> int:  # fmt: skip
    """Runs the driver once and returns its exit code.

    left: kills to do; those done are removed. processes: gets every descendant of the driver, by id.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    with open(log, "wb") as handle:
        driver = subprocess.Popen(
            [sys.executable, "-m", "eclectus", "--home", str(home), *words],
            env=environment, stdin=subprocess.DEVNULL, stdout=handle, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    process, heard, size = psutil.Process(driver.pid), time.monotonic(), 0
    begun: dict[str, float] = {}
    of_killed = set(_in_training(home))
    try:
        while driver.poll() is None:
            for each in _descendants(process):
                processes[each.pid] = each
            now, grown = time.monotonic(), _journal_bytes(home)
            if grown != size:
                heard, size = now, grown
                # Whoever is killed after the training ended disturbs nothing: the driver may be done, all but its exit.
                unfinished = _in_training(home) if left else {}
                begun = {label: begun.get(label, now) for step, label in unfinished.items() if step not in of_killed}
            if now - heard > LONGEST_SILENCE:
                report(f"  nothing was journaled for {LONGEST_SILENCE:g} s: killing the driver")
                driver.kill()
            for kill in [kill for kill in left if kill.label in begun and now >= begun[kill.label] + kill.delay]:
                if _kill(kill, process, home):
                    outcome.kills.append(f"killed {kill.victim} in '{kill.label}'")
                    report(f"  killed {kill.victim} in '{kill.label}'")
                    left.remove(kill)
                    break
            time.sleep(0.05)
    finally:
        if driver.poll() is None:
            driver.kill()
        driver.wait()
    return driver.returncode


def _kill(kill: Kill, driver: psutil.Process, home: Path) -> bool:
    """Kills the victim; returns whether it was running."""
    mark = VICTIMS[kill.victim]
    with contextlib.suppress(psutil.Error):
        if kill.victim == "server":
            # Not always a descendant of this driver: a killed one may have started it.
            noted = read_note(home / "prefect")
            if noted is None or not noted.server.is_alive():
                return False
            psutil.Process(noted.server.pid).kill()
            return True
        if kill.victim == "driver":
            driver.kill()
            return True
        for each in _descendants(driver):
            with contextlib.suppress(psutil.Error):
                if mark in " ".join(each.cmdline()):
                    # A node takes its workers with it: without this they would train on until Ray misses the raylet.
                    on_it = _descendants(each) if kill.victim == "node" else []
                    each.kill()
                    _kill_all(on_it)
                    return True
    return False


def _kill_all(processes: list[psutil.Process]) -> None:
    for each in processes:
        with contextlib.suppress(psutil.Error):
            each.kill()


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return process.children(recursive=True)
    return []


def _orphans(processes: dict[int, psutil.Process]) -> list[str]:
    """Descriptions of the processes that still run after ORPHAN_SECONDS; they are killed here."""
    _, left = psutil.wait_procs(list(processes.values()), timeout=ORPHAN_SECONDS)
    found = []
    for each in left:
        with contextlib.suppress(psutil.Error):
            found.append(f"{each.pid} {' '.join(each.cmdline())[:80]}")
            each.kill()
    return found


def _journal_bytes(home: Path) -> int:
    return sum(path.stat().st_size for path in (home / "journal").rglob("*.ndjson"))


def _in_training(home: Path) -> dict[str, str]:
    """Step -> label of the trainings that have not ended and have logged two losses."""
    rows = query(
        "select step, label from steps join metrics using (step) where state = 'unfinished' and metrics.name = 'loss'"
        " group by all having count(distinct at_step) > 1",
        Home.open(home),
    )[1]
    return dict(rows)


def _is_complete(home: Path) -> bool:
    return bool(query("select run from runs where state = 'completed'", Home.open(home))[1])


def _training_labels(home: Path) -> list[str]:
    rows = query("select label from steps where name in ('pretrain', 'extend') order by started", Home.open(home))[1]
    if not rows:
        raise EclectusError("the job trains nothing, so there is nothing to compare; choose a flow that trains")
    return list(dict.fromkeys(label for (label,) in rows))


def _last_checkpoint(home: Path) -> str:
    checkpoints = "select artifact from step_outputs join steps using (step) where kind = 'checkpoint'"
    sql = f"{checkpoints} order by ended desc limit 1"
    return query(sql, Home.open(home))[1][0][0]
