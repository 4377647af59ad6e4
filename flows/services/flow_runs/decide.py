"""What to do with a flow run that a worker of this home took: a pure function of what is seen of it.

    state        process  worker   after      then
    Pending      none     gone     at once    given back (scheduled again)
    Pending      none     alive    2 min      given back: it did not begin in time
    Pending      alive    any      10 min     its process is stopped, then as above
    Running      none     gone     at once    crashed, then scheduled again
    Running      none     alive    60 s       the same: the worker, which reports a dead process itself, did not
    Running      alive    any                 left alone: a run outlives its worker
    Cancelling   alive    gone     at once    its process is stopped (with a worker alive: after 45 s)
    Cancelling   none     gone     at once    cancelled (with a worker alive: after 45 s)
    Cancelled    alive    any      60 s       its process is stopped
    Stopped      none              at once    scheduled again: `eclectus down` had stopped it
    Crashed      none     gone     at once    scheduled again (with a worker alive: after 60 s, if no automation did)
    deleted      alive             at once    its process is stopped

A run without a deployment (one of the command line) cannot be scheduled again and ends as crashed. A run that crashed
in each of `STARTS` starts fails.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

STARTS = 4
# Name of the state (its type is Crashed) of a run that `eclectus down` ended; no automation takes it for a crash.
STOPPED = "Stopped"
# Seconds. A worker that lives reports a dead process within 10 s; the automation for crashed runs acts after 30 s.
WORKER_REPORTS = 60.0
WORKER_CANCELS = 45.0
HUNG_START = 600.0

DELETED = "deleted in the Prefect UI"
CANCELLED = "cancelled in the Prefect UI"
LATE = "it did not begin in time"
CRASHED = "its process ended without a word: killed, out of memory, or its machine went down"


class Act(Enum):
    LEAVE = "leave"
    FORGET = "forget its note"
    AGAIN = "schedule it again"
    CRASH = "mark it as crashed, and schedule it again if it has a deployment"
    CANCEL = "mark it as cancelled"
    STOP = "stop its process"


@dataclass(frozen=True)
class Seen:
    """state: type of its state in capitals, empty if it was deleted. name: of the state. unchanged: for how many
    seconds all of this was seen, by a clock that nobody sets."""

    state: str
    name: str
    process: bool
    owner: bool
    deployment: bool
    unchanged: float


def decide(seen: Seen, start_within: float) -> tuple[Act, str]:
    """The act, and why. start_within: seconds after which a run without a process is given back."""
    if not seen.state:
        return (Act.STOP, DELETED) if seen.process else (Act.FORGET, "")
    if seen.state == "PENDING":
        return _pending(seen, start_within)
    if seen.state == "RUNNING":
        gone = not seen.process and (not seen.owner or seen.unchanged >= WORKER_REPORTS)
        return (Act.CRASH, CRASHED) if gone else (Act.LEAVE, "")
    if seen.state == "CANCELLING":
        if seen.owner and seen.unchanged < WORKER_CANCELS:
            return Act.LEAVE, ""
        return (Act.STOP if seen.process else Act.CANCEL), CANCELLED
    if seen.state == "CANCELLED" and seen.process:
        return (Act.STOP, CANCELLED) if seen.unchanged >= WORKER_REPORTS else (Act.LEAVE, "")
    if seen.process or seen.state == "PAUSED":
        return Act.LEAVE, ""
    if seen.state == "CRASHED":
        return _crashed(seen)
    if seen.state == "SCHEDULED":
        # Just before a worker takes a run there is a note of it; later it is another worker's turn.
        return (Act.LEAVE if seen.owner and seen.unchanged < WORKER_REPORTS else Act.FORGET), ""
    return Act.FORGET, ""


def _pending(seen: Seen, start_within: float) -> tuple[Act, str]:
    if seen.process:
        return (Act.STOP, LATE) if seen.unchanged >= HUNG_START else (Act.LEAVE, "")
    if not seen.owner:
        return Act.AGAIN, "its worker was gone before it began"
    return (Act.AGAIN, LATE) if seen.unchanged >= start_within else (Act.LEAVE, "")


def _crashed(seen: Seen) -> tuple[Act, str]:
    if not seen.deployment:
        return Act.FORGET, ""
    if seen.name == STOPPED:
        return Act.AGAIN, "stopped by `eclectus down`; resumes from its finished steps"
    if not seen.owner or seen.unchanged >= WORKER_REPORTS:
        return Act.AGAIN, "crashed; resumes from its finished steps"
    return Act.LEAVE, ""


def crashes(states: list[tuple[str, str]]) -> int:
    """In how many of its starts a run crashed, from (type, name) of its states, oldest first.

    A start that `eclectus down` ended does not count, nor does a run that was given back before it began.
    """
    count, running, counted = 0, False, False
    for kind, name in states:
        if kind == "RUNNING":
            running, counted = True, False
        elif kind == "CRASHED" and name == STOPPED:
            # The process may have said itself, just before, that it was terminated.
            count, running, counted = count - counted, False, False
        elif kind == "CRASHED" and running:
            count, running, counted = count + 1, False, True
        elif kind in ("SCHEDULED", "PENDING"):
            counted = False
    return count
