"""Trackers are fed while a run works, by a process of its own, whatever becomes of them or of the run."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from eclectus.flows.services.ports import free_port
from eclectus.storage.errors import EclectusError
from eclectus.storage.home import Home
from eclectus.storage.lineage.connection import query
from eclectus.storage.trackers.tracker import VARIABLES
from eclectus.tasks.tracking import TrackerSettings
from tests.storage.trackers.test_trackers import needs, serve_mlflow, stop
from tests.support.processes import until
from tests.support.tracked import LOSS, mlflow_curves, tensorboard_curves

ROOT = Path(__file__).parents[2]


def train(home, *words, **environment):
    """The program's exit code and what it printed."""
    done = start(home, *words, **environment)
    said, _ = done.communicate(timeout=120)
    return done.returncode, said


def start(home, *words, **environment):
    surroundings = {name: value for name, value in os.environ.items() if name not in sum(VARIABLES.values(), ())}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.tracked_training", home, *map(str, words)],
        cwd=ROOT, env=surroundings | environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def ended(home):
    """Whether no feeder is at work: it removes its lock."""
    return not list((home / "trackers").glob(".*.lock"))


@needs("tensorboard")
def test_a_run_feeds_a_tracker_and_ends_when_it_has_everything(tmp_path):
    code, said = train(tmp_path / "home", 60, TENSORBOARD_LOGGING_DIR=str(tmp_path / "board"))
    assert code == 0, said
    assert f"trackers: tensorboard: {tmp_path / 'board'}" in said
    assert "children: 0" in said, "the feeder counts neither as the run's memory nor as its time"
    curves, _ = tensorboard_curves(tmp_path / "board")
    ((_, own), (name, training)) = sorted(curves.items())
    assert name.endswith("-train-lory") and [step for step, _ in training["loss"]] == [step for step, _ in LOSS]
    assert own["train_lory/seconds"] == [(0, 1.5)]


@needs("tensorboard")
def test_a_training_that_is_killed_goes_on_in_the_same_curve(tmp_path):
    home = tmp_path / "home"
    code, said = train(home, 60, "--killed-at", 50, "--trackers", "tensorboard")
    assert code == -9, said
    # The feeder may not have begun when the run is dead.
    until(lambda: list((home / "trackers").glob("tensorboard/*")) and ended(home))
    code, said = train(home, 60, "--trackers", "tensorboard")
    assert code == 0, said
    curves, _ = tensorboard_curves(home / "trackers" / "tensorboard")
    ((name, training),) = [(name, curve) for name, curve in curves.items() if "train" in name]
    first, second = (run for (run,) in query("select run from runs order by started", Home.open(home))[1])
    assert name == f"{first}-train-lory" and second in curves
    assert [(step, round(value, 4)) for step, value in training["loss"]] == LOSS


@needs("tensorboard")
def test_a_training_that_resumes_with_trackers_shows_what_it_logged_without(tmp_path):
    home = tmp_path / "home"
    assert train(home, 60, "--killed-at", 50)[0] == -9
    assert not (home / "trackers").exists()
    assert train(home, 60, "--trackers", "tensorboard")[0] == 0
    curves, _ = tensorboard_curves(home / "trackers" / "tensorboard")
    (training,) = [curve for name, curve in curves.items() if "train" in name]
    assert [(step, round(value, 4)) for step, value in training["loss"]] == LOSS


def test_a_library_that_is_missing_is_an_error_where_it_was_asked_for_and_a_sentence_elsewhere(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(EclectusError, match=r"tracker wandb needs its library; .*'eclectus\[wandb\]'"):
            TrackerSettings(trackers=["wandb"]).check_together()
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "__init__.py").write_text("raise ImportError('No module named wandb')")
    code, said = train(tmp_path / "home", 60, WANDB_PROJECT="greek", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert code == 0, said
    assert said.count("wandb gets nothing: No module named wandb; pip install 'eclectus[wandb]'") == 1


def test_none_stands_alone():
    with pytest.raises(EclectusError, match="none stands alone"):
        TrackerSettings.read({"trackers": ["none", "mlflow"]}, "the options")


@needs("mlflow")
def test_a_tracker_that_is_not_there_is_named_once_and_training_goes_on(tmp_path):
    code, said = train(tmp_path / "home", 60, "--wait", 2.5, MLFLOW_TRACKING_URI=f"http://127.0.0.1:{free_port()}")
    assert code == 0, said
    assert said.count("takes nothing now") == 1 and said.count("track 2") == 2
    assert re.search(r"7 numbers did not reach mlflow; send them with: .* track \S+ --to mlflow", said)


@needs("mlflow")
@pytest.mark.slow
def test_a_server_that_is_killed_during_a_training_misses_nothing_that_cannot_be_sent_later(tmp_path):
    home, port = tmp_path / "home", free_port()
    address = f"http://127.0.0.1:{port}"
    server = serve_mlflow(tmp_path, port)
    run = start(home, 200, "--wait", 1.0, MLFLOW_TRACKING_URI=address)
    try:
        until(lambda: mlflow_curves(address)[0])
        until(lambda: any(len(each.get("loss", ())) > 3 for each in mlflow_curves(address)[0].values()))
    finally:
        stop(server)
    said, _ = run.communicate(timeout=120)
    assert run.returncode == 0, said
    assert said.count("takes nothing now") == 1 and "numbers did not reach mlflow" in said
    server = serve_mlflow(tmp_path, port)
    try:
        command = [sys.executable, "-m", "eclectus", "--home", home, "track", "last", "--to", "mlflow"]
        subprocess.run(command, cwd=ROOT, env=os.environ | {"MLFLOW_TRACKING_URI": address}, check=True)
        ((_, curve),) = [each for each in mlflow_curves(address)[0].items() if "train" in each[0]]
        assert [step for step, _ in curve["loss"]] == list(range(10, 201, 10))
    finally:
        stop(server)
