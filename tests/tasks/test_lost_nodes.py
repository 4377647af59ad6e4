"""Nodes of a Ray cluster that leave, or whose disk is full, in the middle of work over parts: it goes on elsewhere."""

import os
import subprocess
import sys
import tempfile
import textwrap
import uuid
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# A head without capacity and two nodes of one CPU each, in a process of its own. The rest of it is a test's.
PROGRAM = """
import os, sys, threading, time
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from eclectus.storage.home import Home
from eclectus.storage.journal import Journal
from eclectus.storage.step_keys import KnownKeys
from eclectus.tasks.over_parts import Part, key_of, over_parts
from eclectus.tasks.run import Run, activate
from tests.support.part_functions import square_on_full_disk, square_slowly
store = 80 * 2**20
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": store})
nodes = [cluster.add_node(num_cpus=1, object_store_memory=store) for _ in range(2)]
os.environ["RAY_ADDRESS"] = cluster.address

class Shown:
    def __init__(self): self.notices = []
    def step_progressed(self, *_): pass
    def linked(self, *_): pass
    def notified(self, name, text): self.notices.append((name, text))

shown = Shown()
home, calls = Home.open(sys.argv[1]), Path(sys.argv[2])

def work(function, parts):
    with Journal(home.journal, "run") as journal:
        with activate(Run("run", home, journal, KnownKeys(home.keys, home.store), [shown], "test")):
            return over_parts(function, parts, "squaring", workers=2)
"""


END = """
ray.shutdown()
cluster.shutdown()
"""


def in_cluster(home, calls, program):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    # A short path, since sockets are in it; not where Ray tells the machine of its clusters.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(PROGRAM) + textwrap.dedent(program) + END, str(home), str(calls)],
            env=environment | {"PYTHONPATH": str(ROOT), "RAY_health_check_period_ms": "1000", "RAY_TMPDIR": folder},
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    # Ray writes between what is printed.
    return [line.removeprefix("= ") for line in done.stdout.splitlines() if line.startswith("= ")]


@pytest.mark.slow  # 40 s: a cluster of three nodes is started, and a dead node noticed
def test_the_parts_of_a_node_that_leaves_run_elsewhere(tmp_path):
    calls = tmp_path / "calls"
    calls.mkdir()
    said = in_cluster(tmp_path / "home", calls, """
        given = {"calls": str(calls), "seconds": 0.5}
        parts = [Part(key_of("slowly", number), given | {"number": number}) for number in range(16)]
        def leave():
            while len(os.listdir(calls)) < 6:
                time.sleep(0.05)
            cluster.remove_node(nodes[1], allow_graceful=False)
        thread = threading.Thread(target=leave)
        thread.start()
        done = work(square_slowly, parts)
        thread.join()
        print("=", [each.about["square"] for each in done] == [number**2 for number in range(16)])
        print("=", len({each.about["node"] for each in done}))
        """)  # fmt: skip
    assert said == ["True", "2"]
    made = [name.split("-")[0] for name in os.listdir(calls)]
    assert set(made) == {str(number) for number in range(16)} and len(made) <= 18, "only what ran there runs again"


@pytest.mark.slow  # 40 s: a cluster of three nodes is started
def test_a_node_whose_disk_is_full_gets_no_more_parts_and_the_others_do_them(object_store, tmp_path, monkeypatch):
    monkeypatch.setenv("ECLECTUS_CACHE", str(tmp_path / "cache"))
    said = in_cluster(f"s3://models/{uuid.uuid4().hex}", tmp_path, """
        ray.init(address=cluster.address, namespace="eclectus", log_to_driver=False)
        ids = [node["NodeID"] for node in ray.nodes() if node["Resources"].get("CPU")]
        full = calls / "full"
        full.write_text(ids[0])
        parts = [Part(key_of("full", number), {"number": number, "full": full}, name=f"number {number}")
                 for number in range(6)]
        done = work(square_on_full_disk, parts)
        print("=", [each.about["square"] for each in done])
        print("=", sorted({name for name, text in shown.notices if "this machine gets no more parts" in text}))
        full.write_text(" ".join(ids))
        try:
            work(square_on_full_disk, [Part(key_of("full", 9), {"number": 9, "full": full}, name="number 9")])
        except Exception as error:
            print("=", type(error).__name__, error)
        """)  # fmt: skip
    squares, notices, error = said
    assert squares == "[0, 1, 4, 9, 16, 25]" and notices == "['full disk']"
    assert error.startswith("NoRoom no space left on device: ") and "GB free)" in error
