"""When a service is started, after which pause it is started again, and what is ended with it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

import psutil
import pytest

from eclectus.flows.services.background import Background, start_of
from eclectus.flows.services.supervisor.service import (
    LONGEST_PAUSE,
    SETTLED_SECONDS,
    START_SECONDS,
    Service,
    end_session,
    pause,
)
from eclectus.storage.errors import EclectusError
from tests.support.processes import until


@pytest.fixture
def programs():
    """Starts sleeping programs; ends them all after the test."""
    started = []

    def start(name="the worker"):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
        started.append(child)
        return Background(name, child.pid, start_of(child.pid), "worker.log")

    start.started = started
    yield start
    for child in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def kill(programs):
    child = programs.started[-1]
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def service(programs, said, **further):
    return Service("the worker", programs, lambda: True, said.append, **further)


def test_a_pause_doubles_up_to_a_minute():
    assert [pause(failures) for failures in range(9)] == [0, 1, 2, 4, 8, 16, 32, LONGEST_PAUSE, LONGEST_PAUSE]


def test_a_dead_service_is_started_again_after_a_pause_that_grows_and_ends_when_it_has_settled(programs):
    said = []
    watched, now = service(programs, said), 0.0
    for failures in (1, 2, 3):
        watched.look(now, set())
        watched.look(now + 0.5, set())
        assert watched.ready and watched.process.is_alive()
        kill(programs)
        watched.look(now + 1, set())
        assert watched.failures == failures and watched.process is None and not watched.ready
        watched.look(now + 1 + pause(failures) - 0.1, set())
        assert watched.process is None, "not before its time"
        now += 1 + pause(failures)
    watched.look(now, set())
    watched.look(now + 1, set())
    watched.look(now + SETTLED_SECONDS + 1, set())
    assert watched.failures == 0 and watched.trouble == ""
    assert len(programs.started) == 4
    assert sum("has ended; its log is worker.log" in line for line in said) == 3


def test_a_service_waits_for_what_it_needs_and_a_call_ends_its_pause(programs):
    watched = service(programs, [], needs=("Ray",))
    watched.look(0.0, set())
    assert watched.process is None
    watched.look(1.0, {"Ray"})
    kill(programs)
    watched.look(2.0, {"Ray"})
    watched.at_once()
    watched.look(2.1, {"Ray"})
    assert watched.process is not None and len(programs.started) == 2


def test_a_service_that_cannot_be_started_is_trouble_that_is_told(programs):
    def refuse():
        raise EclectusError("no such program")

    said = []
    watched = Service("Ray", refuse, lambda: True, said.append)
    watched.look(0.0, set())
    watched.look(0.5, set())
    assert watched.failures == 1 and "Ray cannot be started: no such program" in watched.trouble
    watched.look(1.1, set())
    assert watched.failures == 2 and "failure 2 in a row" in said[-1]


def test_one_that_never_answers_and_one_that_hangs_are_ended(programs):
    said = []
    deaf = Service("Ray", programs, lambda: False, said.append)
    deaf.look(0.0, set())
    deaf.look(START_SECONDS, set())
    assert deaf.process is not None
    deaf.look(START_SECONDS + 1, set())
    assert deaf.process is None and "did not start" in deaf.trouble
    hung = service(programs, said, is_hung=lambda: True)
    hung.look(0.0, set())
    hung.look(1.0, set())
    hung.look(2.0, set())
    programs.started[-1].wait(10)
    assert "lives and does nothing" in said[-1]


def test_one_that_an_earlier_supervisor_started_is_taken_over(programs):
    watched = service(programs, [])
    watched.adopt(programs(), 0.0)
    watched.look(1.0, set())
    assert watched.ready and len(programs.started) == 1


def test_what_a_dead_service_left_in_its_session_ends_and_nothing_of_a_living_one(programs):
    script = "import subprocess, sys; print(subprocess.Popen(['sleep', '60']).pid, flush=True)"
    leader = subprocess.Popen([sys.executable, "-c", script], start_new_session=True, stdout=subprocess.PIPE)
    orphan = psutil.Process(int(leader.stdout.readline()))
    leader.stdout.close()
    leader.wait()
    living = programs()
    end_session(living.pid)
    end_session(leader.pid)
    psutil.wait_procs([orphan], 10)
    until(lambda: not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE, 10)
    assert living.is_alive()
