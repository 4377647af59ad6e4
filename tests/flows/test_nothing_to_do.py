"""A run in which every step is reused: nothing is started or imported for it, and it is a run like any other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from eclectus.flows.flow import flow_named
from eclectus.flows.parameters import PARAMETERS
from eclectus.flows.run import open_run
from eclectus.storage.home import Home
from eclectus.storage.lineage.connection import query, walk
from tests.support.dense_bases import write_base
from tests.support.displays import NullDisplay
from tests.support.made_up_steps import make_up_steps, run, settings_of, words_of, write_inputs

ROOT = Path(__file__).parents[2]
# Of each flow, settings with which it takes more than its common steps.
FLOWS = {
    "main": {},
    "curate": {"language_weights": ["en=2"]},
    "pretrain": {"dense_start": "BASE"},
    "extend": {"base_model": "BASE"},
    "evaluate": {"base_model": "BASE", "extension_expert_budget": 6},
    "similarity": {"base_model": "BASE"},
    "retrain": {"base_model": "BASE"},
}
COMMANDS = {"main": "run"}
# What a run that does nothing must not import, each of which takes seconds.
HEAVY = ("torch", "transformers", "numba", "sklearn", "plotly", "sentence_transformers", "faiss", "ray", "prefect")
BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {heavy!r}:
            raise ImportError("a run with nothing to do imports " + name)
sys.meta_path.insert(0, Blocked())
from eclectus.flows.cli.main import main
for words in {commands!r}:
    main(words)
print([name for name in {heavy!r} if name in sys.modules])
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("nothing-to-do"))


@pytest.fixture
def home(tmp_path):
    return Home.open(tmp_path / "home")


def steps_of(home, run):
    """What lineage says of the steps of a run, without times and names of its own."""
    return query(
        f"""
        select s.name, s.label, s.flow, s.key, s.version, s.state, s.reason, s.seed, o.artifact,
            (select list(i.name || i.artifact order by i.name) from step_inputs i where i.step = s.step),
            (select list(t.name || t.value order by t.name) from settings t where t.step = s.step)
        from steps s left join step_outputs o using (step) where s.run = '{run.id}' order by s.started, s.label
        """,
        home,
    )[1]


def test_no_flow_imports_or_starts_anything_when_all_of_its_steps_are_reused(world, steps, tmp_path):
    commands, homes = [], []
    for flow, changes in FLOWS.items():
        # Of its own: a champion that another flow promotes is a new question to the gate.
        home = Home.open(tmp_path / flow)
        homes.append(home)
        given = settings_of(world, flow, changes)
        # A retraining has looked for new documents when its own first model is champion.
        for _ in range(2 if flow == "retrain" else 1):
            run(home, flow, given)
        commands.append(["--home", str(home.root), COMMANDS.get(flow, flow), *words_of(given)])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT")}
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED.format(heavy=HEAVY, commands=commands)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    assert done.stdout.endswith("[]\n")
    for home in homes:
        *_, (last, state) = query("select run, state from runs order by started", home)[1]
        made = query(f"select count(*) from steps where state = 'reused' and run = '{last}'", home)[1][0][0]
        others = query(f"select count(*) from steps where state != 'reused' and run = '{last}'", home)[1][0][0]
        assert (state, others) == ("completed", 0) and made > 3
        assert not (home.root / "prefect").exists()


def test_the_lineage_of_such_a_run_is_that_of_one_that_walked_through_its_steps(world, steps, home):
    given = settings_of(world, "main", {})
    run(home, "main", given)
    walked = PARAMETERS["main"](**given)
    with open_run("main", walked, home) as by_hand:
        result = flow_named("main").whole(walked)
    made, shown = len(steps), NullDisplay()
    looked_up = run(home, "main", given, [shown])
    assert len(steps) == made and set(looked_up.states.values()) == {"reused"}
    assert looked_up.states == by_hand.states and steps_of(home, looked_up) == steps_of(home, by_hand)
    assert looked_up.result == result
    artifact = result.report.name
    assert len(walk(artifact, home)) > 10
    reason = query(f"select reason from steps where run = '{looked_up.id}' and label = 'train dense'", home)[1]
    assert reason == [("same settings and inputs; every file is as it was written",)]


def test_a_damaged_or_deleted_artifact_is_noticed_and_made_again(world, steps, home):
    given = settings_of(world, "main", {})
    first = run(home, "main", given)
    for number, damage in enumerate((_flip, _flip_manifest, _remove)):
        label, artifact = (
            ("train lory", first.result.checkpoints["lory"]),
            ("group", first.result.curated.grouping),
            ("report", first.result.report),
        )[number]
        damage(Path(artifact.path))
        del steps[:]
        again = run(home, "main", given)
        assert steps == [label] and again.states[label] == "completed"
        reason = query(f"select reason from steps where run = '{again.id}' and label = '{label}'", home)[1][0][0]
        assert "damaged" in reason or "is gone" in reason


def _flip(folder):
    path = folder / "content"
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_bytes(data)
    os.utime(path, ns=times)


def _flip_manifest(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"rows": 3', '"rows": 4'))


def _remove(folder):
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def test_the_server_is_started_by_the_first_run_with_work_alone(world, home, monkeypatch):
    started = []
    make_up_steps(monkeypatch)
    monkeypatch.setattr("eclectus.flows.flow.serve", started.append)
    given = settings_of(world, "curate", {})
    for changes, starts in (({}, 1), ({}, 1), ({"seed": 3}, 2), ({"seed": 3}, 2), ({}, 2)):
        run(home, "curate", given | changes)
        assert len(started) == starts


def test_a_changed_source_is_seen_even_if_its_time_stamp_is_set_back(world, steps, home, tmp_path):
    source = tmp_path / "one.jsonl"
    source.write_text('{"text": "the ship left the harbour", "language": "en"}\n')
    os.utime(source, (1e9, 1e9))
    given = settings_of(world, "curate", {"sources": [str(source)]})
    run(home, "curate", given)
    source.write_text('{"text": "the ship left the harbors", "language": "en"}\n')
    os.utime(source, (1e9, 1e9))
    del steps[:]
    run(home, "curate", given)
    assert "ingest" in steps


def test_inputs_are_checked_before_anything_is_started(world, home, monkeypatch, tmp_path):
    """A base without its output layer, behind a first step that is known."""
    make_up_steps(monkeypatch)
    monkeypatch.setattr("eclectus.flows.flow.serve", lambda run: pytest.fail("a server was started"))
    broken = tmp_path / "base"
    write_base(broken, "llama")
    (broken / "config.json").write_text(
        json.dumps(json.loads((broken / "config.json").read_text()) | {"vocab_size": 9})
    )
    with pytest.raises(Exception, match="base") as caught:
        run(home, "extend", settings_of(world, "extend", {"base_model": str(broken)}))
    assert type(caught.value).__name__ == "EclectusError" and "\n" not in str(caught.value)
    assert query("select state from runs", home)[1] == [("failed",)]


def test_what_a_flow_reports_between_its_steps_is_reported_once(world, steps, home, tmp_path):
    (tmp_path / "documents.jsonl").write_text('{"text": "the ship left the harbour", "language": "en"}\n')
    (tmp_path / "picture.png").write_bytes(b"x")
    given = settings_of(world, "curate", {"sources": [str(tmp_path)]})
    for _ in range(2):
        shown = NullDisplay()
        run(home, "curate", given, [shown])
        assert len([text for text in shown.texts if "are not read" in text]) == 1


def test_an_artifact_that_another_process_damages_between_look_up_and_work_is_noticed(world, home, monkeypatch):
    steps = make_up_steps(monkeypatch)
    given = settings_of(world, "curate", {})
    first = run(home, "curate", given)
    monkeypatch.setattr("eclectus.flows.flow.serve", lambda run: _flip(Path(first.result.tokenizer.path)))
    del steps[:]
    run(home, "curate", given | {"seed": 1, "tokenizer_vocabulary": 4096})
    changed = [label for label in steps if label == "tokenizer"]
    assert changed == ["tokenizer"]
