"""Seconds of a training, over restarts and processes."""

import time
from dataclasses import dataclass

import pytest

from eclectus.models.training.clock import TrainingClock
from eclectus.models.training.process import Process


def burn(seconds):
    begun = time.process_time()
    while time.process_time() - begun < seconds:
        pass


def quiet(*_, **__):
    pass


def test_a_restarted_training_goes_on_counting_from_its_last_row_of_metrics(tmp_path):
    first = TrainingClock(quiet, Process(), tmp_path / "work")
    burn(0.1)
    first.report("metrics", step=1, values={})
    burn(0.1)
    first.report("progress", done=1, total=2)
    again = TrainingClock(quiet, Process(), tmp_path / "work")
    seconds = again.read()
    assert 0.1 <= seconds["cpu_seconds"] < 0.19, "what came after the last row of metrics is lost"
    assert seconds["training_seconds"] >= 0.1 and "gpu_seconds" not in seconds


def test_waiting_costs_time_but_no_cpu_seconds_and_reports_arrive(tmp_path):
    seen = []
    clock = TrainingClock(lambda kind, **values: seen.append((kind, values)), Process(), tmp_path)
    time.sleep(0.2)
    clock.report("damaged", step=3, text="x")
    seconds = clock.read()
    assert seconds["training_seconds"] >= 0.2 > 0.1 > seconds["cpu_seconds"]
    assert seen == [("damaged", {"step": 3, "text": "x"})]


@dataclass(frozen=True)
class OneOfFour(Process):
    def gather(self, value):
        return 4 * [value]


def test_cpu_seconds_are_those_of_all_processes(tmp_path):
    clock = TrainingClock(quiet, OneOfFour(rank=1, world=4), tmp_path)
    burn(0.05)
    assert clock.read()["cpu_seconds"] == pytest.approx(0.2, abs=0.1)
