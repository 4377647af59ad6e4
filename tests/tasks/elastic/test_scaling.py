"""A group of training workers that loses a node, and gets it back: 4 workers, 2, 4; no instance is lost or repeated."""

import json
import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eclectus.models.training.instances import Instances
from eclectus.tasks.elastic.scaling import group_sizes
from tests.support.processes import run_group
from tests.support.tiny_training import write_instances
from tests.support.worker_jobs import ELASTIC, train_as_one

ROOT = Path(__file__).parents[3]
# A head without capacity and two nodes of two CPUs each, in a process of its own.
PROGRAM = """
import os, sys, threading, time
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from eclectus.tasks.training.workers import TrainWorkers
from eclectus.tasks.ray_cluster import ensure_ray
from tests.support.worker_jobs import steps_done, total, train_elastically
store, folder = 80 * 2**20, Path(sys.argv[1])
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": store})
nodes = [cluster.add_node(num_cpus=2, object_store_memory=store) for _ in range(2)]
os.environ["RAY_ADDRESS"] = cluster.address
seen = []

def reported(kind, values):
    if kind == "workers":
        seen.append(values["workers"])

def wait_for(condition):
    while not condition():
        assert thread.is_alive(), seen
        time.sleep(0.1)

ensure_ray()
with TrainWorkers(4, False, folder / "ray", least=1, resize_seconds=5) as group:
    # Ray starts nodes in the main thread only.
    arguments = {"folder": str(folder)}
    thread = threading.Thread(target=group.do, args=(train_elastically, arguments, reported), daemon=True)
    thread.start()
    wait_for(lambda: steps_done(folder) >= 6)
    cluster.remove_node(nodes[1], allow_graceful=False)
    wait_for(lambda: seen[-1:] == [2] and steps_done(folder) >= 12)
    for last in (False, False, True):
        try:
            cluster.add_node(num_cpus=2, object_store_memory=store)
            break
        except Exception:
            # Ray gives a node 30 s to start.
            if last:
                raise
    wait_for(lambda: seen[-1:] == [4])
    (folder / "hurry").touch()
    thread.join()
    print("=", seen)
    print("=", group.do(total, {"value": 1}, reported)[0])
ray.shutdown()
cluster.shutdown()
"""


def in_cluster(folder):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"PYTHONPATH": str(ROOT), "RAY_health_check_period_ms": "1000", "OMP_NUM_THREADS": "1"}
    # On a machine that does other things, too.
    environment |= {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "180"}
    # A short path, since sockets are in it; not where Ray tells the machine of its clusters.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as ray_folder:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(PROGRAM), str(folder)],
            env=environment | {"RAY_TMPDIR": ray_folder}, cwd=ROOT, capture_output=True, text=True, check=False,
            timeout=500,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [line.removeprefix("= ") for line in done.stdout.splitlines() if line.startswith("= ")]


def read_in(folder):
    """What each group of workers read, in the order of the groups: {step: instances of all ranks, in order}."""
    groups = {}
    for path in sorted(folder.glob("read-*.ndjson"), key=lambda path: path.stat().st_ctime_ns):
        for line in path.read_text().splitlines():
            each = json.loads(line)
            rows = groups.setdefault(each["group"], {}).setdefault(each["step"], {})
            rows.setdefault(each["rank"], []).extend(each["rows"])
    return {
        group: {step: [row for rank in sorted(ranks) for row in ranks[rank]] for step, ranks in steps.items()}
        for group, steps in groups.items()
    }


@pytest.mark.slow  # 2 minutes: a cluster of three nodes, and three groups of workers one after the other
@pytest.mark.timeout(600)
def test_a_group_goes_on_with_2_of_4_workers_without_a_node_and_with_4_when_it_is_back(tmp_path):
    data = Instances(write_instances(tmp_path / "instances"))
    workers, again = in_cluster(tmp_path)
    assert workers == "[4, 2, 4]" and float(again) == 4 * 1 + 0 + 1 + 2 + 3
    groups = sorted(read_in(tmp_path).values(), key=min)
    assert len(groups) == 3 and min(groups[0]) == 0
    # Exactly these instances in every step that a group did, whatever its size, in the order of one process.
    for steps in groups:
        first, last = min(steps), max(steps)
        assert sorted(steps) == list(range(first, last + 1))
        for step in range(first, last):
            assert steps[step] == data.rows_of_step(step, ELASTIC["batch"], 0).tolist()
    lost, smaller, grown = groups
    # After a loss it goes on at the last checkpoint; before it grows it writes one, so that no step is done twice.
    assert min(smaller) == max(lost) // ELASTIC["checkpoint_every"] * ELASTIC["checkpoint_every"]
    assert min(grown) == max(smaller) + 1 and max(grown) + 1 == ELASTIC["stop"]
    run_group(1, train_as_one, str(tmp_path))
    ended, expected = (load_file(tmp_path / f"{name}.safetensors") for name in ("end", "one"))
    assert all(torch.equal(ended[name], expected[name]) for name in expected), "the bits of one process, undisturbed"


@pytest.mark.parametrize(
    ("workers", "least", "sizes"),
    [(4, 0, [4]), (4, 1, [1, 2, 4]), (4, 2, [2, 4]), (4, 3, [4]), (8, 2, [2, 4, 8]), (6, 2, [2, 3, 6])],
)
def test_groups_have_sizes_that_share_every_batch(workers, least, sizes):
    assert group_sizes(workers, least) == sizes
