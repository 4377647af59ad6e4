"""The reckoning after a week: each scheduled run accounted for, nothing stuck, nothing left over."""

from __future__ import annotations

import datetime
import itertools
import os
import time
from pathlib import Path
from typing import Any

from tests.support.week import ACTIVE, Week, is_locked, listening, short
from tests.support.week_questions import Files, read_journals

ENDS = ("Completed", "Failed", "Crashed", "Cancelled")
STARTING = ("Scheduled", "Late", "Pending", "Submitting", "Running", "Cancelling", "AwaitingRetry", "Retrying")
DOWNS = ("down", "down and up", "two ups", "up", "services down")
KILLS = ("kill flow run", "kill worker", "kill server", "kill keeper", "kill Ray", "kill supervisor")
# What a state's message contains -> the events that may be behind it.
REASONS = {
    "concurrency limit reached": (),
    "no space left": ("fill disk",),
    "disk is full": ("fill disk",),
    "cannot be written": ("fill disk",),
    "cancel": ("cancel",),
    "delete": ("delete",),
    "": (*KILLS, *DOWNS, "freeze worker", "step clock", "fill disk"),
}
# An event explains what ends within this time after it.
REACH = 200.0
STUCK = 60.0


def parsed(moment: str) -> float:
    return datetime.datetime.fromisoformat(moment.replace("Z", "+00:00")).timestamp()


def account_for_runs(week: Week) -> list[str]:
    """Complaints about flow runs of the schedule."""
    complaints = []
    completed: dict[str, int] = {}
    for row in read_journals(week.home):
        if row.get("event") == "run_ended" and row.get("state") == "completed" and row.get("prefect_flow_run"):
            completed[row["prefect_flow_run"]] = completed.get(row["prefect_flow_run"], 0) + 1
    due = {name: seen for name, seen in week.flow_runs.items() if parsed(seen.due) <= week.now()}
    newest = max(due, key=lambda name: due[name].due, default=None)
    for name, seen in sorted(due.items(), key=lambda item: item[1].due):
        told = f"run {short(name)} due {seen.due[11:19]}"
        when, state, message = seen.states[-1]
        if seen.gone:
            # Prefect plans a future run again when its schedule changes, under another id.
            if name not in week.deleted and state != "Scheduled":
                complaints.append(f"{told} is gone though nobody deleted it; it was {state}: {message!r}")
        elif state == "Completed":
            if completed.get(name) != 1:
                complaints.append(f"{told} is Completed with {completed.get(name, 0)} completed runs in the journal")
        elif state in ENDS:
            if complaint := unexplained(week, name, when, message):
                complaints.append(f"{told} is {state}: {complaint}: {message!r}")
        elif name != newest and time.time() - when > STUCK:
            complaints.append(f"{told} has been {state} for {time.time() - when:.0f} s: {message!r}")
        elif state not in STARTING:
            complaints.append(f"{told} is {state}: {message!r}")
    return complaints + missing_minutes(week, due)


def unexplained(week: Week, name: str, when: float, message: str) -> str:
    """Why the message does not account for an end at `when`; empty if it does."""
    if not message:
        return "no reason is given"
    text = next(text for text in REASONS if text in message.lower())
    if text == "concurrency limit reached":
        return "" if held_by_another(week, name, when) else "no other run was active then"
    before = [each for each in week.did if each.started <= when <= each.ended + REACH and each.name in REASONS[text]]
    week.log(f"run {short(name)} ended with {message[:120]!r} after {[each.name for each in before]}")
    return "" if before else "no event of the week explains it"


def held_by_another(week: Week, name: str, when: float) -> bool:
    """Whether another run held the deployment's slot, at some time in the 15 s around `when`."""
    for other, seen in week.flow_runs.items():
        ends = [moment for moment, _, _ in seen.states[1:]] + [seen.gone or time.time()]
        for (began, state, _), ended in zip(seen.states, ends, strict=True):
            if other != name and state in ACTIVE and began - 15 <= when <= ended + 15:
                return True
    return False


def missing_minutes(week: Week, due: dict[str, Any]) -> list[str]:
    """Minutes of the schedule without a run, unless the clock was stepped over them or nothing was running then."""
    kept = [seen for seen in due.values() if seen.auto and not (seen.gone and seen.state == "Scheduled")]
    slots = sorted({round(parsed(seen.due)) for seen in kept})
    excuses = [each for each in week.did if each.name in ("services down", "step clock", "kill server", "fill disk")]
    return [
        f"no run was planned between {clock(a)} and {clock(b)}"
        for a, b in itertools.pairwise(slots)
        if b - a > 60 and not any(each.clock_started - 60 < b and each.clock_ended + 60 > a for each in excuses)
    ]


def clock(moment: float) -> str:
    return datetime.datetime.fromtimestamp(moment, datetime.UTC).strftime("%H:%M:%S")


def overlaps(week: Week) -> list[str]:
    """Moments at which more than one flow run of the deployment was worked at, two samples in a row."""
    found = []
    for (_, before), (when, held) in itertools.pairwise(week.at_work):
        both = set(before.values()) & set(held.values())
        if len(both) > 1:
            found.append(f"{when - week.started:.0f} s: {sorted(short(name) for name in both)}")
    said = f"{len(found)} times two runs of the deployment were worked at at once, first at"
    return [f"{said} {found[0]}"] if found else []


def open_runs(week: Week) -> list[str]:
    """Runs without an end in the journal although no process works at them."""
    files = Files(week.home)
    held = {path.name.split(".")[0] for path in (week.home / "journal" / "events").glob("2*.ndjson") if is_locked(path)}
    return [f"run {name} has no end" for name, run in files.runs.items() if not run["has end"] and name not in held]


def left_over(week: Week) -> list[str]:
    """Processes, ports, locks and folders that outlive `down`."""
    complaints = [f"process {pid} is left: {week.processes[pid, tick][:120]}" for pid, tick in week.alive()]
    everyone = listening({int(entry) for entry in os.listdir("/proc") if entry.isdigit()})
    if complaints:
        complaints += [f"port {port} is still held" for port in sorted(week.ports & everyone)]
    for path in week.home.rglob("*"):
        if path.is_file() and (path.suffix == ".lock" or path.parent.name == "events") and is_locked(path):
            complaints.append(f"{path.relative_to(week.home)} is locked")
    complaints += [f"{path} is left" for path in sorted(week.temporary.iterdir()) if not ignored(path)]
    complaints += [f"{path.relative_to(week.home)} is left" for path in week.home.rglob("*.opening")]
    return complaints


def ignored(path: Path) -> bool:
    """Folders that libraries keep for the next process on purpose."""
    return path.name.startswith(("matplotlib-", "torchinductor", ".cache", "numba"))
