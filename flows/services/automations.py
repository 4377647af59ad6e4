"""Automations that `eclectus deploy` creates on the Prefect server: they detect and reschedule crashed runs.

    zombie   a run whose heartbeats stop before it ends (its machine is lost, say) is marked as crashed
    crashed  a crashed run of a deployment is rescheduled after 30 s and resumes from its last checkpoint

`eclectus.flows.run` fails a run after `STARTS` starts; failed runs are not rescheduled.
"""

from __future__ import annotations

import datetime

from prefect.automations import AutomationCore, ChangeFlowRunState, EventTrigger, Posture
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType

# Twenty heartbeats of 30 s, so that a sleeping laptop or a busy server is not mistaken for a dead process.
SILENCE = datetime.timedelta(minutes=10)
# A worker reports a dead process twice, the second time after it has loaded the flow to look for hooks (2 to 8 s
# later). Rescheduling earlier would mark the new attempt as crashed and start the run twice.
SETTLING = datetime.timedelta(seconds=30)
BEGINS = ("Scheduled", "Late", "Pending", "Running", "Retrying")
ENDS = ("Completed", "Failed", "Crashed", "Cancelled", "Cancelling", "Paused", "Suspended", "AwaitingRetry")
RUNS = {"prefect.resource.id": "prefect.flow-run.*"}
OF_A_DEPLOYMENT = {"prefect.resource.role": "deployment", "prefect.resource.id": "prefect.deployment.*"}


def automations() -> list[AutomationCore]:
    return [
        AutomationCore(
            name="eclectus: zombie runs",
            description=f"Marks a run as crashed when it has sent no heartbeat for {SILENCE.seconds // 60} minutes.",
            trigger=EventTrigger(
                after={"prefect.flow-run.heartbeat"},
                expect={"prefect.flow-run.heartbeat", *(f"prefect.flow-run.{end}" for end in ENDS)},
                match=RUNS,
                for_each={"prefect.resource.id"},
                posture=Posture.Proactive,
                threshold=1,
                within=SILENCE,
            ),
            actions=[ChangeFlowRunState(state=StateType.CRASHED, message="no heartbeat: its process is gone")],
        ),
        AutomationCore(
            name="eclectus: crashed runs",
            description=f"Reschedules a crashed run of a deployment after {SETTLING.seconds} s; "
            "it resumes from its finished steps and last checkpoint.",
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
                    message="crashed; resumes from its finished steps",
                )
            ],
        ),
    ]


def create_automations() -> list[str]:
    """Creates the automations, or updates those of the same name; returns their names."""
    wanted = automations()
    with get_client(sync_client=True) as client:
        existing = {each.name: each.id for each in client.read_automations()}
        for automation in wanted:
            if automation.name in existing:
                client.update_automation(existing[automation.name], automation)
            else:
                client.create_automation(automation)
    return [automation.name for automation in wanted]
