"""Settles the flow runs that died: acts on what `decide` says, and sets the slots of concurrency limits right.

The supervisor calls it every few seconds, and before it starts a worker; `eclectus down` calls `stop_runs`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from eclectus.flows.services.flow_runs.api import Api
from eclectus.flows.services.flow_runs.decide import STARTS, STOPPED, Act, Seen, crashes, decide
from eclectus.flows.services.flow_runs.notes import (
    Note,
    note_stop,
    processes,
    read_notes,
    remove_note,
    replace_note,
    signal_run,
)

# Seconds after which a run that a worker took, and that has no process, is given back.
START_WITHIN = float(os.environ.get("ECLECTUS_START_WITHIN") or 120)
# Seconds from SIGTERM to SIGKILL for a run's process.
TERM_SECONDS = 20.0
ACTIVE = ("PENDING", "RUNNING", "CANCELLING")
BY_DOWN = "stopped by `eclectus down`"
# The name of `up`'s worker, which Prefect keeps with the runs that it took; other workers have other names.
WORKER = "local"


class Settler:
    """Looks after the flow runs of one home.

    folder: the home's `prefect`. token: of its services. report: gets a sentence for each act.
    """

    def __init__(self, folder: Path, api: Api, token: str, report: Callable[[str], None]) -> None:
        self._folder, self._api, self._token, self._report = folder, api, token, report
        self._seen: dict[str, tuple[Any, float]] = {}
        self._stopping: dict[tuple[int, str], float] = {}
        self._leases: dict[str, str] = {}
        self._too_many: dict[str, int] = {}

    def settle(self) -> int:
        """One look at all noted runs; returns the number of acts. Raises OSError when the server does not answer."""
        notes = read_notes(self._folder)
        runs = {run["id"]: run for run in self._api.flow_runs(id={"any_": [*notes]})} if notes else {}
        living = processes(self._token)
        acts = 0
        for flow_run, note in notes.items():
            process = living.get(flow_run)
            if note.itself and note.owner_lives():
                process = note.owner, note.owner_started
            act, why = self._decide(note, runs.get(flow_run), process)
            if act is not Act.LEAVE:
                self._do(act, why, note, runs.get(flow_run), process)
                acts += act is not Act.FORGET
        for flow_run in self._seen.keys() - notes.keys():
            del self._seen[flow_run]
        return acts

    def adopt(self) -> None:
        """Notes the runs that the worker of an earlier version took, which wrote no notes; it is not running."""
        notes = read_notes(self._folder)
        for run in self._api.flow_runs(state={"type": {"any_": [*ACTIVE]}}):
            ours = (run.get("labels") or {}).get("prefect.worker.name") == WORKER
            if ours and run["id"] not in notes:
                replace_note(self._folder, Note(run["id"], 0, "unknown"))

    def free_slots(self) -> None:
        """Frees slots of deployments' concurrency limits that no run holds: their runs were deleted, or leases lost."""
        limits = self._api.request("POST", "/v2/concurrency_limits/filter", {"limit": 200}) or []
        taken = {each["name"]: each for each in limits if each["active_slots"] and _deployment(each["name"])}
        if not taken:
            self._too_many.clear()
            return
        active = self._api.flow_runs(state={"type": {"any_": [*ACTIVE]}})
        held = [run["deployment_id"] for run in active]
        self._release_leases({run["id"] for run in active})
        for name, limit in taken.items():
            count = held.count(_deployment(name))
            if limit["active_slots"] <= count:
                self._too_many.pop(name, None)
                continue
            # A worker may be about to take a run, so only what two looks saw is set right.
            self._too_many[name] = self._too_many.get(name, 0) + 1
            if self._too_many[name] > 2:
                self._api.request("PATCH", f"/v2/concurrency_limits/{limit['id']}", {"active_slots": count})
                self._report(f"freed {limit['active_slots'] - count} slot(s) of a concurrency limit that no run holds")

    def _release_leases(self, active: set[str]) -> None:
        """Ends the leases that runs left behind which are not active any more; the server keeps them as files."""
        for path in (self._folder / "concurrency_leases").glob("*-*.json"):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                holder = (json.loads(path.read_text()).get("metadata") or {}).get("holder") or {}
                stale = holder.get("type") == "flow_run" and holder.get("id") not in active
                # A lease is made just before its run becomes Pending.
                if stale and time.time() - path.stat().st_mtime > 30:
                    body = {"lease_id": path.stem}
                    self._api.request("POST", "/v2/concurrency_limits/decrement-with-lease", body)

    def _decide(self, note: Note, run: dict[str, Any] | None, process: tuple[int, str] | None) -> tuple[Act, str]:
        state = (run or {}).get("state") or {}
        owner = note.owner_lives()
        now, what = time.monotonic(), (state.get("id"), process, owner)
        before, since = self._seen.get(note.flow_run, (None, now))
        if before != what:
            since = now
        self._seen[note.flow_run] = what, since
        seen = Seen(
            state=str(state.get("type", "")),
            name=str(state.get("name", "")),
            process=process is not None,
            owner=owner,
            deployment=bool(run and run.get("deployment_id")),
            unchanged=now - since,
        )
        return decide(seen, START_WITHIN)

    def _do(self, act: Act, why: str, note: Note, run: dict[str, Any] | None, process: tuple[int, str] | None) -> None:
        name = f"flow run {(run or {}).get('name') or note.flow_run}"
        if act is Act.STOP and process:
            self._stop(note, why, process, name)
            return
        end_children(self._api, note.flow_run)
        if run and act is not Act.FORGET:
            self._report(f"{name}: {why}")
        if act is Act.CANCEL:
            self._api.set_state(note.flow_run, "CANCELLED", note.stop or why)
        elif act is Act.CRASH:
            self._api.set_state(note.flow_run, "CRASHED", why)
            if run and run.get("deployment_id"):
                self._again(note.flow_run, "crashed; resumes from its finished steps")
        elif act is Act.AGAIN:
            self._again(note.flow_run, why)
        remove_note(self._folder, note)

    def _again(self, flow_run: str, why: str) -> None:
        states = [(each["type"], each["name"]) for each in self._api.states(flow_run)]
        if crashes(states) >= STARTS:
            text = (
                f"this run crashed in each of its {STARTS} starts; read its logs and worker.log, then start a new run"
            )
            self._api.set_state(flow_run, "FAILED", text)
        else:
            self._api.set_state(flow_run, "SCHEDULED", why, "AwaitingRetry")

    def _stop(self, note: Note, why: str, process: tuple[int, str], name: str) -> None:
        if process not in self._stopping:
            self._report(f"{name}: stopping its process {process[0]}: {why}")
            note_stop(self._folder, note, why)
            self._stopping[process] = time.monotonic()
            signal_run(process)
        elif time.monotonic() - self._stopping[process] > TERM_SECONDS:
            signal_run(process, signal.SIGKILL)


