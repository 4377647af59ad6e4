"""Automations that `eclectus deploy` creates on the Prefect server: they detect and reschedule crashed runs.

    zombie   a run whose heartbeats stop before it ends (its machine is lost, say) is marked as crashed
    crashed  a crashed run of a deployment is rescheduled after 30 s and resumes from its last checkpoint
    pending  a run that a worker took and never started (the worker's container ended, say) is given back

They are what a cluster has. What `eclectus up` started is looked after sooner, by flows/services/flow_runs/settle.py,
and these find nothing to do. `eclectus.flows.run` fails a run that crashed in each of `STARTS` starts; failed runs are
not rescheduled.

Prefect keeps what it waits for under the ids of triggers, and an update gives new ones, so it loses every run that is
being waited for. An automation that is equal on the server is therefore left alone.
"""

from __future__ import annotations

import datetime
from typing import Any

from prefect.automations import AutomationCore, ChangeFlowRunState, EventTrigger, Posture
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import StateType

from eclectus.flows.services.flow_runs.decide import STOPPED

# Twenty heartbeats of 30 s, so that a sleeping laptop or a busy server is not mistaken for a dead process.
SILENCE = datetime.timedelta(minutes=10)
# A worker reports a dead process twice, the second time after it has loaded the flow to look for hooks (2 to 8 s
# later). Rescheduling earlier would mark the new attempt as crashed and start the run twice.
SETTLING = datetime.timedelta(seconds=30)
# From the moment a worker takes a run until its flow begins; images and imports may take minutes.
STARTING = datetime.timedelta(minutes=15)
BEGINS = ("Scheduled", "Late", "Pending", "Running", "Retrying")
ENDS = ("Completed", "Failed", "Crashed", STOPPED, "Cancelled", "Cancelling", "Paused", "Suspended", "AwaitingRetry")
RUNS = {"prefect.resource.id": "prefect.flow-run.*"}
OF_A_DEPLOYMENT = {"prefect.resource.role": "deployment", "prefect.resource.id": "prefect.deployment.*"}
# What the server adds, or what an operator may choose on its page.
NOT_OURS = frozenset({"id", "created", "updated", "account", "workspace", "enabled", "owner_resource"})


def automations() -> list[AutomationCore]:
    return [
        AutomationCore(
            name="eclectus: zombie runs",
            description=f"Marks a run as crashed when it has sent no heartbeat for {SILENCE.seconds // 60} minutes.",
            trigger=_silence(
                "prefect.flow-run.heartbeat", {"prefect.flow-run.heartbeat", *_events(ENDS)}, SILENCE, None
            ),
            actions=[ChangeFlowRunState(state=StateType.CRASHED, message="no heartbeat: its process is gone")],
        ),
        AutomationCore(
            name="eclectus: crashed runs",
            description=f"Reschedules a crashed run of a deployment after {SETTLING.seconds} s; "
            "it resumes from its finished steps and last checkpoint.",
            trigger=_silence(
                "prefect.flow-run.Crashed",
                _events(state for state in (*BEGINS, *ENDS) if state != "Crashed"),
                SETTLING,
                OF_A_DEPLOYMENT,
            ),
            actions=[_again("crashed; resumes from its finished steps")],
        ),
        AutomationCore(
            name="eclectus: pending runs",
            description="Gives back a run of a deployment that a worker took and that has not begun within "
            f"{STARTING.seconds // 60} minutes; another worker takes it.",
            trigger=_silence(
                "prefect.flow-run.Pending",
                _events(state for state in (*BEGINS, *ENDS) if state != "Pending"),
                STARTING,
                OF_A_DEPLOYMENT,
            ),
            actions=[_again("it did not begin in time")],
        ),
    ]


def create_automations() -> list[str]:
    """Creates the automations, or updates those of the same name that differ; returns their names."""
    wanted = automations()
    with get_client(sync_client=True) as client:
        existing: dict[str, list[Any]] = {}
        for each in client.read_automations():
            existing.setdefault(each.name, []).append(each)
        for automation in wanted:
            _create_or_update(client, automation, existing.get(automation.name, []))
    return [automation.name for automation in wanted]


def comparable(automation: dict[str, Any]) -> Any:
    """What makes two automations (as JSON) equal: all but ids and what the server adds; sets in a fixed order."""
    return _plain({name: value for name, value in automation.items() if name not in NOT_OURS})


def _create_or_update(client: SyncPrefectClient, wanted: AutomationCore, existing: list[Any]) -> None:
    if not existing:
        client.create_automation(wanted)
        return
    first, *others = existing
    # Two that were created at the same time would reschedule every run twice.
    for each in others:
        client.delete_automation(each.id)
    if comparable(first.model_dump(mode="json")) == comparable(wanted.model_dump(mode="json")):
        return
    wanted.enabled = first.enabled
    client.update_automation(first.id, wanted)


def _silence(after: str, expect: set[str], within: datetime.timedelta, related: dict[str, str] | None) -> EventTrigger:
    """Fires for each run that had the event `after` and, for this long, none of those that are expected then."""
    return EventTrigger(
        after={after},
        expect=expect,
        match=RUNS,
        **({"match_related": related} if related else {}),
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=within,
    )


def _again(message: str) -> ChangeFlowRunState:
    return ChangeFlowRunState(state=StateType.SCHEDULED, name="AwaitingRetry", message=message)


def _events(states: Any) -> set[str]:
    return {f"prefect.flow-run.{state}" for state in states}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items() if name not in ("id", "created", "updated")}
    if isinstance(value, list | set | tuple):
        return sorted((_plain(each) for each in value), key=repr)
    return value
