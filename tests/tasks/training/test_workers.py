import os
import signal
import sys
from pathlib import Path

import pytest

from eclectus.storage.errors import EclectusError
from eclectus.tasks.ray_cluster import ensure_ray, shut_ray
from eclectus.tasks.training.workers import TrainWorkers
from tests.support.worker_jobs import complain, die_once, total

ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def group(tmp_path_factory, monkeypatch_module):
    shut_ray()  # one that an earlier test started does not know this folder
    with TrainWorkers(2, False, tmp_path_factory.mktemp("ray")) as workers:
        yield workers
    shut_ray()


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eclectus.tasks.ray_cluster.WORKER_ENVIRONMENT", {"PYTHONPATH": str(ROOT)})
        yield patch


def append_to(reports):
    return lambda kind, values: reports.append((kind, values))


def test_one_group_does_several_jobs_in_the_same_processes(group):
    reports = []
    first = group.do(total, {"value": 1}, append_to(reports))
    second = group.do(total, {"value": 2}, append_to(reports))
    assert (first[0], second[0]) == (3.0, 5.0)
    assert first[1] == second[1]
    assert ("progress", {"done": 1, "total": 1}) in reports


def test_a_killed_worker_comes_back_and_takes_up_the_job_that_was_under_way(group, tmp_path):
    assert group.do(die_once, {"folder": str(tmp_path)}, append_to([])) == (2.0, True)
    assert group.do(total, {"value": 0}, append_to([]))[0] == 1.0


def test_a_job_that_fails_says_why_in_the_words_of_the_error(group):
    with pytest.raises(EclectusError, match="instances 3 and 4 are damaged; pack them again"):
        group.do(complain, {}, append_to([]))


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
