"""A group of Ray Train workers: one group does several jobs, and survives the death of a worker."""

import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ray.exceptions import RayActorError
from safetensors.torch import load_file

from eclectus.storage.errors import EclectusError
from eclectus.tasks.ray_cluster import ensure_ray
from eclectus.tasks.training.workers import TrainWorkers
from tests.support.processes import run_group
from tests.support.tiny_training import write_instances
from tests.support.worker_jobs import KILLED_AT, complain, total, train_in_a_group, train_killed_once


@pytest.fixture(scope="module")
def group(ray_head, tmp_path_factory):
    with TrainWorkers(2, False, tmp_path_factory.mktemp("ray")) as workers:
        yield workers


def append_to(reports):
    return lambda kind, values: reports.append((kind, values))


@pytest.mark.slow
def test_one_group_does_several_jobs_in_the_same_processes(group):
    reports = []
    first = group.do(total, {"value": 1}, append_to(reports))
    second = group.do(total, {"value": 2}, append_to(reports))
    assert (first[0], second[0]) == (3.0, 5.0)
    assert first[1] == second[1]
    assert ("progress", {"done": 1, "total": 1}) in reports


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["copied", "sharded"])
def test_a_killed_worker_comes_back_and_training_goes_on_to_the_bits_of_an_undisturbed_group(group, tmp_path, sharded):
    write_instances(tmp_path / "instances")
    for name in ("killed", "undisturbed"):
        (tmp_path / name).mkdir()
    steps = group.do(
        train_killed_once, {"folder": str(tmp_path / "killed"), "sharded": sharded, "kill": True}, append_to([])
    )
    assert 1 < steps[0] <= KILLED_AT, "it went on from its last checkpoint"
    run_group(2, train_in_a_group, str(tmp_path / "undisturbed"), sharded)
    ended, expected = (load_file(tmp_path / name / "end.safetensors") for name in ("killed", "undisturbed"))
    assert ended.keys() == expected.keys() and all(torch.equal(ended[name], expected[name]) for name in expected)
    assert group.do(total, {"value": 0}, append_to([]))[0] == 1.0


@pytest.mark.slow
def test_a_job_that_fails_says_why_in_the_words_of_the_error(group):
    with pytest.raises(EclectusError, match="instances 3 and 4 are damaged; pack them again"):
        group.do(complain, {}, append_to([]))


@pytest.mark.parametrize("lost_at", ["post", "poll"])
def test_a_node_that_is_lost_is_named_with_what_to_do(monkeypatch, lost_at):
    def answers(call):
        if call == lost_at:
            raise RayActorError

    queue = SimpleNamespace(post=SimpleNamespace(remote=lambda *_: "post"), poll=SimpleNamespace(remote=lambda: "poll"))
    group = TrainWorkers(2, False, Path("unused"))
    monkeypatch.setattr(group, "_queue", queue)
    monkeypatch.setattr(group, "_ensure_started", lambda: None)
    monkeypatch.setattr("ray.get", answers)
    with pytest.raises(RuntimeError, match=r"node on this machine was lost .* start the same run again"):
        group.do(total, {"value": 1}, append_to([]))


def test_a_stop_that_comes_while_ray_starts_reaches_who_listened_before(monkeypatch):
    class Told(BaseException):
        pass

    def told(*_):
        raise Told

    def starts(**_):
        """As `ray.init` does, with SIGTERM in the midst of it."""
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", starts)
    before = signal.signal(signal.SIGTERM, told)
    try:
        with pytest.raises(Told):
            ensure_ray()
        assert signal.getsignal(signal.SIGTERM) is told
    finally:
        signal.signal(signal.SIGTERM, before)
