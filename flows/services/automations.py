"""Automations that set-up creates on the Prefect server, so that runs whose processes die are seen and go on by themselves.

    zombie   a run whose heartbeats stop without an end (its machine is gone, say) is marked as crashed
    crashed  a crashed run of a deployment is scheduled again half a minute later, and goes on from its finished steps and last checkpoint

A run that crashes again and again is given up by `eclectus.flows.run` after `eclectus.flows.run.STARTS` starts: it fails, which nothing restarts.
"""

from __future__ import annotations

import datetime

from prefect.automations import AutomationCore, ChangeFlowRunState, EventTrigger, Posture
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType

# Twenty beats of 30 s: a sleeping laptop's or a busy server's gap is not taken for a death.
SILENCE = datetime.timedelta(minutes=10)
# A worker reports a dead process twice, the second time after it has loaded the flow to look for hooks (2 s, 8 s on a busy machine).
# A run that were scheduled in between would be taken for dead while it starts, and be started twice.
SETTLING = datetime.timedelta(seconds=30)
BEGINS = ("Scheduled", "Late", "Pending", "Running", "Retrying")
ENDS = ("Completed", "Failed", "Crashed", "Cancelled", "Cancelling", "Paused", "Suspended", "AwaitingRetry")
RUNS = {"prefect.resource.id": "prefect.flow-run.*"}
OF_A_DEPLOYMENT = {"prefect.resource.role": "deployment", "prefect.resource.id": "prefect.deployment.*"}


def automations() -> list[AutomationCore]:
    return [
        AutomationCore(
            name="eclectus: zombie runs",
            description=f"Marks a run as crashed when it has not been heard of for {SILENCE.seconds // 60} minutes.",
            trigger=EventTrigger(
                after={"prefect.flow-run.heartbeat"},
                expect={"prefect.flow-run.heartbeat", *(f"prefect.flow-run.{end}" for end in ENDS)},
                match=RUNS,
                for_each={"prefect.resource.id"},
                posture=Posture.Proactive,
                threshold=1,
                within=SILENCE,
            ),
            actions=[ChangeFlowRunState(state=StateType.CRASHED, message="not heard of any more: its process is gone")],
        ),
        AutomationCore(
            name="eclectus: crashed runs",
            description=f"Schedules a crashed run of a deployment again after {SETTLING.seconds} s; it goes on from its finished steps and last checkpoint.",
            trigger=EventTrigger(
                after={"prefect.flow-run.Crashed"},
                expect={f"prefect.flow-run.{state}" for state in (*BEGINS, *ENDS) if state != "Crashed"},
                match=RUNS,
                match_related=OF_A_DEPLOYMENT,
                for_each={"prefect.resource.id"},
                posture=Posture.Proactive,
                threshold=1,
                within=SETTLING,
            ),
            actions=[
                ChangeFlowRunState(
                    state=StateType.SCHEDULED,
                    name="AwaitingRetry",
                    message="crashed; it goes on from its finished steps",
                )
            ],
        ),
    ]


def create_automations() -> list[str]:
    """Creates the automations, or updates those of the same name; returns their names."""
    wanted = automations()
    with get_client(sync_client=True) as client:
        there = {each.name: each.id for each in client.read_automations()}
        for automation in wanted:
            if automation.name in there:
                client.update_automation(there[automation.name], automation)
            else:
                client.create_automation(automation)
    return [automation.name for automation in wanted]
