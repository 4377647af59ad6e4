"""kill -9 of a training worker and of the driver, on a real Ray: nothing is lost but the steps since the last checkpoint, and
the end is bit-identical to an undisturbed run's."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from eclectus.storage.home import Home
from eclectus.storage.lineage.connection import query
from eclectus.tasks.packing.pack import PackSettings, pack
from tests.support.small_world import make_world

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2000)]
ROOT = Path(__file__).parents[3]
STEPS, EVERY, PATIENCE = 160, 10, 900
SETTINGS = {
    "model_width": 32,
    "model_layers": 2,
    "model_heads": 2,
    "model_key_value_heads": 2,
    "model_feed_forward": 48,
    "lory_experts": 4,
    "lory_segment": 16,
    "pretrain_steps": STEPS,
    "pretrain_warmup_steps": 2,
    "dense_warmup": 0.05,
    "training_workers": 2,
    "checkpoint_every": EVERY,
}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """`start("ray", home)` starts a run on a home, `start("torchrun", folder)` the same training without one."""
    world = make_world(tmp_path_factory.mktemp("world"))
    with world.store.draft("instances") as draft:
        settings = PackSettings(instance_tokens=64, pack_group="original")
        pack.function(documents=world.documents, tokenizer=world.tokenizer, settings=settings, out=draft)
        instances = world.store.commit(draft)

    def process(how, home):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if how == "torchrun" else []
        script = [str(ROOT / "tests" / "support" / "killed_driver.py"), how, str(home)]
        return subprocess.Popen(
            [sys.executable, *launcher, *script, instances.path, world.tokenizer.path, json.dumps(SETTINGS)],
            cwd=ROOT,
            # Ray runs its workers at nice 15: on a busy machine they would get next to nothing.
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return process


def ended(process):
    """What a process printed, once it ended well."""
    try:
        printed, complaint = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 0, complaint[-3000:]
    return printed


def reached(home, process, sharded):
    """Waits until the training under way has written a checkpoint in its middle, and returns its step."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1][-3000:]
        for progress in (home / "work").glob("*/latest/progress.json"):
            try:
                about = json.loads(progress.read_text())
            except (OSError, ValueError):
                continue
            if (
                any("of-00002" in name for name in about["files"]) == sharded
                and EVERY * 3 <= about["step"] <= STEPS - 3 * EVERY
            ):
                return about["step"]
        time.sleep(0.02)
    raise AssertionError("no checkpoint in time")


def workers_of(process):
    return [
        each
        for each in psutil.Process(process.pid).children(recursive=True)
        if "RayTrainWorker" in " ".join(each.cmdline() or [each.name()])
    ]


def test_a_killed_worker_and_a_killed_driver_change_nothing_of_what_comes_out(start, tmp_path):
    ended(start("torchrun", tmp_path / "undisturbed"))
    home = tmp_path / "home"
    first = start("ray", home)
    try:
        reached(home, first, sharded=False)
        victims = workers_of(first)
        assert len(victims) == 2
        os.kill(victims[1].pid, signal.SIGKILL)
        reached(home, first, sharded=True)
        family = psutil.Process(first.pid).children(recursive=True)
    finally:
        first.kill()
        first.communicate()
    made = json.loads(ended(start("ray", home)).splitlines()[-1])

    for stage, path in made.items():
        for name in ("model.safetensors", "config.json"):
            expected = (tmp_path / "undisturbed" / stage / name).read_bytes()
            assert (Path(path) / name).read_bytes() == expected, f"{stage} {name}"
    _, reused = query("select label from steps where state = 'reused' order by label", Home.open(home))
    assert reused == [("dense",), ("warmup",)], "what was finished is kept; Lory went on"
    _, left = psutil.wait_procs(family, timeout=60)
    assert not left
