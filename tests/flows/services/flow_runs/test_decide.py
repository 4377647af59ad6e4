"""What becomes of a flow run, from what is seen of it: the table of flows/services/flow_runs/decide.py."""

from __future__ import annotations

import itertools

import pytest

from eclectus.flows.services.flow_runs.decide import HUNG_START, STARTS, Act, Seen, crashes, decide

WITHIN = 120.0
STATES = ("", "SCHEDULED", "PENDING", "RUNNING", "CANCELLING", "CANCELLED", "COMPLETED", "FAILED", "CRASHED", "PAUSED")


def act(state, process, owner, unchanged, name="", deployment=True):
    return decide(Seen(state, name or state.title(), process, owner, deployment, unchanged), WITHIN)[0]


@pytest.mark.parametrize(
    "state, process, owner, first, later",
    [
        ("PENDING", False, False, Act.AGAIN, Act.AGAIN),
        ("PENDING", False, True, Act.LEAVE, Act.AGAIN),
        ("PENDING", True, True, Act.LEAVE, Act.STOP),
        ("PENDING", True, False, Act.LEAVE, Act.STOP),
        ("RUNNING", False, False, Act.CRASH, Act.CRASH),
        ("RUNNING", False, True, Act.LEAVE, Act.CRASH),
        ("RUNNING", True, True, Act.LEAVE, Act.LEAVE),
        ("RUNNING", True, False, Act.LEAVE, Act.LEAVE),
        ("CANCELLING", True, False, Act.STOP, Act.STOP),
        ("CANCELLING", True, True, Act.LEAVE, Act.STOP),
        ("CANCELLING", False, False, Act.CANCEL, Act.CANCEL),
        ("CANCELLING", False, True, Act.LEAVE, Act.CANCEL),
        ("CANCELLED", True, True, Act.LEAVE, Act.STOP),
        ("CANCELLED", False, False, Act.FORGET, Act.FORGET),
        ("CRASHED", False, False, Act.AGAIN, Act.AGAIN),
        ("CRASHED", False, True, Act.LEAVE, Act.AGAIN),
        ("CRASHED", True, True, Act.LEAVE, Act.LEAVE),
        ("", True, True, Act.STOP, Act.STOP),
        ("", False, False, Act.FORGET, Act.FORGET),
        ("COMPLETED", True, True, Act.LEAVE, Act.LEAVE),
        ("COMPLETED", False, True, Act.FORGET, Act.FORGET),
        ("SCHEDULED", False, True, Act.LEAVE, Act.FORGET),
        ("SCHEDULED", False, False, Act.FORGET, Act.FORGET),
        ("PAUSED", False, False, Act.LEAVE, Act.LEAVE),
    ],
)
def test_the_table(state, process, owner, first, later):
    assert act(state, process, owner, 0.0) is first
    assert act(state, process, owner, HUNG_START + 1) is later


def test_what_down_stopped_begins_again_at_once_whoever_lives():
    for owner in (True, False):
        assert act("CRASHED", False, owner, 0.0, name="Stopped") is Act.AGAIN
    assert act("CRASHED", False, False, 0.0, deployment=False) is Act.FORGET, (
        "a run of the command line is not repeated"
    )


def test_whatever_is_seen_no_run_stays_in_progress_without_a_process_and_no_second_process_begins():
    seen = itertools.product(STATES, (True, False), (True, False), (True, False), (0.0, 59.0, 61.0, 1e6))
    for state, process, owner, deployment, unchanged in seen:
        done = act(state, process, owner, unchanged, deployment=deployment)
        if process:
            assert done in (Act.LEAVE, Act.STOP), (state, done)
        if state in ("PENDING", "RUNNING", "CANCELLING") and not process and unchanged > 1000:
            assert done in (Act.AGAIN, Act.CRASH, Act.CANCEL), state
        if state in ("COMPLETED", "FAILED"):
            assert done in (Act.LEAVE, Act.FORGET), "what has ended stays as it ended"
        if state in ("RUNNING", "PENDING") and process and unchanged < HUNG_START:
            assert done is Act.LEAVE, "a healthy run is not touched"


def states(text):
    kinds = {"R": "RUNNING", "P": "PENDING", "S": "SCHEDULED", "C": "CRASHED", "D": "CRASHED", "X": "COMPLETED"}
    return [(kinds[each], "Stopped" if each == "D" else kinds[each].title()) for each in text]


@pytest.mark.parametrize(
    "history, count",
    [
        ("SPR", 0), ("SPRC", 1), ("SPRCC", 1), ("SPRCSPRCSPRCSPR", 3), ("SPRD", 0), ("SPRCD", 0), ("SPRCSPRD", 1),
        ("SPSPSPR", 0), ("SPRDSPRDSPRDSPRDSPRDSPR", 0), ("SPRCSPD", 1), ("SPC", 0), ("SPRCSPRCSPRCSPRC", STARTS),
    ],
)  # fmt: skip
def test_crashes_are_counted_by_start_and_a_start_that_down_ended_is_none(history, count):
    """S scheduled, P pending, R running, C crashed, D stopped by down."""
    assert crashes(states(history)) == count
