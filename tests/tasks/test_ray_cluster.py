"""Ray that is started for one machine cannot be reached from another, and a slow start is tried again."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import ray

from eclectus.storage.errors import EclectusError
from eclectus.tasks import ray_cluster

# In a process of its own, since Ray is started once in a process.
PROGRAM = """
import contextlib, json, psutil
from eclectus.tasks.ray_cluster import ensure_ray
ensure_ray()
import ray
assert ray.get(ray.remote(lambda: 7).remote()) == 7
found = []
for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
    # Ray's short-lived helpers end meanwhile.
    with contextlib.suppress(psutil.NoSuchProcess):
        for each in process.net_connections("inet"):
            if each.status == psutil.CONN_LISTEN:
                found.append((process.name(), each.laddr.ip))
print(json.dumps(found))
"""


@pytest.mark.slow  # 8 s: Ray is started
def test_ray_of_a_run_listens_on_loopback_only():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert {name for name, _ in found} >= {"gcs_server", "raylet"}
    assert {address.removeprefix("::ffff:") for _, address in found} <= {"127.0.0.1", "::1"}, found


@pytest.fixture
def starts(monkeypatch):
    """Stands in for Ray: as many starts fail as are put into `errors`; returns that list and what was tried."""
    errors, tried = [], []

    def init(**settings):
        tried.append(settings)
        if errors:
            raise errors.pop()

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    return errors, tried


# Ray's node.py says so.
SLOW = Exception("The current node timed out during startup. This could happen because some of the raylet")


def test_a_start_that_ray_gives_up_is_tried_again(starts):
    errors, tried = starts
    errors += [SLOW, SLOW]
    ray_cluster.ensure_ray()
    assert len(tried) == 3 and tried[0] == tried[2]


def test_a_machine_that_is_too_busy_for_ray_is_named(starts):
    errors, tried = starts
    errors += [SLOW] * 3
    with pytest.raises(EclectusError, match="Ray did not start within 30 s, 3 times: this machine is too busy"):
        ray_cluster.ensure_ray()
    assert len(tried) == 3


def test_another_fault_of_a_start_is_not_tried_again(starts):
    errors, tried = starts
    errors.append(ValueError("no such setting"))
    with pytest.raises(ValueError, match="no such setting"):
        ray_cluster.ensure_ray()
    assert len(tried) == 1
