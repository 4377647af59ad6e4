"""`eclectus chaos`: a job that is killed again and again must end with the same bits as one that was left alone.

The job runs once undisturbed and once under a seeded plan of kills (-9), each of them in the middle of a step that the plan draws:

    worker   one of Ray Train's worker processes: Ray starts the group again, training goes on from its last checkpoint
    node     the raylet, with everything on it: the driver ends, or hangs and is ended
    server   the Prefect server of the run
    driver   the process of the run itself

Whenever the driver has ended unfinished, it is started again by the same command, as a schedule or an automation would. At the end
the digests of the last checkpoint are compared, and no process of any start may be left. Price: two jobs and a start a kill.
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

from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.storage.journal import EVENTS
from eclectus.storage.lineage.connection import query

# What each victim is found by, among the driver's descendants: a part of its command line.
VICTIMS = {"worker": "ray::RayTrainWorker", "node": "raylet/raylet", "server": "prefect server start", "driver": ""}
MOST_STARTS = 12
LONGEST_SILENCE = 240.0
LONGEST_DELAY = 1.0
# Ray's niceness leaves its agents little of a busy machine: 75 s were seen between the death of their raylet and theirs.
ORPHAN_SECONDS = 120.0


@dataclass(frozen=True)
class Kill:
    """Whom to kill, `delay` seconds after a training step of this label has begun."""

    victim: str
    label: str
    delay: float


@dataclass
class Outcome:
    """digest: of the last checkpoint. told: what was killed and when, in words. starts: of the driver. orphans: left processes."""

    digest: str
    told: list[str] = field(default_factory=list)
    starts: int = 1
    orphans: list[str] = field(default_factory=list)


def draw_plan(seed: int, kills: int, labels: list[str]) -> list[Kill]:
    """Seeded: every victim comes before any comes twice. labels: the training steps of the job, in their order."""
    rng = random.Random(seed)
    victims: list[str] = []
    while len(victims) < kills:
        victims += rng.sample(sorted(VICTIMS), len(VICTIMS))
    plan = [Kill(victim, rng.choice(labels), round(rng.uniform(0, LONGEST_DELAY), 2)) for victim in victims[:kills]]
    return sorted(plan, key=lambda kill: labels.index(kill.label))


def chaos(words: list[str], seed: int, kills: int, say: Callable[[str], None]) -> Outcome:
    """Runs `eclectus WORDS` undisturbed and disturbed, in two homes under the home. Raises EclectusError when they differ."""
    root = Home.open().root / "chaos" / time.strftime("%Y%m%d-%H%M%S")
    say(f"undisturbed: eclectus {' '.join(words)}")
    calm = run_disturbed(words, root / "undisturbed", [], say)
    labels = _training_labels(root / "undisturbed")
    plan = draw_plan(seed, kills, labels)
    say(f"seed {seed}: " + ", ".join(f"{kill.victim} {kill.delay:g} s into '{kill.label}'" for kill in plan))
    wild = run_disturbed(words, root / "disturbed", plan, say)
    if wild.digest != calm.digest:
        raise EclectusError(
            f"the disturbed run ended with checkpoint {wild.digest[:12]}, the undisturbed one with {calm.digest[:12]}; compare {root}"
        )
    if calm.orphans or wild.orphans:
        raise EclectusError(f"processes were left behind: {'; '.join(calm.orphans + wild.orphans)}")
    return wild


def run_disturbed(words: list[str], home: Path, plan: list[Kill], say: Callable[[str], None]) -> Outcome:
    """Starts the job, kills by the plan, and starts it again until it completes. Raises EclectusError if it never does."""
    outcome, left, family = Outcome(""), list(plan), {}
    while outcome.starts <= MOST_STARTS:
        log = home.parent / f"{home.name}-{outcome.starts}.log"
        ended = _one_start(words, home, log, left, outcome, family, say)
        if ended == 0 and not left:
            break
        if ended == 0:  # finished before its kills came: nothing is left to disturb
            outcome.told += [
                f"{kill.victim}: the job was over before '{kill.label}' could be disturbed" for kill in left
            ]
            break
        say(f"  the driver ended with {ended}; starting it again")
        outcome.starts += 1
    else:
        raise EclectusError(
            f"the job did not complete in {MOST_STARTS} starts; its logs are {home.parent}/{home.name}-*.log"
        )
    outcome.orphans = _orphans(family)
    outcome.digest = _last_checkpoint(home)
    return outcome


def _one_start(
    words: list[str], home: Path, log: Path, left: list[Kill], outcome: Outcome,
    family: dict[int, psutil.Process], say: Callable[[str], None],
) -> int:  # fmt: skip
    """One life of the driver; its exit code. Kills that were done are taken from `left`; `family` gets every process it had."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    with open(log, "wb") as handle:
        driver = subprocess.Popen(
            [sys.executable, "-m", "eclectus", "--home", str(home), *words],
            env=environment, stdin=subprocess.DEVNULL, stdout=handle, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    process, begun, heard, size = psutil.Process(driver.pid), {}, time.monotonic(), (0, 0)
    try:
        while driver.poll() is None:
            for each in _descendants(process):
                family[each.pid] = each
            now, grown = time.monotonic(), _journal_bytes(home)
            if grown != size:
                heard = now
                for label in _running(home) if grown[0] != size[0] else ():
                    begun.setdefault(label, now)
                size = grown
            if now - heard > LONGEST_SILENCE:
                say(f"  nothing happened for {LONGEST_SILENCE:g} s: the driver is ended")
                driver.kill()
            for kill in [kill for kill in left if kill.label in begun and now >= begun[kill.label] + kill.delay]:
                if _kill(kill, process):
                    outcome.told.append(f"killed {kill.victim} in '{kill.label}'")
                    say(f"  killed {kill.victim} in '{kill.label}'")
                    left.remove(kill)
                    break
            time.sleep(0.05)
    finally:
        if driver.poll() is None:
            driver.kill()
        driver.wait()
    return driver.returncode


def _kill(kill: Kill, driver: psutil.Process) -> bool:
    """Whether the victim was there to be killed."""
    mark = VICTIMS[kill.victim]
    with contextlib.suppress(psutil.Error):
        if not mark:
            driver.kill()
            return True
        for each in _descendants(driver):
            with contextlib.suppress(psutil.Error):
                if mark in " ".join(each.cmdline()):
                    each.kill()
                    return True
    return False


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return process.children(recursive=True)
    return []


def _orphans(family: dict[int, psutil.Process]) -> list[str]:
    """What is still there of all processes that the drivers had, after a while; ended here, so that chaos leaves nothing."""
    _, left = psutil.wait_procs(list(family.values()), timeout=ORPHAN_SECONDS)
    told = []
    for each in left:
        with contextlib.suppress(psutil.Error):
            told.append(f"{each.pid} {' '.join(each.cmdline())[:80]}")
            each.kill()
    return told


def _journal_bytes(home: Path) -> tuple[int, int]:
    """Of steps, and of all there is."""
    sizes = {path: path.stat().st_size for path in (home / "journal").rglob("*.ndjson")}
    return sum(size for path, size in sizes.items() if path.parent.name == EVENTS), sum(sizes.values())


def _running(home: Path) -> list[str]:
    """Labels of training steps that have begun and not ended."""
    rows = query(
        "select label from steps where state = 'unfinished' and name in ('pretrain', 'extend')", Home.open(home)
    )[1]
    return [label for (label,) in rows]


def _training_labels(home: Path) -> list[str]:
    rows = query("select label from steps where name in ('pretrain', 'extend') order by started", Home.open(home))[1]
    if not rows:
        raise EclectusError("the job trains nothing, so there is nothing to compare; choose a flow that trains")
    return list(dict.fromkeys(label for (label,) in rows))


def _last_checkpoint(home: Path) -> str:
    sql = "select artifact from step_outputs join steps using (step) where kind = 'checkpoint' order by ended desc limit 1"
    return query(sql, Home.open(home))[1][0][0]
