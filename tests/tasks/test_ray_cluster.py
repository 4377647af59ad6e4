"""Ray that is started for one machine cannot be reached from another."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

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
