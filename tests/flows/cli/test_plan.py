"""`eclectus plan FLOW` says what the flow's command does then, and does and writes nothing itself."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from eclectus.flows.cli.main import main
from eclectus.storage.home import Home
from eclectus.storage.lineage.connection import query
from tests.support.command_line import run_command
from tests.support.made_up_steps import run, settings_of, words_of, write_inputs


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("plan"))


@pytest.fixture
def plan(tmp_path, capsys):
    """Calls the command: (exit code, what it printed as JSON)."""

    def call(flow, given, root=tmp_path / "home"):
        code, said, _ = run_command(capsys, "--home", root, "plan", flow, "--json", *words_of(given))
        return code, json.loads(said)

    return call


def actions(planned):
    return {step["label"]: {"run": "completed", "reuse": "reused"}[step["action"]] for step in planned["steps"]}


def tree(root):
    """Every file and folder with its time of change and size."""
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in [root, *root.rglob("*")]}


# The slow ones take 3 s each and go the same ways as the others, with other settings.
CASES = [
    ("evaluate", {"base_model": "BASE", "extension_expert_budget": 6}),
    ("retrain", {"base_model": "BASE"}),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("main", {}),
            ("main", {"seeds": 2, "pretrain_baselines": ["random", "prefix"]}),
            ("curate", {"language_weights": ["en=2"]}),
            ("pretrain", {"dense_start": "BASE"}),
            ("extend", {"base_model": "BASE"}),
            ("extend", {"extension_method": "lora", "extension_base": "dense"}),
            ("similarity", {"base_model": "BASE"}),
        )
    ),
]


@pytest.mark.parametrize(("flow", "changes"), CASES)
def test_a_plan_and_the_run_after_it_agree_on_every_step(flow, changes, world, steps, plan, tmp_path):
    home, given = tmp_path / "home", settings_of(world, flow, changes)
    shutil.copy(world / "documents.jsonl", tmp_path / "documents.jsonl")
    given["sources"] = [str(tmp_path / "documents.jsonl")]

    def agree(given):
        code, planned = plan(flow, given)
        done = run(Home.open(home), flow, given)
        assert actions(planned) == done.states
        assert code == (3 if "completed" in done.states.values() else 0)
        assert planned["work"] == ("completed" in done.states.values())
        return planned, done

    planned, _ = agree(given)  # a new home
    assert planned["depends_on"] is None
    if flow == "retrain":
        return
    planned, _ = agree(given)
    assert planned["to_run"] == 0
    agree(given | {"seed": 7})
    (tmp_path / "documents.jsonl").write_text('{"text": "the ship came back to the harbour", "language": "en"}\n')
    planned, done = agree(given | {"seed": 7})
    assert planned["steps"][[step["label"] for step in planned["steps"]].index("ingest")]["action"] == "run"
    # Every third artifact of the run is deleted. Those of earlier runs stay: the gate asks for a former champion's.
    made = f"""select distinct artifacts.path from steps join step_outputs using (step) join artifacts using (artifact)
        where steps.run = '{done.id}' order by 1"""
    for (path,) in query(made, Home.open(home))[1][::3]:
        shutil.rmtree(path)
    agree(given | {"seed": 7})


def test_reasons_and_costs_are_those_of_runs(world, steps, plan, tmp_path):
    given = settings_of(world, "curate", {})
    home = Home.open(tmp_path / "home")
    run(home, "curate", given)
    _, planned = plan("curate", given | {"tokenizer_vocabulary": 500})
    by_label = {step["label"]: step for step in planned["steps"]}
    assert by_label["tokenizer"]["why"] == "settings.tokenizer_vocabulary 4096 -> 500"
    assert by_label["ingest"]["why"] == "same settings and inputs; every file is as it was written"
    assert by_label["pack original"]["why"] == "its input of step 'tokenizer' is not made yet"
    assert by_label["pack original"]["after"] == ["tokenizer"]
    assert by_label["tokenizer"]["last_seconds"] >= 0 and by_label["tokenizer"]["last_ended"]
    assert by_label["ingest"]["last_seconds"] is None and planned["without_cost"] == 0
    total = sum(step["last_seconds"] or 0 for step in planned["steps"])
    assert planned["last_seconds"] == pytest.approx(total, abs=0.002)


def test_nothing_is_written_and_no_home_is_made(world, steps, plan, tmp_path):
    given = settings_of(world, "main", {})
    nowhere = tmp_path / "nowhere"
    code, planned = plan("main", given, nowhere)
    assert code == 3 and planned["reused"] == 0 and not nowhere.exists() and steps == []
    home = Home.open(tmp_path / "home")
    run(home, "main", given)
    before = tree(home.root)
    for changes in ({}, {"seed": 5}):
        plan("main", given | changes)
        assert tree(home.root) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes into read-only folders")
def test_a_read_only_home_is_planned(world, steps, plan, tmp_path):
    given = settings_of(world, "curate", {})
    home = Home.open(tmp_path / "home")
    run(home, "curate", given)
    folders = [path for path in [home.root, *home.root.rglob("*")] if path.is_dir()]
    for folder in folders:
        folder.chmod(0o555)
    try:
        assert plan("curate", given)[0] == 0
        assert plan("curate", given | {"seed": 1})[0] == 3
    finally:
        for folder in folders:
            folder.chmod(0o755)


@pytest.mark.parametrize(
    "words",
    [
        ["--sources", "nowhere.jsonl"],
        ["--sourcse", "x"],
        ["--seed", "x"],
        ["--config", "nowhere.yaml"],
        ["--sources", "HERE", "--base-model", "BROKEN", "--expanded-languages", "tr", "--original-languages", "en"],
    ],
)
def test_bad_input_gives_the_error_of_the_command(words, world, steps, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(world / "base", broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"vocab_size": 9}))
    places = {"BROKEN": str(broken), "HERE": str(world / "documents.jsonl")}
    words = [places.get(word, word) for word in words]
    errors = []
    for command in (["run"], ["plan", "run"]):
        with pytest.raises(SystemExit) as end:
            main(["--home", str(tmp_path / command[0]), *command, *words])
        assert end.value.code == 2
        errors.append(capsys.readouterr().err)
    assert errors[0] == errors[1] and errors[0].startswith("eclectus: ") and errors[0].count("\n") == 1


def test_the_text_says_what_is_to_be_done(world, steps, tmp_path, capsys):
    given = settings_of(world, "curate", {})
    run(Home.open(tmp_path / "home"), "curate", given)
    main(["--home", str(tmp_path / "home"), "plan", "curate", *words_of(given)])
    assert capsys.readouterr().out.rstrip().endswith("nothing to do: 13 steps reused")
    with pytest.raises(SystemExit) as end:
        main(["--home", str(tmp_path / "home"), "plan", "curate", *words_of(given | {"tokenizer_vocabulary": 500})])
    text = capsys.readouterr().out
    assert end.value.code == 3 and "steps to run" in text and "(after tokenizer)" in text
    assert Path(tmp_path / "home").is_dir()
