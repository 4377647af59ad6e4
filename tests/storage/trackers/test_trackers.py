"""What trackers show of a run, read back from their own files and servers."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest

from eclectus.flows.cli.main import main
from eclectus.flows.services.ports import free_port
from eclectus.storage.trackers.feeder import feed_recorded
from eclectus.storage.trackers.sink import Sink
from eclectus.storage.trackers.tracker import VARIABLES, Point, TrackedRun, chosen
from tests.support.tracked import (
    KILLED,
    LOSS,
    RESUMED,
    TRAINING,
    mlflow_curves,
    tensorboard_curves,
    trackio_curves,
    wandb_curves,
    write_tracked,
)


def needs(*libraries):
    missing = [name for name in libraries if find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} is not installed")


@pytest.fixture(autouse=True)
def no_trackers_of_the_user(monkeypatch, tmp_path):
    for name in (variable for each in VARIABLES.values() for variable in each):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))


@pytest.fixture
def tracked(home):
    write_tracked(home)
    return home


def feed(home, name):
    """Both runs, one after the other, twice; returns the numbers that each took."""
    said = []
    told = [feed_recorded(home, run, [name], "greek", said.append)[0].told for run in 2 * [KILLED, RESUMED]]
    assert said == []
    return told


def rounded(curve):
    return [(step, round(value, 4)) for step, value in curve]


def check(curves):
    """The training is one curve of both runs, without the steps that were logged twice."""
    assert set(curves[TRAINING]) >= {"loss", "loss/web", "learning_rate"}
    assert rounded(curves[TRAINING]["loss"]) == rounded(LOSS)
    assert [step for step, _ in curves[TRAINING]["loss/web"]] == [step for step, _ in LOSS]


@needs("tensorboard")
def test_tensorboard_reads_one_curve_of_a_training_that_was_killed_and_went_on(tracked):
    assert feed(tracked, "tensorboard") == [12, 8, 0, 0]
    curves, texts = tensorboard_curves(tracked.root / "trackers" / "tensorboard")
    check(curves)
    assert curves[RESUMED]["evaluate_lory/bits_per_byte/el"] == [(0, pytest.approx(0.9))]
    assert "routing_entropy/layer_3" in "".join(curves[RESUMED])
    shown = texts[RESUMED]
    assert "| language | lory |" in shown["report/Bits_per_byte/text_summary"]
    assert "| 3 | 1 | 0.2 |  |" in shown["evaluate_lory/expert_load/text_summary"]
    assert "# What was gained" in shown["report/text_summary"]
    assert '"seed": 1' in texts[TRAINING]["config/text_summary"]


@needs("mlflow")
def test_mlflow_has_one_curve_of_a_training_that_was_killed_and_went_on(tracked):
    assert feed(tracked, "mlflow") == [12, 8, 0, 0]
    curves, runs = mlflow_curves(f"sqlite:///{tracked.root / 'trackers' / 'mlflow.db'}")
    check(curves)
    assert curves[RESUMED]["evaluate lory/bits_per_byte/el"] == [(0, 0.9)]
    training, resumed = runs[TRAINING], runs[RESUMED]
    assert training.info.status == "FINISHED" and runs[KILLED].info.status == "FAILED"
    assert training.data.params["seed"] == "1" and training.data.tags["mlflow.parentRunId"] == runs[KILLED].info.run_id
    folder = Path(resumed.info.artifact_uri.removeprefix("file://"))
    assert (folder / "report.html").read_text() == "<h1>What was gained</h1>"
    table = json.loads((folder / "evaluate lory expert load.json").read_text())
    assert table["columns"] == ["layer", "expert", "share", "top_k_share"] and table["data"][1] == [3, 1, 0.2, None]
    assert "evaluate lory scores.json" in resumed.data.tags["mlflow.loggedArtifacts"]


@needs("wandb")
def test_wandb_keeps_one_curve_in_its_offline_files(tracked, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert feed(tracked, "wandb") == [12, 8, 0, 0]
    curves, records = wandb_curves(tracked.root / "trackers" / "wandb")
    check(curves)
    runs = [record.run for record in records[TRAINING] if record.WhichOneof("record_type") == "run"]
    assert {(run.project, run.run_group, run.job_type) for run in runs} == {("greek", KILLED, "train lory")}
    summary = {
        "/".join(item.nested_key) or item.key: item.value_json
        for record in records[RESUMED]
        if record.WhichOneof("record_type") == "summary"
        for item in record.summary.update
    }
    assert summary["evaluate lory/bits_per_byte/el"] == "0.9"
    assert curves[RESUMED]["evaluate lory/expert load/_type"][0][1] == "table-file"
    assert curves[RESUMED]["report/_type"][0][1] == "html-file"


@needs("trackio")
def test_trackio_has_one_curve_in_its_database(tracked, tmp_path):
    program = (
        "import sys; from tests.storage.trackers.test_trackers import feed; from eclectus.storage.home import Home; "
        "print(feed(Home.open(sys.argv[1]), 'trackio'))"
    )
    # It reads its folder when it is imported.
    done = subprocess.run([sys.executable, "-c", program, str(tracked.root)], cwd=Path(__file__).parents[3],
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "[12, 8, 0, 0]" in done.stdout.splitlines()
    curves, logged = trackio_curves(tmp_path / "trackio")
    check(curves)
    assert {"layer": 3, "expert": 1, "share": 0.2, "top_k_share": None} in next(
        row["evaluate lory/expert load"]["_value"] for row in logged[RESUMED] if "evaluate lory/expert load" in row
    )


@needs("mlflow")
@pytest.mark.slow
def test_a_server_that_is_killed_is_named_once_and_gets_what_it_missed_when_it_is_back(tracked, tmp_path, monkeypatch):
    port, said = free_port(), []
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    server = serve_mlflow(tmp_path, port)
    try:
        assert feed_recorded(tracked, KILLED, ["mlflow"], "greek", said.append)[0].told == 12 and not said
    finally:
        stop(server)
    assert feed_recorded(tracked, RESUMED, ["mlflow"], "greek", said.append)[0].told == 0
    gone, left = said
    assert f"mlflow at http://127.0.0.1:{port} takes nothing now" in gone and f"track {RESUMED} --to mlflow" in gone
    assert left == "mlflow: 8 numbers were not taken"
    server = serve_mlflow(tmp_path, port)
    try:
        assert feed_recorded(tracked, RESUMED, ["mlflow"], "greek", said.append)[0].told == 8 and len(said) == 2
        check(mlflow_curves(f"http://127.0.0.1:{port}")[0])
    finally:
        stop(server)


def stop(server):
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def serve_mlflow(folder, port):
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder / 'server.db'}",
               "--artifacts-destination", str(folder / "artifacts"), "--port", str(port), "--workers", "1"]  # fmt: skip
    with open(folder / "server.log", "ab") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "MLFLOW_TRACKING_URI": ""},
                                  start_new_session=True)  # fmt: skip
    until = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
            return server
        except OSError:
            assert time.monotonic() < until and server.poll() is None, (folder / "server.log").read_text()[-2000:]
            time.sleep(0.5)


def test_the_environment_names_trackers_and_the_setting_wins_over_it():
    assert chosen([], {}) == []
    assert chosen([], {"WANDB_API_KEY": "x", "HF_TOKEN": "y"}) == []
    assert chosen([], {"WANDB_MODE": "offline", "MLFLOW_TRACKING_URI": "http://here"}) == ["wandb", "mlflow"]
    for off in ({"WANDB_MODE": "disabled"}, {"WANDB_DISABLED": "true"}):
        assert chosen([], {"WANDB_PROJECT": "greek", **off}) == []
    assert chosen(["none"], {"WANDB_PROJECT": "greek"}) == []
    assert chosen(["trackio"], {"WANDB_PROJECT": "greek"}) == ["trackio"]


def test_a_tracker_that_is_gone_is_left_alone_for_a_while_and_its_password_is_not_shown(tmp_path, monkeypatch):
    class Gone:
        place = "http://anna:open-sesame@tracker.example"
        tries = 0

        def begin(self, run, resumed):
            Gone.tries += 1
            raise ConnectionError("http://anna:open-sesame@tracker.example does not answer")

    said, now = [], [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    sink = Sink("mlflow", Gone, tmp_path, said.append, "eclectus track last --to mlflow")
    for step in range(4):
        sink.log(TrackedRun("run", "train"), Point("loss", 1.0, step, 0.0))
        sink.flush()
        now[0] += 4
    assert Gone.tries == 2 and len(said) == 1 and sink.close() == 4
    assert "sesame" not in said[0] + sink.place and "eclectus track last --to mlflow" in said[0]


def test_the_command_feeds_a_run_and_says_what_is_missing(tracked, capsys):
    home = str(tracked.root)
    main(["--home", home, "track", "last", "--to", "tensorboard", "--json"])
    told = json.loads(capsys.readouterr().out)
    # The run's own numbers, and the curve with what the killed run logged.
    assert told["numbers"] == 20 and told["run"] == RESUMED
    main(["--home", home, "track", RESUMED, "--to", "tensorboard"])
    assert "nothing new of run" in capsys.readouterr().out
    for words, complaint in (
        (["last"], "no tracker is named"),
        (["last", "--to", "comet"], "'trackers.0' in the options is 'comet'"),
        (["nothing", "--to", "tensorboard"], "there is no run 'nothing'"),
    ):
        with pytest.raises(SystemExit):
            main(["--home", home, "track", *words])
        assert complaint in capsys.readouterr().err
