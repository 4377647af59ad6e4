"""`eclectus estimate`: a row for every training, for GPUs or for this machine; and the history of forecasts."""

import json

import pytest

from eclectus.flows.cli.main import main
from eclectus.storage.journal import Journal
from tests.support.command_line import run_command
from tests.support.history import write_history

SMALL = ["--original-languages", "en", "--model-layers", "2", "--instance-tokens", "128", "--lory-experts", "2"]


@pytest.fixture
def run(tmp_path, capsys):
    """Calls the command: (exit code, stdout, stderr)."""

    return lambda *words: run_command(capsys, "--home", tmp_path / "home", "estimate", *words)


def test_for_gpus_every_training_has_time_memory_disk_and_flops(run, tmp_path):
    code, out, err = run("pretrain", "--json", "--gpus", 4, "--gpu-type", "l4", *SMALL)
    assert code == 0, err
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["training"] for row in rows] == ["train dense warm-up", "train dense", "train lory"]
    parts = ("program", "gradients", "moments", "activations", "gathered", "holes")
    for row in rows:
        assert row["seconds"] > 0 and row["flops"] > 0 and row["disk"] > 4 * row["trained"]
        assert row["workers"] == 4 and row["by"] == "l4" and row["fault"] is None
        assert row["tokens"] == row["steps"] * 4 * 128 and row["host"] > 0
        assert sum(row[part] for part in parts) < row["memory"]
    assert not (tmp_path / "home").exists(), "an estimate writes nothing"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--gpus", 4, "--gpu-type", "h1000"], "GPU type 'h1000' is not in the table; its types are a100-40"),
        (["--gpus", 4], "--gpus 4 needs --gpu-type; the types are a100-40"),
        (["--gpus", 0, "--gpu-type", "l4"], "--gpus is 0: choose 1 or more"),
        (["--gpus", 3, "--gpu-type", "l4"], "pretrain_batch 4 cannot be shared by training_workers 3"),
    ],
)
def test_what_cannot_be_is_named(run, words, complaint):
    code, out, err = run("pretrain", *words, *SMALL)
    assert code == 2 and complaint in err and not out


def test_a_training_that_does_not_fit_is_named_with_what_would_fit(run):
    words = ["--model-preset", "1.5b", "--gpus", 1, "--gpu-type", "l4", "--original-languages", "en"]
    code, out, _ = run("pretrain", *words, "--pretrain-batch", 1)
    assert code == 3
    assert "train lory: the training does not fit in memory: a process takes about" in out
    assert "training_sharded true with training_workers" in out


def test_on_this_machine_a_probe_measures(run):
    code, out, err = run("pretrain", "--json", "--training-workers", 0, *SMALL, "--pretrain-steps", 20)
    assert code == 0, err
    rows = [json.loads(line) for line in out.splitlines()]
    assert all(row["by"] == "probe" and row["seconds"] > 0 and row["program"] > 10**8 for row in rows)


def test_the_history_shows_forecasts_beside_what_came_true(run, home, capsys):
    write_history(home)
    with Journal(home.journal, "20260103-000000-cccccc") as journal:
        journal.event("forecast", step="s", label="goes on", forecast={"seconds": 9, "steps": 3, "memory": 5})
    main(["--home", str(home.root), "estimate", "--history", "--json"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["label"], row["seconds_error"], row["memory_error"]) for row in rows] == [
        ("goes on", None, None), ("make checkpoint", 0.0, -0.1), ("make checkpoint", 0.0, -0.1),
    ]  # fmt: skip


def test_without_a_flow_it_says_what_it_needs(run):
    code, _, err = run()
    assert code == 2 and "estimate needs a flow (run, pretrain, extend), or --history" in err
