"""What all tests share: time limits by speed, the session's folder, a home of their own, and a run in it."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from eclectus.storage.artifact import ArtifactStore
from eclectus.storage.home import Home
from eclectus.storage.journal import Journal
from eclectus.storage.step_keys import KnownKeys
from eclectus.tasks.run import Run, activate
from tests.support import session

SLOW_TIMEOUT = 300
# Worker processes of pytest-xdist take whole files in this order. The longest begin first, so that none runs alone at
# the end.
LONGEST_FIRST = (
    "flows/services/test_chaos.py",
    "flows/test_main.py",
    "tasks/evaluation/test_benchmark.py",
    "storage/lineage/sql/test_tables.py",
    "storage/lineage/test_repair.py",
    "tasks/grouping/test_chain.py",
    "models/training/test_loop.py",
    "tasks/grouping/test_embed.py",
    "models/mixture/test_export.py",
    "models/training/test_sharded.py",
    "tasks/training/test_workers.py",
    "storage/test_mirror.py",
    "storage/lineage/sql/test_macros.py",
    "tasks/evaluation/test_evaluate.py",
)  # fmt: skip
if "PYTEST_XDIST_WORKER" in os.environ:
    # Several processes share the cores; OpenMP threads that spin while they wait would take them from each other: 200 s
    # instead of 8 were seen.
    for name, value in {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}.items():
        os.environ.setdefault(name, value)


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    rank = {here / name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT))


def pytest_unconfigure():
    # Prefect's own server logs that it stops when pytest has closed its streams.
    logging.raiseExceptions = False


@pytest.fixture
def steps(monkeypatch):
    """The labels of steps that were made, by made-up functions (tests/support/made_up_steps.py)."""
    from tests.support.made_up_steps import make_up_steps

    return make_up_steps(monkeypatch)


@pytest.fixture(scope="session", autouse=True)
def session_folder(tmp_path_factory):
    """Sets the folder that worker processes of this session share (tests/support/session.py)."""
    own = tmp_path_factory.getbasetemp()
    session.FOLDER = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    session.FOLDER.mkdir(exist_ok=True)


@pytest.fixture(autouse=True)
def one_torch_thread():
    """Tests compute with tiny matrices, and an encoder that one of them loads sets torch's threads for the process."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture
def home(tmp_path):
    return Home.open(tmp_path / "home")


@pytest.fixture
def store(tmp_path):
    return ArtifactStore(tmp_path / "home")


@pytest.fixture
def run(home):
    """An active run, without Prefect, as a step sees it."""
    with Journal(home.journal, "test-run") as journal:
        journal.event("run_started", flow="test", parameters={}, packages={})
        opened = Run(id="test-run", home=home, journal=journal, known=KnownKeys(home.keys, home.store), flow="test")
        with activate(opened):
            yield opened
        opened.close_kept(None)


@pytest.fixture(scope="session")
def object_store():
    """The address of a real S3 server (moto) with a bucket `models`; the client's environment variables point to it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    client = {"AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "tester", "AWS_SECRET_ACCESS_KEY": "secret"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**client, "AWS_DEFAULT_REGION": "us-east-1"}.items():
            patch.setenv(name, value)
        try:
            _wait_for(address)
            urllib.request.urlopen(urllib.request.Request(f"{address}/models", method="PUT")).close()
            yield address
        finally:
            server.terminate()
            server.wait(timeout=20)


def _wait_for(address):
    end = time.monotonic() + 60
    while True:
        try:
            return urllib.request.urlopen(address).close()
        except OSError:
            assert time.monotonic() < end, f"nothing answers at {address}"
            time.sleep(0.2)


@pytest.fixture(scope="session")
def ray_head():
    """One Ray for all tests of this process that need one; its workers find the tests' modules."""
    from eclectus.tasks import ray_cluster

    with pytest.MonkeyPatch.context() as patch:
        root = str(Path(__file__).parents[1])
        patch.setattr(ray_cluster, "WORKER_ENVIRONMENT", {**ray_cluster.WORKER_ENVIRONMENT, "PYTHONPATH": root})
        # Ray's own niceness (15) would leave its workers almost no CPU while other tests run.
        patch.setenv("RAY_worker_niceness", "0")
        ray_cluster.shut_ray()
        ray_cluster.ensure_ray()
        yield
        ray_cluster.shut_ray()


@pytest.fixture
def interrupts():
    """Sets SIGINT's handler. The one at the start differs: background jobs of a shell start with SIGINT ignored."""
    before = signal.getsignal(signal.SIGINT)
    yield lambda wanted: signal.signal(signal.SIGINT, wanted)
    signal.signal(signal.SIGINT, before)
