"""A week of unattended operation in minutes: a schedule of one minute and kills, full disks, clock steps, up, down.

ECLECTUS_WEEK_MINUTES (default 4; 60 for the full hour) and ECLECTUS_WEEK_SEED (default 1) choose its length and what
happens when, ECLECTUS_WEEK_EVENTS ("fill disk,kill server") that only such events happen. The timeline is printed and
kept in timeline.txt in the test's folder (or in ECLECTUS_WEEK_FOLDER).
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.week import Did, Seen, Week, short
from tests.support.week_accounts import account_for_runs, left_over, open_runs, overlaps
from tests.support.week_clock import COMPILER, SteppedClock
from tests.support.week_events import EVENTS, Chaos, Questions, draw_plan
from tests.support.week_questions import QUESTIONS, wrong_answers

MINUTES = float(os.environ.get("ECLECTUS_WEEK_MINUTES", "4"))
SEED = int(os.environ.get("ECLECTUS_WEEK_SEED", "1"))
ONLY = [name for name in os.environ.get("ECLECTUS_WEEK_EVENTS", "").split(",") if name]
QUIET = 120.0
# A retraining of the last documents may take this long on a busy machine.
SETTLED = 600.0


def test_a_plan_is_the_same_for_a_seed_and_in_an_hour_everything_happens():
    plan = draw_plan(3, 60)
    assert plan == draw_plan(3, 60) != draw_plan(4, 60)
    assert {event.name for event in plan} == set(EVENTS)
    assert [event.at for event in plan] == sorted(event.at for event in plan) and 3500 < plan[-1].at <= 3600
    assert len(QUESTIONS) >= 22
    assert draw_plan(3, 4) == [event for event in plan if event.at <= 240]


@pytest.mark.skipif(not COMPILER, reason="the clock of other processes is stepped by a small C library: no compiler")
def test_a_stepped_clock_moves_the_time_of_a_running_process_and_not_what_it_waits_by(tmp_path):
    clock = SteppedClock(tmp_path)
    code = "import time\nfor _ in range(2): print(time.time(), time.monotonic(), flush=True); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | clock.environment, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    before = [float(each) for each in process.stdout.readline().split()]
    clock.step(-3600)
    process.stdin.write("\n\n")
    process.stdin.flush()
    after = [float(each) for each in process.stdout.readline().split()]
    process.communicate()
    assert -3600 <= after[0] - before[0] < -3500 and 0 <= after[1] - before[1] < 100


def reckoning(tmp_path, states, did=(), deleted=()):
    """Complaints about one flow run that was due two minutes ago, among others that are all well."""
    now = time.time()
    due = [datetime.datetime.fromtimestamp(now - 120 + 60 * n, datetime.UTC).isoformat() for n in range(2)]
    runs = {"watched": Seen(due[0], states=[(now - ago, *state) for ago, *state in states])}
    runs["next"] = Seen(due[1], states=[(now - 10, "Running", "")])
    week = SimpleNamespace(
        home=tmp_path, flow_runs=runs, deleted=set(deleted), now=lambda: now, log=lambda text: None,
        did=[Did(name, "", now - 90, now - 80, now - 90, now - 80) for name in did],
    )  # fmt: skip
    return account_for_runs(week)


def test_the_reckoning_notices_runs_that_nothing_accounts_for(tmp_path):
    check = functools.partial(reckoning, tmp_path)
    assert "has been Pending for 100 s" in check([(100, "Pending", "")])[0]
    assert "has been Late for 70 s" in check([(70, "Late", "")], did=["kill worker"])[0]
    assert "Completed with 0 completed runs in the journal" in check([(60, "Completed", "")])[0]
    assert "no reason is given" in check([(60, "Failed", "")], did=["fill disk"])[0]
    killed, full = (60, "Crashed", "status code: -9"), (60, "Failed", "no space left on device")
    assert "no event of the week explains it" in check([killed])[0]
    assert check([killed], did=["kill flow run"]) == []
    assert "no event of the week explains it" in check([full], did=["kill flow run"])[0]
    assert check([full], did=["fill disk"]) == []
    cancelled = (60, "Cancelled", "Deployment concurrency limit reached.")
    assert "no other run was active then" in check([cancelled])[0]
    (tmp_path / "journal" / "events").mkdir(parents=True)
    ended = {"event": "run_ended", "logged": "now", "run": "1", "state": "completed", "prefect_flow_run": "watched"}
    (tmp_path / "journal" / "events" / "20260101.ndjson").write_text(json.dumps(ended) + "\n")
    assert check([(60, "Completed", "")]) == []


# Slow: minutes of a real server, worker and Ray, killed and started again. Alone: it measures minutes on a clock.
@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(60 * (MINUTES + 40))
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found by their environment in /proc")
def test_a_week_of_kills_and_restarts_ends_with_every_run_accounted_for_and_nothing_left(tmp_path):
    folder = Path(os.environ.get("ECLECTUS_WEEK_FOLDER") or tmp_path)
    shutil.rmtree(folder, ignore_errors=True)
    week = Week(folder, SEED)
    try:
        complaints = live(week)
    finally:
        week.close()
    assert not complaints, "\n".join([*week.lines[-200:], f"seed {SEED}, {MINUTES:g} minutes:", *complaints])


def live(week):
    rng = random.Random(SEED)
    week.log(f"seed {SEED}, {MINUTES:g} minutes, home {week.home}, mark {week.mark}")
    week.write_documents(rng)
    code, text = week.ask("up")
    assert code == 0, text
    week.schedule_every_minute()
    week.watch()
    week.log("up; the schedule begins")
    chaos = Chaos(week)
    with Questions(week) as questions:
        chaos.happen(draw_plan(SEED, MINUTES, ONLY))
        week.write_documents(rng)
        last = time.time()
        week.log(f"quiet; {questions.asked} questions were asked")
        settled = settle(week, last)
    complaints = list(week.faults)
    if not settled:
        complaints.append(f"no run that began after the last documents has completed in {SETTLED:g} s")
    complaints += account_for_runs(week) + overlaps(week)
    complaints += stop_schedule(week) + everything_is_trained(week)
    code, text = week.ask("down")
    complaints += [] if code == 0 else [f"the last `down` ended with {code}: {text}"]
    time.sleep(5)
    complaints += left_over(week)
    code, text = week.ask("verify")
    complaints += [] if code == 0 else [f"`verify` ended with {code}: {text}"]
    complaints += open_runs(week) + wrong_answers(week.home, week.rows)
    week.log(f"end; {len(complaints)} complaints")
    for each in complaints:
        week.log(f"COMPLAINT {each}")
    return complaints


def everything_is_trained(week):
    code, text = week.ask("retrain", "--config", str(week.folder / "week.yaml"))
    return [] if code == 0 and "nothing is new" in text else [f"a retraining after the week ended with {code}: {text}"]


def settle(week, last):
    """Waits for the quiet time, and for a completed run that began after the last documents."""
    began = time.time()
    while time.time() - began < SETTLED:
        done = any(
            not seen.gone and seen.state == "Completed" and any(
                name == "Running" and when > last for when, name, _ in seen.states
            )
            for seen in list(week.flow_runs.values())
        )  # fmt: skip
        if done and time.time() - began > QUIET:
            week.log(f"settled after {time.time() - began:.0f} s")
            return True
        time.sleep(1)
    return False


def stop_schedule(week):
    """Pauses the schedule, waits for the run in progress; the slots of the deployment must be free then."""
    deployment = week.deployment()
    schedules = week.api(f"deployments/{deployment['id']}/schedules")
    if not any(each["schedule"].get("interval") == 60 for each in schedules):
        return [f"the user's schedule of one minute is gone; there are {schedules}"]
    for each in schedules:
        week.api(f"deployments/{deployment['id']}/schedules/{each['id']}", {"active": False}, "PATCH")
    end = time.time() + 240
    while time.time() < end:
        active = [
            f"{short(name)} {seen.state}"
            for name, seen in week.flow_runs.items()
            if not seen.gone and seen.state in ("Pending", "Running", "Cancelling", "Late", "AwaitingRetry")
        ]
        slots = week.limit()["active_slots"]
        if not active and not slots:
            return []
        time.sleep(1)
    return [f"4 minutes after the schedule was paused: active {active}, slots in use {slots}"]
