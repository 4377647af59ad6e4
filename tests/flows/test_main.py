"""The whole job on a small configuration, as a user runs it: command, server, Ray and all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from eclectus.storage.home import Home
from eclectus.storage.lineage.connection import query
from eclectus.tasks.corpus import CorpusSettings, write_corpus
from tests.support.processes import until

ROOT = Path(__file__).parents[2]
PLANTED = "planted-5ec2e7-for-main"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def environment():
    passed = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    # Ray's own niceness (15) would leave its workers almost no CPU while other tests run.
    return passed | {"PLANTED_API_TOKEN": PLANTED, "RAY_worker_niceness": "0"}


def eclectus(home, *arguments):
    command = [sys.executable, "-m", "eclectus", "--home", str(home), *map(str, arguments)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=environment(), timeout=280, check=False
    )
    if done.returncode:
        raise AssertionError(f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done


def left_behind(home):
    """Processes that still know this home: servers, Ray's workers."""
    return [
        each
        for each in psutil.process_iter(["cmdline"])
        if any(str(home) in word for word in each.info["cmdline"] or ())
    ]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(
        folder,
        CorpusSettings(corpus_languages=("en", "tr"), corpus_english_bytes=150_000, corpus_expanded_bytes=200_000),
    )
    return folder


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, corpus):
    """(home, exit code, complaint) of a run that Ctrl-C ended in its fourth step."""
    home = tmp_path_factory.mktemp("work") / "home"
    words = ["run", "--config", "configs/small.yaml", "--sources", str(corpus)]
    # A job that a shell keeps in the background would hand an ignored SIGINT down.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        # What comes after the split takes many minutes, so that the interrupt meets it however busy the machine is.
        process = subprocess.Popen(
            [sys.executable, "-m", "eclectus", "--home", str(home), *words, "--embedding-steps", "1000000"],
            cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        for line in process.stdout:
            if line.startswith("+ split"):
                break
        process.send_signal(signal.SIGINT)
        _, complaint = process.communicate(timeout=120)
    finally:
        process.kill()
    return home, process.returncode, complaint


@pytest.fixture(scope="module")
def finished(interrupted, corpus):
    """(home, what the run printed that went on from the interrupted one)."""
    home = interrupted[0]
    return home, eclectus(home, "run", "--config", "configs/small.yaml", "--sources", corpus).stdout


def test_an_interrupt_leaves_no_process_and_is_noted(interrupted):
    home, code, complaint = interrupted
    assert code == 130 and "interrupted" in complaint
    until(lambda: left_behind(home) == [], 20)
    assert query("select state from runs", Home.open(home))[1] == [("cancelled",)]


def test_the_next_run_goes_on_from_the_steps_that_were_finished(finished):
    _, printed = finished
    for line in ("= ingest", "= split", "+ train_embedding", "+ group"):
        assert line in printed


def test_the_summary_says_where_everything_is_and_what_to_try(finished):
    home, printed = finished
    for words in ("bits per byte by language", "report.html", "eclectus.duckdb", "Try next", "train lory"):
        assert words in printed
    assert (home / "report.html").stat().st_size > 10_000


def test_a_secret_of_the_environment_is_in_no_file_that_the_job_left(finished):
    home, printed = finished
    files = [path for path in home.rglob("*") if path.is_file()]
    assert len(files) > 50 and PLANTED not in printed
    assert [path for path in files if PLANTED.encode() in path.read_bytes()] == []


def test_every_step_of_the_run_is_in_the_lineage_and_in_prefect(finished):
    home, _ = finished
    opened = Home.open(home)
    runs = query("select flow, state from runs order by started", opened)[1]
    assert runs == [("main", "cancelled"), ("main", "completed")]
    steps = query("select label, state, prefect_task_run from steps where run = (select max(run) from runs)", opened)[1]
    assert {"ingest", "group", "train dense", "train lory", "upcycle", "train stage 1", "train stage 2", "report"} <= {
        step[0] for step in steps
    }
    assert {label for label, state, _ in steps if state != "completed"} == {"ingest", "languages", "split"}
    assert all((state, bool(task_run)) in {("completed", True), ("reused", False)} for _, state, task_run in steps)
    import sqlite3

    with sqlite3.connect(home / "prefect" / "prefect.db") as server:
        shown = {kind for (kind,) in server.execute("select distinct type from artifact")}
        finished_runs = server.execute("select id from task_run where state_type = 'COMPLETED'").fetchall()
    assert {"markdown", "table", "image"} <= shown  # the report's tables and pictures among them
    # Prefect counts the flows that `main` calls as task runs too.
    assert {task_run for _, _, task_run in steps if task_run} <= {identifier for (identifier,) in finished_runs}


def test_a_second_run_reuses_every_step_and_a_changed_setting_runs_what_follows(finished, corpus):
    home, _ = finished
    again = eclectus(home, "run", "--config", "configs/small.yaml", "--sources", corpus).stdout
    assert "made:" not in again and "reused:" in again
    changed = eclectus(home, "run", "--config", "configs/small.yaml", "--sources", corpus, "--review-steps", 5).stdout
    made = {line.split("  ")[0].removeprefix("+ ") for line in changed.splitlines() if " made:" in line}
    assert made == {"train stage 2", "evaluate stage 2", "contamination stage 2", "report"}
    assert "made: settings.review_steps 6 -> 5" in changed


def test_checkpoints_load_with_transformers_and_the_original_weights_are_bit_identical(finished):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import eclectus.models.lory.model  # noqa: F401  (registers Lory with the Auto classes)

    home, _ = finished
    paths = dict(query(
        "select s.label, a.path from steps s join step_outputs o using (step)"
        " join artifacts a on a.artifact = o.artifact"
        " where a.kind = 'checkpoint' and s.state = 'completed'", Home.open(home)
    )[1])  # fmt: skip
    loaded = {}
    for label in ("train dense", "train lory", "train stage 1", "train stage 2"):
        loaded[label] = AutoModelForCausalLM.from_pretrained(paths[label])
        tokens = AutoTokenizer.from_pretrained(paths[label])("the", return_tensors="pt")["input_ids"]
        assert loaded[label].generate(tokens, max_new_tokens=4, do_sample=False).shape[1] >= tokens.shape[1]
    dense, moe = loaded["train dense"].state_dict(), loaded["train stage 2"].state_dict()
    for name, tensor in dense.items():
        if ".mlp." not in name:
            assert torch.equal(tensor, moe[name]), name
    for layer in range(len(loaded["train dense"].model.layers)):
        gate_up = moe[f"model.layers.{layer}.mlp.experts.gate_up_proj"][0]
        gate, up = (dense[f"model.layers.{layer}.mlp.{part}_proj.weight"] for part in ("gate", "up"))
        assert torch.equal(gate_up, torch.cat([gate, up]))
        down = dense[f"model.layers.{layer}.mlp.down_proj.weight"]
        assert torch.equal(moe[f"model.layers.{layer}.mlp.experts.down_proj"][0], down)
        assert not torch.equal(moe[f"model.layers.{layer}.mlp.experts.down_proj"][1], down)


def test_the_proof_of_upcycling_is_stored(finished):
    home, _ = finished
    (statistics,) = query(
        "select statistics from artifacts join steps on made_by = step where label = 'upcycle'", Home.open(home)
    )[1][0]
    proof = json.loads(statistics)
    assert proof["max_abs_delta"] <= proof["tolerance"]