def stop_runs(folder: Path, api: Api, token: str) -> Callable[[], None]:
    """Ends the processes of all runs that workers of this token started; what it returns marks the runs.

    To be called when the worker is gone too, which reports dead processes itself. Each run that was in progress is then
    `Stopped` (a kind of Crashed), and the next `up` schedules it again.
    """
    notes = read_notes(folder)
    living = processes(token)
    for flow_run, process in living.items():
        if flow_run in notes:
            note_stop(folder, notes[flow_run], BY_DOWN)
        signal_run(process)

    def mark() -> None:
        wait_for(list(living.values()))
        workers = {flow_run: note for flow_run, note in notes.items() if not note.owner_lives()}
        for run in api.flow_runs(id={"any_": [*workers]}) if workers else ():
            kind, name = run["state"]["type"], run["state"]["name"]
            if kind == "CANCELLING":
                api.set_state(run["id"], "CANCELLED", "cancelled in the Prefect UI")
            elif run.get("deployment_id") and (kind in ACTIVE or (kind == "CRASHED" and run["id"] in living)):
                api.set_state(run["id"], "CRASHED", BY_DOWN, STOPPED)
            elif kind == "RUNNING":
                api.set_state(run["id"], "CRASHED", BY_DOWN)
            end_children(api, run["id"])
            if name == "Completed" or kind in ("FAILED", "CANCELLED"):
                remove_note(folder, workers[run["id"]])

    return mark


def wait_for(started: list[tuple[int, str]], seconds: float = TERM_SECONDS) -> None:
    """Waits for these processes to end; kills those that have not after so many seconds."""
    found = []
    for pid, _ in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(psutil.Process(pid))
    psutil.wait_procs(found, seconds)
    for process in started:
        signal_run(process, signal.SIGKILL)


def end_children(api: Api, flow_run: str) -> None:
    """Marks what a dead run left in progress, its subflows and their steps, as crashed; Prefect leaves it Running."""
    active = {"type": {"any_": ["RUNNING", "PENDING"]}}
    for child in api.flow_runs(parent_flow_run_id={"any_": [flow_run]}, state=active):
        api.set_state(child["id"], "CRASHED", "the run that it is part of has ended")
        end_children(api, child["id"])
    steps = {"flow_runs": {"id": {"any_": [flow_run]}}, "task_runs": {"state": active}, "limit": 200}
    for step in api.request("POST", "/task_runs/filter", steps) or ():
        body = {"state": {"type": "CRASHED", "message": "its process is gone"}, "force": True}
        api.request("POST", f"/task_runs/{step['id']}/set_state", body)


def _deployment(limit: str) -> str | None:
    """The deployment of a limit, which Prefect names `deployment:ID`."""
    kind, _, deployment = limit.partition(":")
    return deployment if kind == "deployment" else None
